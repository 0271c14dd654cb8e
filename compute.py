"""What training costs, and the paper's 27 %: matrix-product FLOPs of an update, and what a pair of models saved.

(Soltan et al. 2023 compare compute by counting a stack's forward as 1 and its backward as 2.)
"""

from torch import Tensor

from model import IGNORE, PRESETS, ModelConfig


def train_flops(cfg: ModelConfig, rows: int, source: int, target: int, projected: int, frozen: bool = False) -> float:
    """Matrix-product FLOPs of one update, forward and backward, on `rows` rows of `source` and `target` tokens, of
    which `projected` positions in all meet the output projection.

    A backward pass costs twice its forward: one product for the inputs' gradient, one for the weights'. A frozen
    encoder has no backward pass; the gradients for its output (but for a fusion of it) and for the frozen embedding
    are not computed either. Attention fusion itself, less than a thousandth of an encoder's products, is left out.
    """
    d, layer = cfg.d_model, 2 * (4 * cfg.d_model**2 + 2 * cfg.d_model * cfg.d_ff)  # a block's products, per token
    encoder = rows * cfg.n_encoder_layers * (source * layer + 4 * source**2 * d)
    projection = 2 * projected * d * cfg.vocab_size
    if cfg.n_decoder_layers == 0:  # the last feed-forward layer and the head see the labelled positions alone
        spared = (rows * source - projected) * 4 * d * cfg.d_ff
        return 3 * (encoder - spared + projected * 2 * d**2 + projection)
    cross_kv = rows * cfg.n_decoder_layers * source * 4 * d**2
    cross = rows * cfg.n_decoder_layers * (target * 4 * d**2 + 4 * target * source * d)
    decoder = rows * cfg.n_decoder_layers * (target * layer + 4 * target**2 * d) + cross
    if not frozen:
        return 3 * (decoder + encoder + cross_kv + projection)
    return 3 * decoder + encoder + (3 if cfg.fusion else 2) * cross_kv + 2 * projection


def batch_flops(cfg: ModelConfig, batch: dict[str, Tensor], frozen: bool = False) -> float:
    """train_flops of a collated batch, padding included: the decoder projects every position, an MLM encoder only
    those that carry a label."""
    rows, source = batch["src"].shape
    if "labels" in batch:
        return train_flops(cfg, rows, source, 0, int((batch["labels"] != IGNORE).sum()))
    target = batch["tgt_in"].shape[1]
    return train_flops(cfg, rows, source, target, rows * target, frozen)


def saved(history: list[dict], from_scratch: float) -> float | None:
    """The share of FLOPs that a history of stages, with both models in it, takes less than both take from scratch.

    None where there is nothing to compare: one model alone, or models from scratch that were not trained.
    """
    if not from_scratch or not {"encoder", "seq2seq"} <= {stage.get("stage") for stage in history}:
        return None
    return 1 - sum(stage["flops"] for stage in history) / from_scratch


def paper_saving(at: float) -> tuple[float, float]:
    """What the pair saves at the paper's shape if the encoder thaws after this share of the second stage.

    By our count, and by the simple one in which encoder and decoder cost alike and nothing else counts. 500k updates
    of each model from scratch against 500k of the encoder and 350k of the second stage, in rows of 512.
    """
    shape = {name: value for name, value in PRESETS["paper"].items() if name != "n_decoder_layers"}
    cfg, enc = (ModelConfig(150_000, max_len=512, n_decoder_layers=n, **shape) for n in (12, 0))
    noise = round(512 * 0.15)
    mlm = train_flops(enc, 1, 512, 0, noise)
    frozen, thawed = (train_flops(cfg, 1, 512 - noise, 512, 512, frozen) for frozen in (True, False))
    ours, simple = (
        1 - (10 * a + 7 * (at * f + (1 - at) * u)) / (10 * (a + u))
        for a, f, u in ((mlm, frozen, thawed), (3, 1 + 3, 3 + 3))
    )
    return ours, simple
