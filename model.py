"""The model: a Pre-LN Transformer encoder, a decoder, and the two models the paper trains from them.

`MaskedLM` is an encoder with a masked-language-modelling head; `Seq2Seq` is the same encoder with a decoder.
Both call their parts `embed` and `encoder`, so that moving an encoder between them means copying tensors.
Sources: the model code of AlexaTM 20B (Soltan et al. 2022), by the paper's team; Vaswani et al. 2017; Xiong et al.
2020 for Pre-LN.

Shapes at line ends: B rows, S source, T target, D model, H heads, K head dim, V vocabulary, N selected positions.
Boolean masks are True where a token is real, as in `scaled_dot_product_attention`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import check_bounds, flag
from objectives import IGNORE


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model. Every field with a default is a command-line flag; a preset only supplies defaults.

    Raises ValueError for a combination that cannot be built, naming the values.
    """

    vocab_size: int  # the tokenizer's, special tokens included
    d_model: int = flag(256, "width of the model", least=1, from_preset=True)
    n_heads: int = flag(4, "attention heads, a divisor of the width", least=1, from_preset=True)
    d_ff: int = flag(1024, "inner width of the feed-forward layers", least=1, from_preset=True)
    n_encoder_layers: int = flag(4, "layers of the encoder", least=1, from_preset=True)
    n_decoder_layers: int = flag(0, "layers of the decoder", least=0, from_preset=True, decoder_only=True)
    positions: str = flag(
        "rotary", "rotary: relative; learned: a vector each", choices=("rotary", "learned"), from_preset=True
    )
    max_len: int = flag(0, "the longest row in tokens (default: --seq-len)", least=1, from_preset=True)
    dropout: float = flag(0.0, "on embeddings and sublayer outputs", least=0, below=1, from_preset=True)
    fusion: bool = flag(False, "the decoder sees all layers of the encoder, fused by attention", decoder_only=True)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}: change one of them")
        if self.positions == "rotary" and self.d_model // self.n_heads % 2:
            raise ValueError(f"n_heads {self.n_heads} of width {self.d_model} are odd: rotary positions need even ones")


def plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, step by step (Vaswani et al. 2017, equation 1): q [B, H, T, K], k and v [B, H, S, K].

    On a CPU in bf16 it takes half the time of torch's `scaled_dot_product_attention`, for rows of up to 512 tokens.
    """
    scores = q * q.shape[-1] ** -0.5 @ k.mT  # [B, H, T, S]
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


def compute_dtype(x: Tensor) -> torch.dtype:
    """That of matrix products with x: autocast's, where it is on, or x's own."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


@lru_cache
@torch.inference_mode(False)  # a table made in that mode could not be used in training
def rotary_table(length: int, head_dim: int, device: torch.device) -> Tensor:  # -> [2, length, 1, K]
    """Cosines and signed sines, in fp32, of the angles t * 10,000^(-2i / K) by which `rotate` turns position t.

    Su et al. 2021, equation 15, in the half-split form: unit i of a head is paired with unit i + K / 2.
    """
    rates = 10_000 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)  # [K / 2]
    angles = torch.arange(length, device=device)[:, None, None] * rates  # [length, 1, K / 2]
    sin = angles.sin()
    return torch.stack([angles.cos().repeat(1, 1, 2), torch.cat([-sin, sin], -1)])


def rotate(x: Tensor, turn: Tensor) -> Tensor:  # [B, T, H, K], [2, T, 1, K] -> [B, T, H, K]
    """Turns each pair (x_i, x_{i + K/2}) by the angle of its position: q k^T then depends on their distance only."""
    cos, sin = turn
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class KeyValues:
    """The keys and values [B, H, S, K] that a layer has computed so far: its cache while generating."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of new positions and returns all."""
        if self.keys is not None:
            k, v = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        self.keys, self.values = k.contiguous(), v.contiguous()
        return self.keys, self.values


