"""Stage 2: a seq2seq model by de-noising, from scratch or around the encoder of stage 1 (Soltan et al. 2023, Recipe 2).

torchrun train_seq2seq.py --init enc.pt --unfreeze-at 0.5    # the recipe -> seq2seq.pt
torchrun train_seq2seq.py --out scratch.pt                   # the model it is to match
"""

from dataclasses import dataclass

import numpy as np
import torch

import trainer
from data import run_command
from model import Seq2Seq, flag
from objectives import InputError, SpecialIds, noise_row


@dataclass(frozen=True)
class DenoiseConfig:
    """The objective of this stage, and how long the encoder stays frozen."""

    noise: str = flag(
        "drop", "spans leave no trace, one <mask> each, or T5's sentinels", choices=("drop", "mask", "sentinel")
    )
    noise_density: float = flag(0.15, "share of the tokens that lie in spans")
    mean_span: float = flag(3.0, "mean of the Poisson that span lengths are drawn from, tokens")
    unfreeze_at: float = flag(0.0, "the encoder of --init is frozen for this share of the steps, 0 to 1")

    def __post_init__(self) -> None:
        if not 0 < self.noise_density < 1:
            raise ValueError(f"noise_density is {self.noise_density}: it must be above 0 and below 1")
        if not 0 < self.mean_span <= 1000:
            raise ValueError(f"mean_span is {self.mean_span}: it must be above 0 and at most 1000")
        if not 0 <= self.unfreeze_at <= 1:
            raise ValueError(f"unfreeze_at is {self.unfreeze_at}: it must be in [0, 1]")


def seq2seq_objective(ids: SpecialIds, cfg: DenoiseConfig) -> trainer.Objective:
    """A row [L] -> source [S], decoder input [T] (the target behind <s>) and target [T] of Seq2Seq."""

    def objective(tokens: np.ndarray, rng: np.random.Generator) -> trainer.Example:
        src, tgt_out = noise_row(tokens, rng, ids, cfg.noise, cfg.noise_density, cfg.mean_span)
        return {"src": src, "tgt_in": np.concatenate([[ids.bos], tgt_out[:-1]]), "tgt_out": tgt_out}

    return objective


def main() -> None:
    run = trainer.start(__doc__, "seq2seq", DenoiseConfig)
    own, steps = run.objective, run.train.steps
    if own.unfreeze_at and not run.settings["init"]:
        raise InputError(f"--unfreeze-at {own.unfreeze_at}: without --init there is no trained encoder to freeze")
    if run.model.n_decoder_layers < 1:
        raise InputError(f"--decoder-layers {run.model.n_decoder_layers}: it must be at least 1")
    torch.manual_seed(run.train.seed)
    model = Seq2Seq(run.model)
    if run.init:
        trainer.warm_start(model, run.settings["init"], run.init["weights"])
    objective = seq2seq_objective(run.data.ids, own)
    trainer.fit(run, model, objective, frozen=lambda step: step < own.unfreeze_at * steps)


if __name__ == "__main__":
    run_command(main)
