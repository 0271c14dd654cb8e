"""Pre-training objectives as pure NumPy functions of (tokens, rng): masked language modelling and span de-noising.

`sample_rng` makes the generator's state a function of (seed, stream, sample index): nothing has to be stored to resume,
and machine, rank and worker do not matter. Only raw doubles are drawn: NumPy keeps that stream fixed between versions.
Sources: Devlin et al. 2019 (MLM), Lewis et al. 2020 (de-noising, BART), Soltan et al. 2022 (AlexaTM 20B, by the
paper's team: dropped spans), Raffel et al. 2020 (sentinels, T5).
"""

from functools import lru_cache
from math import lgamma, log, sqrt

import numpy as np
from numpy import ndarray
from numpy.random import Generator, Philox

from cli import InputError, OneProcessError
from tokenizer import SpecialIds

IGNORE = -100  # label of a position that carries no loss
ORDER, NOISE, VALID_NOISE = range(3)  # streams: no two uses of a seed share random numbers


def sample_rng(seed: int, stream: int, index: int) -> Generator:
    """The random numbers of sample `index` of a stream; those of distinct keys never overlap. All three are in
    0 ... 2**64 - 1. A counter-based generator: Philox, Salmon et al. 2011.
    """
    key, counter = np.array([seed, stream], np.uint64), np.array([0, 0, 0, index], np.uint64)
    return Generator(Philox(key=key, counter=counter))


def mask_tokens(tokens: ndarray, rng: Generator, ids: SpecialIds, mask_prob: float = 0.15) -> tuple[ndarray, ndarray]:
    """MLM (Devlin et al. 2019, 3.1): tokens [L] -> (inputs [L], labels [L]); labels are IGNORE where nothing is asked.

    Exactly round(L * mask_prob) positions are chosen, but never special tokens; if there are fewer ordinary tokens, all
    of them. Of the chosen, 80 % become <mask>, 10 % a random ordinary token, 10 % stay, by one uniform draw each.

    With mask id 4 and ordinary ids from 106, [106 107 108 109 110 2] at 40 % may give
    inputs [106 4 108 109 110 2] and labels [-100 107 -100 -100 110 -100]: 107 was masked, 110 was chosen and stays.
    """
    candidates = np.flatnonzero(tokens >= ids.ordinary)
    chosen = candidates[_choose(len(candidates), min(len(candidates), round(len(tokens) * mask_prob)), rng)]
    fate, replacement = rng.random((2, len(chosen)))
    random_ids = ids.ordinary + (replacement * (ids.vocab_size - ids.ordinary)).astype(tokens.dtype)
    inputs, labels = tokens.copy(), np.full(len(tokens), IGNORE, np.int64)
    labels[chosen] = tokens[chosen]
    inputs[chosen] = np.where(fate < 0.8, ids.mask, np.where(fate < 0.9, random_ids, tokens[chosen]))
    return inputs, labels


