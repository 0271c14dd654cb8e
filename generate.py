"""Generates target tokens from a seq2seq model: greedy and beam search. Shapes as in model.py."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import KeyValues, Seq2Seq
from tokenizer import SpecialIds

BOS, EOS, PAD = SpecialIds.bos, SpecialIds.eos, SpecialIds.pad


@torch.no_grad()
def generate(
    model: Seq2Seq,
    src: Tensor,
    src_mask: Tensor | None = None,
    *,
    max_new: int = 0,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> Tensor:
    """Target tokens for sources [B, S]: [B, T] with T <= max_new, each row up to its </s> and then padding.

    One beam takes the likeliest token each time; more are beam search, which returns the finished hypothesis with the
    largest sum of log-probabilities / length ** length_penalty (Wu et al. 2016, equation 14, without constants). Like
    that of transformers, it stops when no unfinished one would win if it ended there.
    max_new is at most the model's max_len. Its default leaves room: a clean row is a fifth longer than its source.
    """
    enc_out = model.encode(src, src_mask)  # [B, S, D]
    cache = [(KeyValues(), KeyValues()) for _ in model.decoder.blocks]
    max_new = min(max_new or 2 * src.shape[1] + 10, model.cfg.max_len)
    if beams > 1:
        enc_out = enc_out.repeat_interleave(beams, 0)  # [B * beams, S, D]
        src_mask = None if src_mask is None else src_mask.repeat_interleave(beams, 0)

    def next_logits(tokens: Tensor) -> Tensor:  # [N, T] -> [N, V]
        hidden = model.decode(tokens[:, -1:], enc_out, src_mask, cache)[:, -1]
        return (model.embed.weight @ hidden.T).T.float()  # in this order a CPU is faster with few rows

    tokens = torch.full((len(enc_out), 1), BOS, device=src.device)
    if beams > 1:
        return _beam_search(next_logits, tokens, cache, beams, max_new, length_penalty)
    done = torch.zeros(len(src), dtype=torch.bool, device=src.device)
    for _ in range(max_new):
        token = next_logits(tokens).argmax(-1).masked_fill(done, PAD)  # [B]
        tokens = torch.cat([tokens, token[:, None]], 1)
        done |= token == EOS
        if done.all():
            break
    return tokens[:, 1:]


def _beam_search(
    next_logits: Callable[[Tensor], Tensor], tokens: Tensor, cache: list, k: int, max_new: int, length_penalty: float
) -> Tensor:  # [B * k, 1] -> [B, T]
    """Keeps the k best unfinished and the k best finished hypotheses of each source."""
    n = len(tokens) // k  # sources, B
    score = torch.full((n, k), -torch.inf, device=tokens.device)
    score[:, 0] = 0.0  # at first all k hypotheses are the same
    best = torch.full((n, k, max_new + 1), PAD, device=tokens.device)
    best_score = torch.full((n, k), -torch.inf, device=tokens.device)
    done = torch.zeros(n, dtype=torch.bool, device=tokens.device)

    def finish(sequences: Tensor, scores: Tensor) -> None:  # [B, m, T], [B, m]
        sequences = F.pad(sequences, (0, max_new + 1 - sequences.shape[2]), value=PAD)
        top, index = torch.cat([best_score, scores], 1).topk(k)  # [B, k]
        best_score.copy_(top)
        best.copy_(torch.cat([best, sequences], 1).gather(1, index[:, :, None].expand_as(best)))

    for length in range(1, max_new + 1):
        log_probs = next_logits(tokens).log_softmax(-1)  # [B * k, V]
        vocab = log_probs.shape[1]
        # At most k of the 2k candidates end here, so k unfinished ones remain.
        top, index = (score.view(-1, 1) + log_probs).view(n, -1).topk(2 * k)  # [B, 2k]
        beam, token = index // vocab, index % vocab
        before = tokens.view(n, k, -1).gather(1, beam[:, :, None].expand(-1, -1, tokens.shape[1]))
        candidates = torch.cat([before, token[:, :, None]], 2)  # [B, 2k, T]
        ends = token == EOS
        ended = ends & (torch.arange(2 * k, device=index.device) < k) & ~done[:, None]
        finish(candidates, torch.where(ended, top / length**length_penalty, -torch.inf))
        score, keep = top.masked_fill(ends, -torch.inf).topk(k)  # [B, k]
        tokens = candidates.gather(1, keep[:, :, None].expand(-1, -1, candidates.shape[2])).flatten(0, 1)
        rows = (beam.gather(1, keep) + k * torch.arange(n, device=index.device)[:, None]).flatten()  # [B * k]
        for past, _ in cache:  # all beams share their source's keys and values
            past.keys, past.values = past.keys.index_select(0, rows), past.values.index_select(0, rows)
        done |= score[:, 0] / length**length_penalty <= best_score[:, -1]  # none would win if it ended
        if done.all():
            break
    unfinished = torch.where(done[:, None], -torch.inf, score / max_new**length_penalty)
    finish(tokens.view(n, k, -1), unfinished)
    best = best[:, 0, 1:]  # [B, max_new]
    return best[:, : 1 + max((best != PAD).any(0).nonzero().flatten().tolist(), default=0)]
