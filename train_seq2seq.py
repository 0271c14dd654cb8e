"""Stage 2: a seq2seq model by de-noising, from scratch or around the encoder of stage 1 (Soltan et al. 2023, Recipe 2).

torchrun train_seq2seq.py --init enc.pt --unfreeze-at 0.5    # the recipe -> seq2seq.pt
torchrun train_seq2seq.py --out scratch.pt                   # the model it should match
"""

import re
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

import trainer
from cli import InputError, flag, run_command
from model import Decoder, ModelConfig
from objectives import clm_row, noise_row
from tokenizer import SpecialIds


@dataclass(frozen=True)
class DenoiseConfig:
    """The objective of this stage, and how long the encoder stays frozen."""

    noise: str = flag("drop", "what spans leave: nothing, <mask>, T5's sentinels", choices=("drop", "mask", "sentinel"))
    noise_density: float = flag(0.15, "share of the tokens that lie in spans", above=0, below=1)
    mean_span: float = flag(3.0, "mean of the Poisson distribution of span lengths, tokens", above=0, most=1000)
    clm_fraction: float = flag(0.0, "share of rows to continue, not de-noise (AlexaTM 20B: 0.2)", least=0, most=1)
    init_decoder: bool = flag(False, "start the decoder from --init's encoder layers, except for cross-attention")
    unfreeze_at: float = flag(0.0, "share of the steps for which --init's encoder stays frozen", least=0, most=1)


def seq2seq_objective(ids: SpecialIds, cfg: DenoiseConfig) -> trainer.Objective:
    """A row [L] -> source [S], decoder input [T] (the target after <s>) and target [T] of Seq2Seq."""

    def objective(tokens: np.ndarray, rng: np.random.Generator) -> trainer.Example:
        if cfg.clm_fraction and rng.random() < cfg.clm_fraction:
            src, tgt_out = clm_row(tokens, rng, ids)
        else:
            src, tgt_out = noise_row(tokens, rng, ids, cfg.noise, cfg.noise_density, cfg.mean_span)
        return {"src": src, "tgt_in": np.concatenate([[ids.bos], tgt_out[:-1]]), "tgt_out": tgt_out}

    return objective


def decoder_from_encoder(weights: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Decoder weights from an encoder's: positions, self-attention, feed-forward, norms (Rothe et al. 2020).

    Decoder layer i takes encoder layer i * n_encoder_layers // n_decoder_layers. Cross-attention has no counterpart.
    """
    layer = lambda i: str(int(i[0]) * cfg.n_encoder_layers // cfg.n_decoder_layers)
    source = {name: re.sub(r"(?<=blocks\.)\d+", layer, name) for name in Decoder(cfg).state_dict()}
    return {f"decoder.{x}": weights[f"encoder.{y}"] for x, y in source.items() if f"encoder.{y}" in weights}


def frozen_at(run: trainer.Run) -> trainer.Frozen:
    """Whether the encoder is frozen in a step: up to the share --unfreeze-at of the updates that the run began with."""
    share = run.objective.unfreeze_at
    thaw = round(share * run.train.begun_steps, 6)  # 0.55 * 100 is slightly more than 55 in floating point
    return lambda step: step < thaw or share == 1  # 1 also holds for an extended run


def main() -> None:
    run = trainer.start(__doc__, "seq2seq", DenoiseConfig)
    cfg = run.objective
    needs_encoder = {"--unfreeze-at": cfg.unfreeze_at, "--init-decoder": cfg.init_decoder, "--fusion": run.model.fusion}
    for name, given in needs_encoder.items():
        if given and not run.settings["init"]:
            raise InputError(f"{name}: there is no trained encoder to work with; give one with --init")
    if run.model.n_decoder_layers < 1:
        raise InputError(f"--decoder-layers {run.model.n_decoder_layers}: it must be at least 1")
    if round(run.train.seq_len * cfg.noise_density) < 1:
        raise InputError(f"--noise-density {cfg.noise_density} of --seq-len {run.train.seq_len} is no token; raise it")
    if run.init and cfg.init_decoder:
        run.init["weights"] |= decoder_from_encoder(run.init["weights"], run.model)
    # Held-out losses leave causal rows out, as those of eval.py do, so that they can be compared.
    objective, scored = (seq2seq_objective(run.data.ids, x) for x in (cfg, replace(cfg, clm_fraction=0.0)))
    trainer.fit(run, objective, frozen_at(run), scored)


if __name__ == "__main__":
    run_command(main)