def sample_spans(
    length: int, density: float, mean_span: float, rng: Generator, most: int = 1 << 62
) -> tuple[ndarray, ndarray]:
    """Disjoint spans of 0..length-1, in order: (starts [n], lengths [n]) with sum(lengths) == round(length * density).

    Span lengths are Poisson(mean_span) without 0; the last one drawn is cut to meet the budget. At least one token
    separates two spans: if more are drawn than `most`, or than the other tokens can separate, neighbours are joined.
    Spans and single tokens lie on a circle in random order, and the circle is cut at random, so that every position is
    equally likely to be noise; a span across the cut becomes two.

    sample_spans(6, 0.5, 3.0, rng) may give starts [1 5] and lengths [2 1].
    """
    budget = round(length * density)
    if budget in (0, length):  # nothing, or everything
        return np.zeros(int(budget > 0), np.int64), np.full(int(budget > 0), length)
    lengths = 1 + np.searchsorted(_span_cdf(mean_span), rng.random(budget))
    total = lengths.cumsum()
    lengths = lengths[: np.searchsorted(total, budget) + 1]
    lengths[-1] -= total[len(lengths) - 1] - budget
    lengths = lengths[_choose(len(lengths), len(lengths), rng)]
    single = length - budget
    if len(lengths) > (most := min(most, single)):
        lengths = np.add.reduceat(lengths, np.arange(most) * len(lengths) // most)
    # Each span is followed by a single token: choose which single tokens follow a span.
    starts = np.sort(_choose(single, len(lengths), rng)) + lengths.cumsum() - lengths
    starts = (starts + int(rng.random() * length)) % length
    over = starts + lengths - length  # positive for the span that the circle is cut in
    if over.max() > 0:
        cut = int(over.argmax())
        starts, lengths = np.append(starts, 0), np.append(lengths, over[cut])
        lengths[cut] -= over[cut]
    order = starts.argsort()
    return starts[order], lengths[order]


def drop_spans(tokens: ndarray, starts: ndarray, lengths: ndarray) -> ndarray:
    """The tokens [L] without the spans, which leave no trace (AlexaTM 20B, section 2).

    Spans at [1 5] of lengths [2 1] turn [106 107 108 109 110 111] into [106 109 110].
    """
    return tokens[~_inside(len(tokens), starts, lengths)]


def mask_spans(tokens: ndarray, starts: ndarray, lengths: ndarray, ids: SpecialIds) -> ndarray:
    """Each span becomes one <mask> (text infilling, Lewis et al. 2020, 2.2).

    Spans at [1 5] of lengths [2 1] turn [106 107 108 109 110 111] into [106 4 109 110 4].
    """
    before = lengths.cumsum() - lengths  # tokens of earlier spans, which are gone
    return np.insert(drop_spans(tokens, starts, lengths), starts - before, ids.mask)


def sentinel_spans(tokens: ndarray, starts: ndarray, lengths: ndarray, ids: SpecialIds) -> tuple[ndarray, ndarray]:
    """Span corruption (Raffel et al. 2020, 3.1.4): (source, target); the k-th span becomes <extra_id_k> in the source.

    The target is each sentinel followed by its span, and a last sentinel. With <extra_id_0> at 6, spans at [1 5] of
    lengths [2 1] turn [106 107 108 109 110 111] into [106 6 109 110 7] and [6 107 108 7 111 8].
    Raises OneProcessError when there are not enough sentinels.
    """
    if len(starts) >= ids.n_sentinels:
        lack = f"{len(starts)} spans in a row need {len(starts) + 1} sentinels, there are {ids.n_sentinels}"
        raise OneProcessError(f"{lack}: use shorter rows, a lower density or longer spans")
    sentinels, before = ids.sentinel + np.arange(len(starts)), lengths.cumsum() - lengths
    source = np.insert(drop_spans(tokens, starts, lengths), starts - before, sentinels)
    target = np.insert(tokens[_inside(len(tokens), starts, lengths)], before, sentinels)
    return source, np.append(target, ids.sentinel + len(starts)).astype(tokens.dtype)


def noise_row(
    tokens: ndarray, rng: Generator, ids: SpecialIds, noise: str = "drop", density: float = 0.15, mean_span: float = 3.0
) -> tuple[ndarray, ndarray]:
    """De-noising example of a row [L]: (source, target). The target is the whole clean row, or the spans (sentinel).

    Exactly round(L * density) tokens are noise, never special ones: spans are sampled over the ordinary tokens, and a
    span across a document's end is split there. With sentinels, neighbouring spans are joined if there are too few
    sentinels, or if the target would be longer than the row. Raises OneProcessError for a row with too few ordinary
    tokens, with too many special ones for its sentinels, or whose target is longer all the same.
    """
    ordinary = np.flatnonzero(tokens >= ids.ordinary)
    budget = round(len(tokens) * density)
    if budget >= len(ordinary):
        lack = f"{budget} of {len(tokens)} tokens should be noise, the row has {len(ordinary)} ordinary ones"
        raise OneProcessError(f"{lack}: lower the density")
    most = 1 << 62
    if noise == "sentinel":  # the cut of the circle and each special token may add a span
        special = len(tokens) - len(ordinary)
        most = max(1, min(ids.n_sentinels, len(tokens) - budget) - special - 2)
    spans = sample_spans(len(ordinary), budget / len(ordinary), mean_span, rng, most)
    noisy = ordinary[_inside(len(ordinary), *spans)]
    first = np.flatnonzero(np.diff(noisy, prepend=-2) > 1)  # a span starts where the position before it is not noisy
    starts, lengths = noisy[first], np.diff(first, append=len(noisy))
    if noise == "drop":
        return drop_spans(tokens, starts, lengths), tokens
    if noise == "mask":
        return mask_spans(tokens, starts, lengths, ids), tokens
    if noise == "sentinel":
        source, target = sentinel_spans(tokens, starts, lengths, ids)
        if len(target) > len(tokens):
            raise OneProcessError(f"{len(target)} tokens to generate for a row of {len(tokens)}: lower the density")
        return source, target
    raise InputError(f"noise is {noise!r}: it must be drop, mask or sentinel")


def clm_row(tokens: ndarray, rng: Generator, ids: SpecialIds) -> tuple[ndarray, ndarray]:
    """Continuing a text (Soltan et al. 2022, causal language modelling): a row [L] -> (source, target).

    The source is [CLM] and the first 20 to 80 % of the row, each length equally likely; the target is the rest.
    With [CLM] at 5, [106 107 108 109 110 111] cut at 2 gives [5 106 107] and [108 109 110 111].
    """
    least, most = -(-len(tokens) // 5), len(tokens) * 4 // 5
    cut = least + int(rng.random() * (most - least + 1))
    return np.concatenate([[ids.clm], tokens[:cut]]).astype(tokens.dtype), tokens[cut:]


def _choose(n: int, k: int, rng: Generator) -> ndarray:
    """k of the numbers 0..n-1 in random order."""
    return rng.random(n).argsort(kind="stable")[:k]


@lru_cache
def _span_cdf(mean: float) -> ndarray:
    """P(length <= 1 + i) for a Poisson length that is not 0, as far as double precision can tell it from 1."""
    k = np.arange(1, int(mean + 12 * sqrt(mean) + 30))
    pmf = np.exp(k * log(mean) - mean - np.array([lgamma(i + 1) for i in k]))
    cdf = pmf.cumsum() / pmf.sum()
    cdf[-1] = 1.0  # despite rounding, so that the search always finds a length
    return cdf


def _inside(length: int, starts: ndarray, lengths: ndarray) -> ndarray:
    """True at the positions that lie in a span."""
    position = np.arange(length)
    return np.searchsorted(starts, position, "right") > np.searchsorted(starts + lengths, position, "right")
