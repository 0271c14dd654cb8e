"""What training costs, and the paper's 27 %: the FLOPs of an update, the ledger of a history, what a pair saved.

FLOPs count matrix products only. Soltan et al. 2023 count a stack's forward pass as 1 and its backward pass as 2.
"""

from itertools import takewhile

from torch import Tensor

from config import PRESETS
from model import ModelConfig


def train_flops(cfg: ModelConfig, rows: int, source: int, target: int, projected: int, frozen: bool = False) -> float:
    """FLOPs of one update on rows of `source` and `target` tokens each; `projected` counts positions of all rows.

    A backward pass costs twice its forward pass: one product for the gradient of the inputs, one for that of the
    weights. A frozen encoder has no backward pass; the gradients of its output (unless layers are fused) and of the
    frozen embedding are not computed either. Fusion itself, less than a thousandth of the encoder, is left out.
    """
    d, layer = cfg.d_model, 2 * (4 * cfg.d_model**2 + 2 * cfg.d_model * cfg.d_ff)  # of a block, per token
    encoder = rows * cfg.n_encoder_layers * (source * layer + 4 * source**2 * d)
    projection = 2 * projected * d * cfg.vocab_size
    if cfg.n_decoder_layers == 0:  # the last feed-forward layer and the head see labelled positions only
        spared = (rows * source - projected) * 4 * d * cfg.d_ff
        return 3 * (encoder - spared + projected * 2 * d**2 + projection)
    cross_kv = rows * cfg.n_decoder_layers * source * 4 * d**2
    cross = rows * cfg.n_decoder_layers * (target * 4 * d**2 + 4 * target * source * d)
    decoder = rows * cfg.n_decoder_layers * (target * layer + 4 * target**2 * d) + cross
    if not frozen:
        return 3 * (decoder + encoder + cross_kv + projection)
    return 3 * decoder + encoder + (3 if cfg.fusion else 2) * cross_kv + 2 * projection


def batch_flops(cfg: ModelConfig, batch: dict[str, Tensor], n_targets: int, frozen: bool = False) -> float:
    """train_flops of a collated batch, padding included.

    A decoder projects every position, an encoder only its n_targets labelled ones (to count them here, Python would
    wait for the GPU).
    """
    rows, source = batch["src"].shape
    if "labels" in batch:
        return train_flops(cfg, rows, source, 0, n_targets)
    target = batch["tgt_in"].shape[1]
    return train_flops(cfg, rows, source, target, rows * target, frozen)


def scratch_flops(history: list[dict]) -> tuple[int, float]:
    """Updates of the first model in a history, and the FLOPs of training both models from scratch for that many each.

    An update costs what the history has for an unfrozen one; FLOPs are 0 if it has only one kind of model. Raises
    KeyError for a history that lacks a figure.
    """
    trained = [stage for stage in history if stage["steps"]]
    steps = sum(x["steps"] for x in takewhile(lambda x: x["stage"] == trained[0]["stage"], trained))
    first = {stage["stage"]: stage for stage in reversed(trained)}
    if not {"encoder", "seq2seq"} <= first.keys():
        return steps, 0.0
    return steps, steps * sum(x["thawed_flops"] / x["steps"] for x in first.values())


def saved(history: list[dict], from_scratch: float) -> float | None:
    """The share of FLOPs that a history saves against training both models from scratch.

    None if there is nothing to compare: one model only, or no model from scratch.
    """
    if not from_scratch or not {"encoder", "seq2seq"} <= {stage.get("stage") for stage in history}:
        return None
    return 1 - sum(stage["flops"] for stage in history) / from_scratch


def paper_saving(unfreeze_at: float) -> tuple[float, float]:
    """What the pair saves at the paper's shape if the encoder thaws after this share of the second stage.

    First by our count, then by a simple one in which encoder and decoder cost the same and nothing else counts. 500k
    updates of each model from scratch are compared with 500k of the encoder and 350k of the second stage, rows of 512.
    """
    shape = {name: value for name, value in PRESETS["paper"].items() if name != "n_decoder_layers"}
    cfg, enc = (ModelConfig(150_000, max_len=512, n_decoder_layers=n, **shape) for n in (12, 0))
    noise = round(512 * 0.15)
    mlm = train_flops(enc, 1, 512, 0, noise)
    frozen, thawed = (train_flops(cfg, 1, 512 - noise, 512, 512, frozen) for frozen in (True, False))
    ours, simple = (
        1 - (10 * a + 7 * (unfreeze_at * f + (1 - unfreeze_at) * u)) / (10 * (a + u))
        for a, f, u in ((mlm, frozen, thawed), (3, 1 + 3, 3 + 3))
    )
    return ours, simple
