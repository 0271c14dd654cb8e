"""Stage 1: an encoder by masked language modelling (Devlin et al. 2019).

torchrun train_encoder.py                                        # on the embedded corpus -> enc.pt
torchrun train_encoder.py --data DATA --preset base --steps 100000 --batch-size 512 --seq-len 512
torchrun train_encoder.py --init extracted.pt --out enc-mlm.pt   # continue an encoder (Recipe 1)
"""

from dataclasses import dataclass

import numpy as np

import trainer
from cli import InputError, flag, run_command
from objectives import mask_tokens
from tokenizer import SpecialIds


@dataclass(frozen=True)
class MLMConfig:
    """The objective. Short runs learn far more with 40 % than with 15 % (Wettig et al. 2023; results/)."""

    mask_prob: float = flag(0.4, "share of the tokens that the model must predict (paper: 0.15)", above=0, below=1)


SCORED = MLMConfig(mask_prob=0.15)  # of held-out losses, whatever a model was trained with: they can be compared


def encoder_objective(ids: SpecialIds, cfg: MLMConfig) -> trainer.Objective:
    """A row [L] -> source and labels [L] of MaskedLM."""

    def objective(tokens: np.ndarray, rng: np.random.Generator) -> trainer.Example:
        src, labels = mask_tokens(tokens, rng, ids, cfg.mask_prob)
        return {"src": src, "labels": labels}

    return objective


def main() -> None:
    run = trainer.start(__doc__, "encoder", MLMConfig)
    seq_len, mask_prob = run.train.seq_len, run.objective.mask_prob
    if round(seq_len * min(mask_prob, SCORED.mask_prob)) < 1:
        what = f"--mask-prob {mask_prob}, or {SCORED.mask_prob} of held-out rows,"
        raise InputError(f"{what} of --seq-len {seq_len} masks nothing; raise it")
    objective, scored = (encoder_objective(run.data.ids, cfg) for cfg in (run.objective, SCORED))
    trainer.fit(run, objective, scored=scored)


if __name__ == "__main__":
    run_command(main)
