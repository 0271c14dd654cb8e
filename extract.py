"""Recipe 1: take the encoder out of a trained seq2seq model (Soltan et al. 2023, "seq2seq first").

    python extract.py seq2seq.pt --out enc-extracted.pt
    torchrun train_encoder.py --init enc-extracted.pt --steps 30 --out enc-mlm.pt    # a short MLM continuation

The encoder and the embedding are the seq2seq model's own tensors; the MLM head is new and untrained.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data import run_command
from model import MaskedLM, Seq2Seq
from objectives import InputError
from trainer import load_model, save_checkpoint, warm_start


def extract(seq2seq: Seq2Seq, source: Path) -> MaskedLM:
    """An MLM model whose encoder output equals the seq2seq model's bit for bit; source names it in what is printed."""
    torch.manual_seed(0)  # of the new head
    encoder = MaskedLM(replace(seq2seq.cfg, n_decoder_layers=0, fusion=False))
    warm_start(encoder, source, seq2seq.state_dict())
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seq2seq", type=Path, help="checkpoint of train_seq2seq.py")
    parser.add_argument(
        "--out", type=Path, default=Path("enc-extracted.pt"), help="checkpoint to write (default %(default)s)"
    )
    args = parser.parse_args()
    if args.out.exists():
        raise InputError(f"{args.out}: exists; give another --out")
    model, checkpoint = load_model(args.seq2seq, "seq2seq")
    encoder = extract(model, args.seq2seq)
    stage = {"stage": "extract", "steps": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "settings": {}}
    content = {"kind": "encoder", "config": asdict(encoder.cfg), "weights": encoder.state_dict()}
    content |= {"tokenizer": checkpoint["tokenizer"], "history": checkpoint["history"] + [stage]}
    save_checkpoint(args.out, content)


if __name__ == "__main__":
    run_command(main)
