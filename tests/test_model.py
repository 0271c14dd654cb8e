import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from config import PRESETS
from generate import generate
from model import (
    IGNORE,
    Fusion,
    KeyValues,
    MaskedLM,
    ModelConfig,
    ProjectionLoss,
    Seq2Seq,
    plain_attention,
    rotary_table,
    rotate,
)

SMALL = dict(vocab_size=120, d_model=32, n_heads=4, d_ff=64, n_encoder_layers=2, max_len=24)
BOS, EOS, PAD = 1, 2, 0
POSITIONS = ["rotary", "learned"]


def seq2seq(**changes) -> Seq2Seq:
    """A model whose weights are large enough that its predictions differ from each other."""
    torch.manual_seed(0)
    model = Seq2Seq(ModelConfig(**{**SMALL, "n_decoder_layers": 2, **changes})).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def masked_lm() -> MaskedLM:
    torch.manual_seed(0)
    model = MaskedLM(ModelConfig(**SMALL)).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


@settings(max_examples=50)
@given(
    st.integers(1, 40), st.integers(2, 60), st.integers(1, 50), st.integers(1, 9), st.booleans(), st.integers(0, 2**31)
)
def test_chunked_loss_equals_the_plain_one(n, vocab, rows, few, with_bias, seed):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    bias = torch.randn(vocab, requires_grad=True) if with_bias else None
    targets = torch.where(torch.rand(n) < 0.2, IGNORE, torch.randint(0, vocab, (n,)))
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    plain = F.cross_entropy(F.linear(hidden, weight, bias), targets, ignore_index=IGNORE, reduction="sum")
    expected = torch.autograd.grad(plain * 0.7, leaves)
    whole, cached = ProjectionLoss.CHUNK_LOGITS, ProjectionLoss.CACHED_LOGITS
    try:
        ProjectionLoss.CHUNK_LOGITS, ProjectionLoss.CACHED_LOGITS = {"cpu": rows * vocab}, few * vocab
        chunked = ProjectionLoss.apply(hidden, weight, bias, targets)
        seen = torch.autograd.grad(chunked * 0.7, leaves)
    finally:
        ProjectionLoss.CHUNK_LOGITS, ProjectionLoss.CACHED_LOGITS = whole, cached
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)
    for a, b in zip(seen, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_chunked_loss_never_holds_all_logits():
    """The largest tensor made is a chunk: seen by watching every operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    hidden, weight = torch.randn(3000, 4, requires_grad=True), torch.randn(10_000, 4, requires_grad=True)
    with Watch():
        ProjectionLoss.apply(hidden, weight, None, torch.zeros(3000, dtype=torch.long)).backward()
    assert largest <= ProjectionLoss.CHUNK_LOGITS["cpu"] < 3000 * 10_000


def test_without_autograd_no_gradient_is_computed():
    model = seq2seq()
    batch = [torch.randint(6, 120, (4, 20)) for _ in range(3)]
    flops = []
    for autograd in (True, False):
        with torch.set_grad_enabled(autograd), FlopCounterMode(display=False) as counter:
            model(*batch)
        flops.append(counter.get_total_flops())
    assert flops[0] - flops[1] == 2 * 2 * 4 * 20 * 120 * 32  # a product for the vectors, one for the embedding


def test_bf16_loss_is_close():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32, requires_grad=True), (0.1 * torch.randn(500, 32)).requires_grad_()
    targets = torch.randint(0, 500, (64,))
    exact = ProjectionLoss.apply(hidden, weight, None, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ProjectionLoss.apply(hidden, weight, None, targets)
    assert abs(rounded / exact - 1) < 1e-3
    a, b = (torch.autograd.grad(x, weight)[0] for x in (exact, rounded))
    assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("masked, causal", [(False, False), (True, False), (False, True)])
def test_plain_attention_is_torchs(masked, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 16, requires_grad=True) for n in (7, 7 if causal else 9, 7 if causal else 9))
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None])[:, None, None] if masked else None
    ours = plain_attention(q, k, v, mask, causal)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_attention_in_bf16_is_close_to_that_in_fp32(monkeypatch):
    """On a CPU bf16 takes the one written out; its losses and gradients are those of fp32 to the rounding of bf16."""
    calls = []
    monkeypatch.setattr("model.plain_attention", lambda *a, **k: calls.append(1) or plain_attention(*a, **k))
    torch.manual_seed(0)
    model, src, tgt = seq2seq(), torch.randint(6, 120, (4, 10)), torch.randint(6, 120, (4, 12))
    mask = torch.arange(10) < torch.tensor([10, 7, 3, 1])[:, None]
    exact = model(src, tgt, tgt, mask)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(src, tgt, tgt, mask)
    assert calls and abs(rounded / exact - 1) < 5e-3
    a, b = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x, list(model.parameters()))]) for x in (exact, rounded)
    )
    assert F.cosine_similarity(a, b, dim=0) > 0.999


def exact_attention(q, k, v, attn_mask, is_causal):
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask, is_causal=is_causal)


class ExactLoss:
    @staticmethod
    def apply(hidden, weight, bias, targets, softmax):
        with torch.autocast("cpu", enabled=False):
            return F.cross_entropy(F.linear(hidden.float(), weight, bias), targets, reduction="sum")


@pytest.mark.parametrize("name, exact", [("plain_attention", exact_attention), ("ProjectionLoss", ExactLoss)])
def test_bf16_trains_as_with_that_part_in_fp32(monkeypatch, name, exact):
    """The loss curve of a small model is the same with our attention, or our loss, in bf16 and torch's in fp32."""
    monkeypatch.setattr(ProjectionLoss, "CHUNK_LOGITS", {"cpu": 40 * SMALL["vocab_size"]})
    monkeypatch.setattr(ProjectionLoss, "CACHED_LOGITS", 7 * SMALL["vocab_size"])

    def curve():
        torch.manual_seed(0)
        model, losses = seq2seq(), []
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        rows = torch.randint(6, 120, (8, 12))
        for _ in range(60):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(rows, rows, rows.roll(-1, 1)) / rows.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return torch.tensor(losses)

    ours = curve()
    monkeypatch.setattr(f"model.{name}", exact)
    theirs = curve()
    assert ours[-1] < 0.6 * ours[0]
    assert not torch.equal(ours, theirs) and (ours - theirs).abs().max() < 0.02 * ours[0]


def test_losses_are_those_of_the_logits():
    src = torch.randint(6, 120, (3, 10))
    labels = torch.where(torch.rand(3, 10) < 0.4, src, IGNORE)
    lm, model = masked_lm(), seq2seq()
    expected = F.cross_entropy(lm.logits(src).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(lm(src, labels), expected)
    tgt_in = torch.randint(6, 120, (3, 12))
    tgt_out = torch.where(torch.rand(3, 12) < 0.4, IGNORE, tgt_in)
    expected = F.cross_entropy(model.logits(src, tgt_in).flatten(0, 1), tgt_out.flatten(), reduction="sum")
    torch.testing.assert_close(model(src, tgt_in, tgt_out), expected)


def test_rotation_is_the_formula():
    """Su et al. 2021, equation 15, with heads of 4: position t turns units (0, 2) by t and units (1, 3) by t / 100."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 2, 1, 4)
    expected = [[1.0, 2.0, 3.0, 4.0], [-1.984111, 1.959901, 2.462378, 4.019799]]
    torch.testing.assert_close(rotate(x, rotary_table(2, 4, x.device)).squeeze(), torch.tensor(expected))
    t, i = 100, 5  # far out, in wide heads, against double precision
    x = torch.randn(1, 128, 1, 64)
    pair = complex(x[0, t, 0, i], x[0, t, 0, i + 32]) * complex(math.cos(a := t * 1e4 ** (-i / 32)), math.sin(a))
    turned = rotate(x, rotary_table(128, 64, x.device))[0, t, 0]
    assert (turned[i].item(), turned[i + 32].item()) == pytest.approx((pair.real, pair.imag), abs=1e-5)


def test_a_table_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        model = seq2seq(max_len=17)
        model.encode(src := torch.randint(6, 120, (1, 17)))
    model = seq2seq(max_len=17)
    model(src.clone(), src.clone(), src.clone()).backward()


def test_rotary_scores_depend_on_the_distance_alone():
    q, k, table = torch.randn(1, 8, 2, 16), torch.randn(1, 8, 2, 16), rotary_table(500, 16, torch.device("cpu"))
    here, far = (
        rotate(q, table[:, at : at + 8]).transpose(1, 2) @ rotate(k, table[:, at : at + 8]).permute(0, 2, 3, 1)
        for at in (0, 300)
    )
    torch.testing.assert_close(here, far, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_shifted_row_has_the_same_vectors_with_rotary_positions_alone(positions):
    model, src = seq2seq(positions=positions), torch.randint(6, 120, (1, 9))
    shifted = torch.cat([torch.randint(6, 120, (1, 5)), src], 1)
    before, after = model.encode(src), model.encode(shifted, torch.arange(14)[None] >= 5)[:, 5:]
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4) == (positions == "rotary")


@pytest.mark.parametrize("positions", POSITIONS)
def test_cross_attention_knows_where_a_source_vector_stands_with_rotary_positions_alone(positions):
    model, tgt_in = seq2seq(positions=positions), torch.randint(6, 120, (1, 7))
    enc_out = model.encode(torch.randint(6, 120, (1, 9)))
    same = torch.allclose(model.decode(tgt_in, enc_out), model.decode(tgt_in, enc_out.flip(1)), rtol=1e-4, atol=1e-4)
    assert same == (positions == "learned")


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_order_of_words_matters_and_rows_have_an_end(positions):
    model, src = seq2seq(positions=positions), torch.randint(6, 120, (1, 9))
    assert not torch.allclose(model.encode(src), model.encode(src.flip(1)).flip(1), atol=1e-2)
    with pytest.raises(ValueError, match="a row of 25 tokens: the model was made for rows of at most 24"):
        model.encode(torch.randint(6, 120, (1, 25)))


@pytest.mark.parametrize("positions", POSITIONS)
@settings(max_examples=20)
@given(st.integers(1, 10), st.integers(0, 10), st.integers(0, 1000))
def test_padding_changes_nothing(positions, length, padding, seed):
    torch.manual_seed(seed)
    src = torch.randint(6, 120, (1, length))
    padded = torch.cat([src, torch.randint(0, 120, (1, padding))], 1)  # whatever stands in the padding
    mask = (torch.arange(length + padding) < length)[None]
    model, tgt_in = seq2seq(positions=positions), torch.randint(6, 120, (1, 7))
    torch.testing.assert_close(model.encode(padded, mask)[:, :length], model.encode(src))
    torch.testing.assert_close(model.logits(padded, tgt_in, mask), model.logits(src, tgt_in))


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_decoder_does_not_look_ahead_and_the_encoder_does(positions):
    model, src, tgt_in = seq2seq(positions=positions), torch.randint(6, 120, (1, 9)), torch.randint(6, 120, (1, 9))
    before, changed = model.logits(src, tgt_in), tgt_in.clone()
    changed[0, 5] += 1
    after = model.logits(src, changed)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().amax(-1).min() > 1e-3
    other = src.clone()
    other[0, 8] = (other[0, 8] + 1) % 120
    assert (model.logits(other, tgt_in) - before).abs().amax(-1).min() > 1e-4  # cross-attention is there
    assert (model.encode(other) - model.encode(src)).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("n_decoder_layers, fusion", [(1, False), (3, False), (2, True)])
def test_the_cache_changes_no_vector(positions, n_decoder_layers, fusion):
    model = seq2seq(positions=positions, n_decoder_layers=n_decoder_layers, fusion=fusion)
    src, mask = torch.randint(6, 120, (4, 9)), torch.arange(9) < torch.tensor([9, 3, 6, 1])[:, None]
    tgt_in, enc_out = torch.randint(6, 120, (4, 12)), model.encode(src, mask)
    cache = [(KeyValues(), KeyValues()) for _ in model.decoder.blocks]
    one_by_one = [model.decode(token, enc_out, mask, cache) for token in tgt_in.split(1, 1)]
    torch.testing.assert_close(torch.cat(one_by_one, 1), model.decode(tgt_in, enc_out, mask))
    tokens = torch.full((4, 1), BOS)  # nor any token: greedy search without a cache
    for _ in range(12):
        best = (model.decode(tokens, enc_out, mask)[:, -1] @ model.embed.weight.T).argmax(-1)
        tokens = torch.cat([tokens, best.masked_fill((tokens == EOS).any(1), PAD)[:, None]], 1)
    assert torch.equal(generate(model, src, mask, max_new=12), tokens[:, 1:])


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_company_in_the_batch_changes_no_token(beams):
    model, lengths = seq2seq(), torch.tensor([9, 3, 6, 1])
    src, mask = torch.randint(6, 120, (4, 9)), torch.arange(9) < lengths[:, None]
    options = dict(max_new=20, beams=beams)
    for row, length, out in zip(src, lengths, generate(model, src, mask, **options)):
        alone = generate(model, row[None, :length], **options)[0]
        assert torch.equal(F.pad(alone, (0, len(out) - len(alone)), value=PAD), out)


def test_generation_ends_at_eos_and_pads():
    model = seq2seq()
    model.embed.weight.data[EOS] *= 3  # make the end likely
    out = generate(model, torch.randint(6, 120, (16, 9)), max_new=20)
    ended = 0
    for row in out.tolist():
        if EOS in row:
            ended += 1
            assert set(row[row.index(EOS) + 1 :]) <= {PAD}
    assert ended and len({row.index(EOS) for row in out.tolist() if EOS in row}) > 1


def test_a_model_that_writes_padding_alone():
    model = seq2seq()
    model.embed.weight.data[PAD] = 100 * model.decode(torch.tensor([[BOS]]), torch.zeros(1, 3, 32))[0, 0].detach()
    for beams in (1, 3):
        out = generate(model, torch.randint(6, 120, (2, 9)), max_new=5, beams=beams)
        assert out.shape[1] and (out == PAD).all()


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_sequences(length_penalty):
    """With as many beams as there are prefixes, beam search is exhaustive: compare with trying everything."""
    model = seq2seq(vocab_size=5, n_heads=2)
    src = torch.tensor([[3, 4, 3], [4, 4, 4]])
    options = dict(max_new=3)
    out = generate(model, src, **options, beams=64, length_penalty=length_penalty)
    for row, found in zip(src, out.tolist()):
        best, best_score = None, -math.inf
        for candidate in itertools.product(range(5), repeat=3):
            if EOS in candidate:
                candidate = candidate[: candidate.index(EOS) + 1]
            tgt_in = torch.tensor([[BOS, *candidate[:-1]]])
            log_probs = model.logits(row[None], tgt_in)[0].log_softmax(-1)
            score = sum(log_probs[i, t].item() for i, t in enumerate(candidate)) / len(candidate) ** length_penalty
            if score > best_score:
                best, best_score = list(candidate), score
        assert F.pad(torch.tensor(found), (0, 3 - len(found)), value=PAD).tolist() == best + [PAD] * (3 - len(best))


def test_loss_of_a_new_model_is_about_ln_v():
    torch.manual_seed(0)
    cfg = ModelConfig(**{**SMALL, "vocab_size": 5000, **PRESETS["tiny"]})
    src, targets = torch.randint(6, 5000, (2, 16, 20))
    for loss in (MaskedLM(cfg)(src, targets), Seq2Seq(cfg)(src, src, targets)):
        assert abs(loss.item() / targets.numel() / math.log(5000) - 1) < 0.03


def test_the_paper_preset_has_the_size_the_team_reports():
    """12 + 12 layers at width 1024 and one embedding of 150k pieces: about 507M weights (the "500M" of the paper)."""
    with torch.device("meta"):
        model = Seq2Seq(ModelConfig(vocab_size=150_000, max_len=512, **PRESETS["paper"]))
    assert 505e6 < sum(p.numel() for p in model.parameters()) < 509e6


def test_only_the_embedding_is_shared():
    names = dict(seq2seq().named_parameters())
    assert len(names) == len({p.data_ptr() for p in names.values()})
    assert [x for x in names if "embed" in x] == ["embed.weight"]


@pytest.mark.parametrize(
    "change",
    [{"d_model": 30}, {"positions": "sines"}, {"dropout": 1.0}, {"n_decoder_layers": -1}, {"n_encoder_layers": 0}],
)
def test_impossible_shapes_are_refused(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        ModelConfig(**{**SMALL, **change})


def test_a_seq2seq_model_needs_a_decoder():
    with pytest.raises(ValueError, match="at least 1"):
        Seq2Seq(ModelConfig(**SMALL))


def test_dropout_is_where_it_should_be():
    torch.manual_seed(0)
    model = MaskedLM(ModelConfig(**SMALL, dropout=0.5))
    src = torch.randint(6, 120, (2, 8))
    assert not torch.equal(model.train().encode(src), model.encode(src))
    assert torch.equal(model.eval().encode(src), model.encode(src))


# Attention fusion --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fusion_is_attention_over_the_layers():
    """Against the formula written out token by token, on all layers' outputs as hooks see them."""
    model = seq2seq(fusion=True, n_encoder_layers=3)
    model.fusion.query.data = torch.randn(32) * 3
    layers = []
    hooks = [block.register_forward_hook(lambda *call: layers.append(call[2])) for block in model.encoder.blocks]
    src, mask = torch.randint(6, 120, (2, 5)), torch.tensor([[True] * 5, [True, True, True, False, False]])
    fused = model.encode(src, mask)
    for hook in hooks:
        hook.remove()
    norm = model.fusion.norm
    for b, s in itertools.product(range(2), range(5)):
        h = [model.encoder.norm(layer[b, s]) for layer in layers]
        centred = [(x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in h]
        scores = [float((c * norm.weight + norm.bias) @ model.fusion.query) / math.sqrt(32) for c in centred]
        p = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        assert max(p) - min(p) > 0.01
        torch.testing.assert_close(fused[b, s], sum(p_l * h_l for p_l, h_l in zip(p, h)), rtol=1e-4, atol=1e-5)
    assert len(layers) == 3 and not torch.equal(fused, model.encoder(model.embed(src), mask))


def test_fusion_starts_with_equal_layers_and_learns_while_the_encoder_is_frozen():
    model = Seq2Seq(ModelConfig(**SMALL, n_decoder_layers=1, fusion=True))
    src = torch.randint(6, 120, (2, 5))
    layers = model.encoder(model.embed(src), None, lambda layers: layers)  # [2, B, S, D]
    torch.testing.assert_close(model.encode(src), layers.mean(0))
    model.embed.requires_grad_(False)
    model.encoder.requires_grad_(False)
    loss = model(src, src, src) / src.numel()
    assert abs(loss.item() / math.log(120) - 1) < 0.05
    loss.backward()
    assert model.fusion.query.grad.abs().min() > 0 and all(p.grad is None for p in model.encoder.parameters())


def test_fusion_adds_under_a_ten_thousandth_at_paper_scale():
    with torch.device("meta"):
        cfg = ModelConfig(150_000, **PRESETS["paper"], max_len=512, fusion=True)
        added, whole = (sum(p.numel() for p in m.parameters()) for m in (Fusion(cfg), Seq2Seq(cfg)))
    assert added == 3 * 1024 and 500e6 < whole < 510e6 and added / whole < 1e-4