class Memory(NamedTuple):
    """A sequence that attention looks at."""

    x: Tensor  # [B, S, D]
    mask: Tensor | None  # [B, S], None where all tokens are real
    turn: Tensor | None  # [2, S, 1, K], the part of `rotary_table` for its positions; None if they are learned


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, 3.2.2): queries from one sequence, keys and values from another."""

    def __init__(self, cfg: ModelConfig, causal: bool = False):
        super().__init__()
        self.head_dim, self.causal = cfg.d_model // cfg.n_heads, causal
        self.q = nn.Linear(cfg.d_model, cfg.d_model)
        self.kv = nn.Linear(cfg.d_model, 2 * cfg.d_model)
        self.out = nn.Linear(cfg.d_model, cfg.d_model)

    def _heads(self, x: Tensor, turn: Tensor | None) -> Tensor:  # [B, T, D] -> [B, H, T, K]
        x = x.unflatten(-1, (-1, self.head_dim))  # [B, T, H, K]
        return (x if turn is None else rotate(x, turn)).transpose(1, 2)

    def forward(self, x: Tensor, turn: Tensor | None, memory: Memory, cache: KeyValues | None = None) -> Tensor:
        """Attends from x [B, T, D], turned by `turn`, to the memory: to all of it, or if causal up to the own position.

        A causal layer's cache holds the positions before x; any other's the whole memory, after the first call.
        """
        if cache is not None and cache.keys is not None and not self.causal:
            k, v = cache.keys, cache.values
        else:
            k, v = self.kv(memory.x).chunk(2, -1)  # [B, S, D]
            k, v = self._heads(k, memory.turn), self._heads(v, None)  # [B, H, S, K]
            k, v = (k, v) if cache is None else cache.update(k, v)
        q, mask = self._heads(self.q(x), turn), memory.mask  # [B, H, T, K], [B, S]
        mask = None if mask is None else mask[:, None, None, :]  # [B, 1, 1, S]
        if self.causal and cache is not None and (new := x.shape[1]) > 1:  # several tokens after those in the cache
            mask = torch.ones(new, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - new)
        by_hand = q.device.type == "cpu" and q.dtype == torch.bfloat16
        attend = plain_attention if by_hand else F.scaled_dot_product_attention
        with torch.autocast(q.device.type, enabled=False):  # the operands have their dtype already
            y = attend(q, k, v, attn_mask=mask, is_causal=self.causal and cache is None)  # [B, H, T, K]
        return self.out(y.transpose(1, 2).flatten(2))  # [B, T, D]


def feed_forward(cfg: ModelConfig) -> nn.Sequential:
    """Two linear layers with the exact (erf) GELU between them."""
    return nn.Sequential(nn.Linear(cfg.d_model, cfg.d_ff), nn.GELU(), nn.Linear(cfg.d_ff, cfg.d_model))


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)): Pre-LN."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.attn_norm, self.attn = nn.LayerNorm(cfg.d_model), Attention(cfg)
        self.ffn_norm, self.ffn = nn.LayerNorm(cfg.d_model), feed_forward(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, turn: Tensor | None, mask: Tensor | None, selected: Tensor | None) -> Tensor:
        """x [B, S, D], mask [B, S] -> [B, S, D], or [N, D] at the selected positions of the flattened batch."""
        h = self.attn_norm(x)
        x = x + self.dropout(self.attn(h, turn, Memory(h, mask, turn)))
        if selected is not None:  # attention needs all positions, the feed-forward layer takes each by itself
            x = x.flatten(0, 1)[selected]  # [N, D]
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention over the encoder's output, feed-forward: Pre-LN.

    Rotary positions turn the queries and keys of cross-attention too, by target and source position. Without this,
    the decoder must find what to copy by content only, which takes many times the updates to learn (results/README.md).
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.attn_norm, self.attn = nn.LayerNorm(cfg.d_model), Attention(cfg, causal=True)
        self.cross_norm, self.cross = nn.LayerNorm(cfg.d_model), Attention(cfg)
        self.ffn_norm, self.ffn = nn.LayerNorm(cfg.d_model), feed_forward(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, turn: Tensor | None, source: Memory, cache: tuple = (None, None)) -> Tensor:
        """x [B, T, D] -> [B, T, D]; the cache holds the KeyValues of self-attention and those of cross-attention."""
        h = self.attn_norm(x)
        x = x + self.dropout(self.attn(h, turn, Memory(h, None, turn), cache[0]))
        x = x + self.dropout(self.cross(self.cross_norm(x), turn, source, cache[1]))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Stack(nn.Module):
    """What encoder and decoder have in common: positions, dropout, layers, and the LayerNorm that closes Pre-LN."""

    def __init__(self, cfg: ModelConfig, block: type[nn.Module], n_layers: int):
        super().__init__()
        self.cfg = cfg
        self.positions = nn.Embedding(cfg.max_len, cfg.d_model) if cfg.positions == "learned" else None
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(block(cfg) for _ in range(n_layers))
        self.norm = nn.LayerNorm(cfg.d_model)

    def turn(self, x: Tensor, start: int = 0) -> Tensor | None:
        """The part [2, T, 1, K] of `rotary_table` for the positions of x [B, T, D] from `start` on; None if learned.

        Raises ValueError for a row longer than the model's max_len.
        """
        cfg, end = self.cfg, start + x.shape[1]
        if end > cfg.max_len:
            raise ValueError(f"a row of {end} tokens: the model was made for rows of at most {cfg.max_len}")
        if cfg.positions == "learned":
            return None
        table = rotary_table(cfg.max_len, cfg.d_model // cfg.n_heads, x.device)[:, start:end]
        return table.to(compute_dtype(x))  # once here, not in every layer

    def placed(self, embedded: Tensor, start: int = 0) -> Tensor:  # [B, T, D] -> [B, T, D]
        """The input of the first layer: embedded tokens, with learned positions from `start` on, if any."""
        if self.positions is not None:
            embedded = embedded + self.positions.weight[start : start + embedded.shape[1]]
        return self.dropout(embedded)


class Encoder(Stack):
    """Turns embedded tokens into contextual vectors."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg, EncoderBlock, cfg.n_encoder_layers)

    def forward(
        self, embedded: Tensor, src_mask: Tensor | None, fuse: Callable | None = None, selected: Tensor | None = None
    ) -> Tensor:  # [B, S, D], [B, S] -> [B, S, D]
        """The last layer's output, or what `fuse` makes of the outputs of all layers [layers, B, S, D].

        Every output passes the final norm. Without it the deeper layers would outweigh the others, since a Pre-LN
        stream grows from layer to layer. With `selected` positions [N] of the flattened batch, only theirs: [N, D].
        """
        turn, x, layers = self.turn(embedded), self.placed(embedded), []
        for block in self.blocks:
            x = block(x, turn, src_mask, selected if block is self.blocks[-1] else None)
            if fuse is not None:
                layers.append(x)
        return self.norm(x) if fuse is None else fuse(self.norm(torch.stack(layers)))


