import math
import subprocess
import sys
from math import exp, lgamma, sqrt

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import assume, given
from hypothesis import strategies as st

from objectives import (
    IGNORE,
    NOISE,
    ORDER,
    clm_row,
    drop_spans,
    mask_spans,
    mask_tokens,
    noise_row,
    sample_rng,
    sample_spans,
    sentinel_spans,
)
from tokenizer import SpecialIds

IDS = SpecialIds(1000)
SIX = np.arange(106, 112)
seeds, lengths, densities = st.integers(0, 2**64 - 1), st.integers(1, 2048), st.floats(0, 1, exclude_max=True)


def row_of(length: int, rng: np.random.Generator) -> np.ndarray:
    """A row of ordinary tokens with a document end here and there."""
    tokens = IDS.ordinary + (rng.random(length) * (IDS.vocab_size - IDS.ordinary)).astype(np.int64)
    tokens[rng.random(length) < 0.03] = IDS.eos
    return tokens


# The worked examples of the docstrings, verbatim.


def test_worked_example_of_mlm():
    tokens = np.array([106, 107, 108, 109, 110, 2])
    inputs, labels = mask_tokens(tokens, sample_rng(0, 1, 38), IDS, 0.4)
    assert inputs.tolist() == [106, 4, 108, 109, 110, 2]
    assert labels.tolist() == [-100, 107, -100, -100, 110, -100]


def test_worked_example_of_spans():
    starts, span_lengths = sample_spans(6, 0.5, 3.0, sample_rng(0, 1, 6))
    assert (starts.tolist(), span_lengths.tolist()) == ([1, 5], [2, 1])


def test_worked_example_of_drop():
    assert drop_spans(SIX, np.array([1, 5]), np.array([2, 1])).tolist() == [106, 109, 110]


def test_worked_example_of_mask():
    assert mask_spans(SIX, np.array([1, 5]), np.array([2, 1]), IDS).tolist() == [106, 4, 109, 110, 4]


def test_worked_example_of_sentinel():
    source, target = sentinel_spans(SIX, np.array([1, 5]), np.array([2, 1]), IDS)
    assert source.tolist() == [106, 6, 109, 110, 7]
    assert target.tolist() == [6, 107, 108, 7, 111, 8]


def test_worked_example_of_clm():
    seed = next(seed for seed in range(100) if len(clm_row(SIX, sample_rng(seed, NOISE, 0), IDS)[0]) == 3)
    source, target = clm_row(SIX, sample_rng(seed, NOISE, 0), IDS)
    assert source.tolist() == [5, 106, 107] and target.tolist() == [108, 109, 110, 111]


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 10, 128, 2048])
def test_clm_keeps_20_to_80_percent_as_source(length):
    tokens, cuts = row_of(length, sample_rng(0, ORDER, 0)), []
    for i in range(2000):
        source, target = clm_row(tokens, sample_rng(0, NOISE, i), IDS)
        assert source[0] == IDS.clm and [*source[1:], *target] == tokens.tolist() and len(target) > 0
        cuts.append(len(source) - 1)
    least, most = max(1, math.ceil(length * 0.2)), max(1, int(length * 0.8))
    assert min(cuts) >= least and max(cuts) <= most
    assert len(set(cuts)) > 0.6 * (most - least + 1)  # all lengths come
    assert abs(np.mean(cuts) - (least + most) / 2) < 5 * np.std(cuts) / 2000**0.5 + 1e-9


def t5_span_corruption(tokens: np.ndarray, noise: np.ndarray) -> tuple[list[int], list[int]]:
    """The definition in T5's public preprocessing: in the source each run of noise is one sentinel, in the target each
    run of the rest is one; sentinels count up on either side. There a row never begins with noise."""

    def sentinel_for_each_run(mask: np.ndarray) -> list[int]:
        out, n, before = [], 0, False
        for token, inside in zip(tokens.tolist(), mask.tolist()):
            if not inside:
                out.append(token)
            elif not before:
                out.append(IDS.sentinel + n)
                n += 1
            before = inside
        return out

    return sentinel_for_each_run(noise), sentinel_for_each_run(~noise)


