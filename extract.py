"""Takes the encoder out of a seq2seq model (Soltan et al. 2023, Recipe 1); converts models to and from transformers.

    python extract.py seq2seq.pt --out enc-extracted.pt
    torchrun train_encoder.py --init enc-extracted.pt --steps 30 --out enc-mlm.pt    # a short MLM continuation

The encoder and the embedding are the seq2seq model's own tensors; the MLM head is new and untrained.

    python extract.py enc.pt --to-hf HF-ENC            # loads as EsmForMaskedLM
    python extract.py seq2seq.pt --to-hf HF-SEQ2SEQ    # loads with trust_remote_code=True: its code is in the folder
    python extract.py --from-hf HF-ENC --out again.pt

The last three need `pip install transformers`; hf.py says which of its classes loads which model.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import as_checkpoint, load_model, save_checkpoint, warm_start
from cli import InputError, run_command
from model import MaskedLM, Seq2Seq


def extract(seq2seq: Seq2Seq, source: Path) -> MaskedLM:
    """An MLM model whose encoder output equals the seq2seq model's bit for bit; `source` is its printed name."""
    torch.manual_seed(0)  # for the new head
    encoder = MaskedLM(replace(seq2seq.cfg, n_decoder_layers=0, fusion=False))
    warm_start(encoder, source, seq2seq.state_dict())
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a seq2seq model; with --to-hf an encoder or seq2seq")
    parser.add_argument("--to-hf", type=Path, metavar="DIR", help="write the whole model for transformers")
    parser.add_argument("--from-hf", type=Path, metavar="DIR", help="read a model that transformers wrote")
    parser.add_argument(
        "--out", type=Path, default=Path("enc-extracted.pt"), help="checkpoint to write (default %(default)s)"
    )
    args = parser.parse_args()
    if (args.checkpoint is None) != (args.from_hf is not None):
        raise InputError("name a checkpoint, or a folder with --from-hf; not both")
    if args.from_hf and args.to_hf:
        raise InputError("--from-hf and --to-hf: one at a time")
    if args.to_hf:
        from hf import to_hf

        to_hf(args.checkpoint, args.to_hf)
        return
    if args.out.exists():
        raise InputError(f"{args.out}: exists; give another --out")
    if not args.out.parent.is_dir():
        raise InputError(f"{args.out.parent}: no such folder to write {args.out.name} to; create it")
    if args.from_hf:
        from hf import from_hf

        save_checkpoint(args.out, from_hf(args.from_hf))
        return
    model, checkpoint = load_model(args.checkpoint, "seq2seq")
    encoder = extract(model, args.checkpoint)
    stage = {"stage": "extract", "steps": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "settings": {}}
    history = [*checkpoint["history"], stage]
    content = as_checkpoint("encoder", encoder.cfg, encoder.state_dict(), checkpoint["tokenizer"], history)
    save_checkpoint(args.out, content)


if __name__ == "__main__":
    run_command(main)