class Decoder(Stack):
    """Turns an embedded target prefix and encoder output into a vector for each next token."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg, DecoderBlock, cfg.n_decoder_layers)

    def forward(self, embedded: Tensor, enc_out: Tensor, src_mask: Tensor | None, cache: list | None) -> Tensor:
        """embedded [B, T, D], enc_out [B, S, D] -> [B, T, D]; the cache holds a pair for each layer (DecoderBlock)."""
        start = 0 if cache is None or cache[0][0].keys is None else cache[0][0].keys.shape[2]
        turn, x = self.turn(embedded, start), self.placed(embedded, start)
        source = Memory(enc_out, src_mask, self.turn(enc_out))
        for i, block in enumerate(self.blocks):
            x = block(x, turn, source) if cache is None else block(x, turn, source, cache[i])
        return self.norm(x)


class Fusion(nn.Module):
    """Attention over the encoder's layers, separately at each token (Cao, Satya Prakash, Hamza 2022).

    scores_l = q . LN(h_l) / sqrt(D), p = softmax over the layers, fused = sum_l p_l h_l. The query starts at 0, so
    that all layers count equally at step 0. paper: we do not know how it is wired there.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.query, self.norm = nn.Parameter(torch.zeros(cfg.d_model)), nn.LayerNorm(cfg.d_model)

    def forward(self, layers: Tensor) -> Tensor:  # [layers, B, S, D] -> [B, S, D]
        """The fused vectors."""
        shares = (self.norm(layers) @ self.query / len(self.query) ** 0.5).float().softmax(0)  # [layers, B, S]
        return (shares[..., None] * layers).sum(0)


