"""Stage 1: an encoder by masked language modelling (Devlin et al. 2019).

torchrun train_encoder.py                                        # on the embedded corpus -> enc.pt
torchrun train_encoder.py --data DATA --preset base --steps 100000 --batch-size 512 --seq-len 512
torchrun train_encoder.py --init extracted.pt --out enc-mlm.pt   # continue an encoder (Recipe 1)
"""

from dataclasses import dataclass

import numpy as np

import trainer
from cli import InputError, check_bounds, flag, run_command
from objectives import SpecialIds, mask_tokens


@dataclass(frozen=True)
class MLMConfig:
    """The objective of this stage."""

    mask_prob: float = flag(0.15, "share of the tokens that the model must predict", above=0, below=1)

    def __post_init__(self) -> None:
        check_bounds(self)


def encoder_objective(ids: SpecialIds, cfg: MLMConfig) -> trainer.Objective:
    """A row [L] -> source and labels [L] of MaskedLM."""

    def objective(tokens: np.ndarray, rng: np.random.Generator) -> trainer.Example:
        src, labels = mask_tokens(tokens, rng, ids, cfg.mask_prob)
        return {"src": src, "labels": labels}

    return objective


def main() -> None:
    run = trainer.start(__doc__, "encoder", MLMConfig)
    if round(run.train.seq_len * run.objective.mask_prob) < 1:
        raise InputError(
            f"--mask-prob {run.objective.mask_prob} of --seq-len {run.train.seq_len} masks nothing; raise it"
        )
    trainer.fit(run, trainer.new_model(run), encoder_objective(run.data.ids, run.objective))


if __name__ == "__main__":
    run_command(main)