@given(st.integers(2, 500), st.floats(0.05, 0.6), seeds)
def test_sentinels_are_those_of_t5(length, density, seed):
    """The same source; the same target, which we always close with a sentinel, T5 only where the row ends in text."""
    tokens = IDS.ordinary + np.arange(length)
    starts, span_lengths = sample_spans(length, density, 3.0, sample_rng(seed, NOISE, 0))
    noise = np.zeros(length, bool)
    for start, n in zip(starts, span_lengths):
        noise[start : start + n] = True
    if noise[0] or len(starts) >= IDS.n_sentinels:
        return
    source, target = sentinel_spans(tokens, starts, span_lengths, IDS)
    t5_source, t5_target = t5_span_corruption(tokens, noise)
    closing = [IDS.sentinel + len(starts)] if noise[-1] else []
    assert source.tolist() == t5_source and target.tolist() == t5_target + closing


def test_sentinels_of_the_figure_in_the_t5_paper():
    """Raffel et al. 2020, figure 2: ten words, of which 2 and 3 and then 8 are corrupted: "X for inviting Y last Z"."""
    words = 200 + np.arange(10)
    source, target = sentinel_spans(words, np.array([2, 8]), np.array([2, 1]), IDS)
    x, y, z = 6, 7, 8
    assert source.tolist() == [200, 201, x, 204, 205, 206, 207, y, 209]
    assert target.tolist() == [x, 202, 203, y, 208, z]


def test_no_spans_change_nothing():
    none = np.zeros(0, np.int64)
    assert drop_spans(SIX, none, none).tolist() == mask_spans(SIX, none, none, IDS).tolist() == SIX.tolist()
    source, target = sentinel_spans(SIX, none, none, IDS)
    assert source.tolist() == SIX.tolist() and target.tolist() == [6]


# Properties, for every length, density and seed.


@given(lengths, densities, seeds)
def test_mlm_masks_an_exact_number_of_ordinary_tokens(length, prob, seed):
    tokens = row_of(length, sample_rng(seed, ORDER, 0))
    before = tokens.copy()
    inputs, labels = mask_tokens(tokens, sample_rng(seed, NOISE, 0), IDS, prob)
    asked = labels != IGNORE
    ordinary = tokens >= IDS.ordinary
    assert asked.sum() == min(round(length * prob), ordinary.sum())
    assert (labels[asked] == tokens[asked]).all() and not asked[~ordinary].any()
    assert (inputs[~asked] == tokens[~asked]).all()
    changed = inputs[inputs != tokens]
    assert ((changed == IDS.mask) | ((changed >= IDS.ordinary) & (changed < IDS.vocab_size))).all()
    assert (tokens == before).all()


@given(lengths, densities, st.floats(0.1, 1000), seeds)
def test_spans_meet_their_budget_and_are_apart(length, density, mean_span, seed):
    starts, span_lengths = sample_spans(length, density, mean_span, sample_rng(seed, NOISE, 0))
    assert span_lengths.sum() == round(length * density)
    assert (span_lengths > 0).all()
    ends = starts + span_lengths
    assert (starts[1:] > ends[:-1]).all()
    assert len(starts) == 0 or (starts[0] >= 0 and ends[-1] <= length)


@given(lengths, densities, seeds)
def test_noise_of_a_row(length, density, seed):
    tokens = row_of(length, sample_rng(seed, ORDER, 0))
    budget, ordinary = round(length * density), (tokens >= IDS.ordinary).sum()
    if budget >= ordinary:
        with pytest.raises(ValueError, match="lower the density"):
            noise_row(tokens, sample_rng(seed, NOISE, 0), IDS, "drop", density)
        return
    dropped, clean = noise_row(tokens, sample_rng(seed, NOISE, 0), IDS, "drop", density)
    assert len(dropped) == length - budget and (clean == tokens).all()
    masked, clean = noise_row(tokens, sample_rng(seed, NOISE, 0), IDS, "mask", density)
    assert (masked[masked != IDS.mask] == dropped).all() and (clean == tokens).all()
    assert (dropped == IDS.eos).sum() == (tokens == IDS.eos).sum()  # no document end is lost
    assert ((masked == IDS.mask).sum() > 0) == (budget > 0)