def softmax_loss(logits: Tensor, bias: Tensor | None, targets: Tensor, gradient: bool) -> Tensor:
    """The sum of cross-entropies in nats of softmax(logits [N, V] + bias [V]), over targets [N] that are not IGNORE.

    With `gradient`, its gradient overwrites the logits.
    """
    x = logits.float() if bias is None else logits + bias.float()  # [N, V]
    real, token = (targets != IGNORE)[:, None], targets.clamp(min=0)[:, None]  # [N, 1]
    p = x.softmax(-1)
    log_z = x.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()  # [N, 1]
    loss = ((log_z - x.gather(1, token)) * real).sum()
    if gradient:
        at_target = (p.gather(1, token) - 1) * real  # [N, 1]
        logits.copy_(p.mul_(real)).scatter_(1, token, at_target.to(logits.dtype))
    return loss


class ProjectionLoss(torch.autograd.Function):
    """Sum of cross-entropies of `softmax(hidden @ weight.T + bias)`, never holding more than a chunk of the logits.

    At a 150k vocabulary the logits of 64 rows of 512 would be 9.8 GB in bf16; a chunk is 32 MB on a CPU and 0.5 GB on a
    GPU. Since the loss is a sum, its gradient is known as soon as a chunk's logits are: the forward pass computes it,
    the backward pass only scales it, as in Liger Kernel (Hsu et al. 2024). Gradients that nobody needs (a frozen
    embedding) are not computed. On a CPU the fp32 softmax takes only as many rows at a time as fit the cache.
    """

    CHUNK_LOGITS: ClassVar = {"cpu": 2**24, "cuda": 2**28}
    CACHED_LOGITS = 2**20  # 4 MB in fp32

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softmax: Callable = softmax_loss
    ) -> Tensor:
        """hidden [N, D], weight [V, D], bias [V], targets [N] -> the sum in nats over targets that are not IGNORE.

        `softmax` is `softmax_loss`, compiled or not.
        """
        device, dtype, inputs = hidden.device.type, compute_dtype(hidden), (hidden, weight, bias)
        h_all, w = hidden.to(dtype), weight.to(dtype)
        total = torch.zeros((), device=hidden.device)
        ctx.grads = [torch.zeros_like(x) if need else None for x, need in zip(inputs, ctx.needs_input_grad)]
        d_hidden, d_weight, d_bias = ctx.grads
        rows = min(len(targets), max(1, ProjectionLoss.CHUNK_LOGITS[device] // len(weight)))
        few = max(1, ProjectionLoss.CACHED_LOGITS // len(weight)) if device == "cpu" else rows
        product = hidden.new_empty(rows, len(weight), dtype=dtype)  # reused: allocating costs a CPU more than computing
        d_part = None if d_weight is None else torch.empty_like(w)
        for start in range(0, len(targets), max(1, rows)):
            h = h_all[start : start + rows]  # [N, D]
            chunk = torch.mm(h, w.T, out=product[: len(h)])  # [N, V]: logits, then their gradient
            for part, target in zip(chunk.split(few), targets[start : start + rows].split(few)):
                total += softmax(part, bias, target, any(ctx.needs_input_grad))
                if d_bias is not None:
                    d_bias += part.sum(0, dtype=torch.float32)
            if d_hidden is not None:
                d_hidden[start : start + rows] = chunk @ w
            if d_weight is not None:
                d_weight += torch.mm(chunk.T, h, out=d_part)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # [] -> [N, D], [V, D], [V], None, None
        """The gradients from the forward pass, scaled."""
        return *(None if g is None else g * grad for g in ctx.grads), None, None


def projection_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softmax: Callable = softmax_loss
) -> Tensor:
    """ProjectionLoss, without gradients under no_grad: the Function cannot see it, autograd is always off inside."""
    if not torch.is_grad_enabled():
        hidden, weight, bias = (None if x is None else x.detach() for x in (hidden, weight, bias))
    return ProjectionLoss.apply(hidden, weight, bias, targets, softmax)


def _init_weights(module: nn.Module) -> None:
    """Normal(0, 0.02) for matrices and embeddings, 0 for biases; LayerNorm keeps torch's ones and zeros.

    AlexaTM 20B: 0.02 everywhere. Here keys, values and outputs of attention have 2 / sqrt(D). Attention begins as an
    average over the row, which shrinks what it carries by the square root of the row's length: at 0.02 a small model
    needs hundreds of updates to notice its context at all.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, Attention):  # after its Linears: `apply` goes from the leaves up
        for linear in (module.kv, module.out):
            nn.init.normal_(linear.weight, std=2 / linear.in_features**0.5)


class MaskedLM(nn.Module):
    """Encoder and masked-LM head: dense, GELU, LayerNorm, then a projection tied to the embedding, plus a bias."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, self.softmax_loss = cfg, softmax_loss
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.encoder = Encoder(cfg)
        self.head = nn.Sequential(nn.Linear(cfg.d_model, cfg.d_model), nn.GELU(), nn.LayerNorm(cfg.d_model))
        self.head_bias = nn.Parameter(torch.zeros(cfg.vocab_size))
        self.apply(_init_weights)

    def encode(self, src: Tensor, src_mask: Tensor | None = None) -> Tensor:  # [B, S] -> [B, S, D]
        """Contextual vectors of tokens; src_mask [B, S] is True at real tokens, None where all are."""
        return self.encoder(self.embed(src), src_mask)

    def logits(self, src: Tensor, src_mask: Tensor | None = None) -> Tensor:  # [B, S] -> [B, S, V]
        """Scores of every piece at each position, for a look at the model. Training never holds them."""
        return F.linear(self.head(self.encode(src, src_mask)), self.embed.weight, self.head_bias)

    def forward(
        self, src: Tensor, labels: Tensor, src_mask: Tensor | None = None, labelled: Tensor | None = None
    ) -> Tensor:
        """Sum of the losses in nats over the labelled positions of src [B, S]; labels [B, S] are IGNORE elsewhere.

        The last feed-forward layer, the head and the projection run on the labelled positions only. Whoever knows them
        gives them, [N] of the flattened batch: to count them here, Python would wait for a GPU.
        """
        labels = labels.flatten()  # [B * S]
        labelled = (labels != IGNORE).nonzero().squeeze(1) if labelled is None else labelled
        hidden = self.head(self.encoder(self.embed(src), src_mask, selected=labelled))  # [N, D]
        return projection_loss(hidden, self.embed.weight, self.head_bias, labels[labelled], self.softmax_loss)


class Seq2Seq(nn.Module):
    """Encoder and decoder around one embedding, which is also the output projection."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if cfg.n_decoder_layers < 1:
            raise ValueError(f"n_decoder_layers is {cfg.n_decoder_layers}: a seq2seq model needs at least 1")
        self.cfg, self.softmax_loss = cfg, softmax_loss
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.encoder = Encoder(cfg)
        self.fusion = Fusion(cfg) if cfg.fusion else None
        self.decoder = Decoder(cfg)
        self.apply(_init_weights)

    def encode(self, src: Tensor, src_mask: Tensor | None = None) -> Tensor:  # [B, S] -> [B, S, D]
        """What the decoder attends to: the last layer's output, or the fusion of all layers."""
        return self.encoder(self.embed(src), src_mask, self.fusion)

    def decode(
        self, tgt_in: Tensor, enc_out: Tensor, src_mask: Tensor | None = None, cache: list | None = None
    ) -> Tensor:  # [B, T], [B, S, D] -> [B, T, D]
        """A vector for each next token. With a cache, tgt_in [B, T] are the newest tokens only."""
        return self.decoder(self.embed(tgt_in), enc_out, src_mask, cache)

    def logits(self, src: Tensor, tgt_in: Tensor, src_mask: Tensor | None = None) -> Tensor:  # -> [B, T, V]
        """Scores of every piece as each next token: for comparisons. Training never holds them."""
        return F.linear(self.decode(tgt_in, self.encode(src, src_mask), src_mask), self.embed.weight)

    def forward(self, src: Tensor, tgt_in: Tensor, tgt_out: Tensor, src_mask: Tensor | None = None) -> Tensor:
        """Sum of the losses in nats over the real positions of tgt_out [B, T], for src [B, S] and tgt_in [B, T]."""
        hidden = self.decode(tgt_in, self.encode(src, src_mask), src_mask)  # [B, T, D]
        return projection_loss(hidden.flatten(0, 1), self.embed.weight, None, tgt_out.flatten(), self.softmax_loss)
