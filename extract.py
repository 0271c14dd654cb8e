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
from pathlib import Path

import torch

from checkpoint import as_checkpoint, load_checkpoint, save_checkpoint, warm_start
from cli import InputError, run_command
from model import MaskedLM, ModelConfig


def extracted(path: Path) -> dict:
    """The checkpoint of an MLM model whose encoder output equals that of the seq2seq checkpoint bit for bit."""
    seq2seq = load_checkpoint(path, "seq2seq")
    torch.manual_seed(0)  # for the new head
    encoder = MaskedLM(ModelConfig(**seq2seq["config"] | {"n_decoder_layers": 0, "fusion": False}))
    warm_start(encoder, path, seq2seq["weights"])
    stage = {"stage": "extract", "steps": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "settings": {}}
    history = [*seq2seq["history"], stage]
    return as_checkpoint("encoder", encoder.cfg, encoder.state_dict(), seq2seq["tokenizer"], history)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a seq2seq model; with --to-hf an encoder or seq2seq")
    parser.add_argument("--to-hf", type=Path, metavar="DIR", help="write the whole model for transformers")
    parser.add_argument("--from-hf", type=Path, metavar="DIR", help="read a model that transformers wrote")
    out = Path("enc-extracted.pt")
    parser.add_argument("--out", type=Path, default=out, help="checkpoint to write (default %(default)s)")
    args = parser.parse_args()
    if (args.checkpoint is None) == (args.from_hf is None) or (args.from_hf and args.to_hf):
        raise InputError("name a checkpoint (--to-hf DIR exports it) or --from-hf DIR, not both")
    if args.to_hf and args.out != out:
        raise InputError(f"--out {args.out}: --to-hf names the folder that is written; leave --out out")
    if args.to_hf or args.from_hf:
        import hf
    if args.to_hf:
        hf.to_hf(args.checkpoint, args.to_hf)
    elif args.out.exists():
        raise InputError(f"{args.out}: exists; give another --out")
    else:
        save_checkpoint(args.out, hf.from_hf(args.from_hf) if args.from_hf else extracted(args.checkpoint))


if __name__ == "__main__":
    run_command(main)