def test_a_target_longer_than_its_row_is_refused():
    with pytest.raises(ValueError, match="18 tokens to generate for a row of 16: lower the density"):
        noise_row(np.full(16, 200), sample_rng(0, NOISE, 0), IDS, "sentinel", 0.95)


@given(lengths, st.floats(0, 0.9), st.floats(0.1, 5), seeds)
def test_there_are_sentinels_for_any_row(length, density, mean_span, seed):
    """As many of its tokens are noise as in the other noises; the target is no longer than the row."""
    tokens = row_of(length, sample_rng(seed, ORDER, 0))
    budget, special = round(length * density), (tokens == IDS.eos).sum()
    assume(special <= 90 and length - budget - special >= 3)
    source, target = noise_row(tokens, sample_rng(seed, NOISE, 0), IDS, "sentinel", density, mean_span)
    assert put_back(source, target).tolist() == tokens.tolist()
    assert (target >= IDS.ordinary).sum() == budget and len(target) <= length
    masked, _ = noise_row(tokens, sample_rng(seed, NOISE, 0), IDS, "mask", density, mean_span)
    if (masked == IDS.mask).sum() <= min(IDS.n_sentinels, length - budget) - special - 2:  # none to join
        assert (np.where((source >= 6) & (source < 106), IDS.mask, source) == masked).all()


def test_more_special_tokens_than_sentinels_are_refused():
    tokens = np.where(np.arange(1024) % 8, 200, IDS.eos)
    with pytest.raises(ValueError, match="sentinels"):
        noise_row(tokens, sample_rng(0, NOISE, 0), IDS, "sentinel", 0.8)


def put_back(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The row that a sentinel example was made from: each sentinel replaced by what follows it in the target."""
    out = []
    for token in source:
        if IDS.sentinel <= token < IDS.ordinary:
            at = int(np.flatnonzero(target == token)[0]) + 1
            while target[at] >= IDS.ordinary:
                out.append(target[at])
                at += 1
        else:
            out.append(token)
    return np.array(out)


def test_another_noise_is_refused():
    with pytest.raises(ValueError, match="drop, mask or sentinel"):
        noise_row(SIX, sample_rng(0, NOISE, 0), IDS, "shuffle")


# Statistics. Bounds are five standard deviations of a correct implementation.


def chi_square(seen: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic in standard deviations from its mean, over bins that expect at least 5."""
    enough = expected >= 5
    seen, expected = np.append(seen[enough], seen[~enough].sum()), np.append(expected[enough], expected[~enough].sum())
    seen, expected = seen[expected > 0], expected[expected > 0]
    dof = len(seen) - 1
    return float((((seen - expected) ** 2 / expected).sum() - dof) / sqrt(2 * dof))


def test_eighty_ten_ten():
    """A million chosen positions; a random replacement may be the token itself, and each ordinary id is as likely."""
    tokens, fates, replaced = np.full(2048, 500), np.zeros(3), np.zeros(IDS.vocab_size)
    n_ordinary = IDS.vocab_size - IDS.ordinary
    for i in range(1000):
        inputs, labels = mask_tokens(tokens, sample_rng(0, NOISE, i), IDS, 0.49)
        inputs = inputs[labels != IGNORE]
        fates += [(inputs == IDS.mask).sum(), ((inputs != IDS.mask) & (inputs != 500)).sum(), (inputs == 500).sum()]
        replaced += np.bincount(inputs, minlength=IDS.vocab_size)
    assert fates.sum() == 1000 * round(2048 * 0.49) > 1e6
    same = 0.1 / n_ordinary
    assert abs(chi_square(fates, fates.sum() * np.array([0.8, 0.1 - same, 0.1 + same]))) < 5
    replaced[[IDS.mask, 500]] = 0
    expected = np.zeros(IDS.vocab_size)
    expected[IDS.ordinary :] = fates[1] / (n_ordinary - 1)
    expected[500] = 0
    assert replaced[: IDS.ordinary].sum() == 0 and abs(chi_square(replaced[106:], expected[106:])) < 5


@pytest.mark.parametrize("what", ["mlm", "spans"])
def test_every_position_is_as_likely(what):
    counts = np.zeros(40)
    for i in range(20_000):
        rng = sample_rng(0, NOISE, i)
        if what == "mlm":
            counts += mask_tokens(np.full(40, 500), rng, IDS, 0.15)[1] != IGNORE
        else:
            for start, length in zip(*sample_spans(40, 0.15, 3.0, rng)):
                counts[start : start + length] += 1
    assert counts.sum() == 20_000 * 6
    assert abs(counts / 20_000 - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 20_000)


@pytest.mark.parametrize("mean", [1.0, 3.0, 7.5])
def test_span_lengths_follow_the_poisson(mean):
    """Expected counts worked out exactly: lengths are drawn from a Poisson law without its 0 until the budget is met,
    the last is cut to it, and the cut of the circle falls between any two neighbouring positions alike."""
    n_rows, length, top = 400, 2048, 60
    budget = round(length * 0.15)
    k = np.arange(1, top)
    p = np.append(0, np.exp(-mean + k * np.log(mean) - np.array([lgamma(i + 1) for i in k])) / (1 - exp(-mean)))
    hit = np.zeros(budget + 1)  # P(the lengths drawn so far sum to b)
    hit[0] = 1
    for b in range(1, budget + 1):
        hit[b] = sum(hit[b - j] * p[j] for j in range(1, min(b, top - 1) + 1))
    drawn = np.array([p[j] * hit[: budget - j + 1].sum() + hit[budget - j] * p[j + 1 :].sum() for j in range(top)])
    drawn[0] = 0
    parted = np.array([2 * drawn[j + 1 :].sum() / length - drawn[j] * (j - 1) / length for j in range(1, top)])
    seen = np.zeros(top)
    for i in range(n_rows):
        seen += np.bincount(sample_spans(length, 0.15, mean, sample_rng(0, NOISE, i))[1], minlength=top)
    assert chi_square(seen[1:], n_rows * (drawn[1:] + parted)) < 4


@pytest.mark.slow
def test_different_keys_give_different_rows():
    tokens = IDS.ordinary + np.arange(256)
    rows = {noise_row(tokens, sample_rng(0, NOISE, i), IDS, "mask")[0].tobytes() for i in range(30_000)}
    rows |= {noise_row(tokens, sample_rng(1, NOISE, i), IDS, "mask")[0].tobytes() for i in range(30_000)}
    assert len(rows) == 60_000


def test_keys_give_distinct_and_repeatable_numbers():
    draws = {tuple(sample_rng(seed, s, i).random(2)) for seed in (0, 7) for s in (ORDER, NOISE) for i in range(20_000)}
    assert len(draws) == 80_000
    line = "import objectives; print(objectives.sample_rng(3, 1, 2**63).random(3).tolist())"
    other = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(sample_rng(3, 1, 2**63).random(3).tolist())


def test_a_row_is_what_it_was():
    """The noise of a key, literally: a change here would change every run that anybody resumes."""
    source, _ = noise_row(np.arange(106, 138), sample_rng(1, NOISE, 2), IDS, "mask")
    assert source.tolist() == [*range(106, 112), IDS.mask, *range(117, 138)]
    inputs, _ = mask_tokens(np.arange(106, 126), sample_rng(1, NOISE, 2), IDS)
    assert inputs.tolist() == [*range(106, 117), 4, 118, 4, *range(120, 125), 4]
