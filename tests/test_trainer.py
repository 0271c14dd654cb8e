import ctypes
import errno
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, SMALL
from torch.utils.flop_counter import FlopCounterMode

import config
import eval as evaluation
import extract
import train_encoder
import train_seq2seq
import trainer
from checkpoint import load_checkpoint, load_model, save_checkpoint, warm_start
from cli import InputError
from compute import batch_flops, train_flops
from config import PRESETS, TrainConfig
from data import TokenData, prepare
from model import IGNORE, MaskedLM, ModelConfig, Seq2Seq
from objectives import noise_row
from optim import Muon, make_optimizers, rate
from trainer import collate


def weights(path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["weights"]


def same(a: dict, b: dict, part: str = "") -> bool:
    names = [name for name in a if name.startswith(part)]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in names) and bool(names)


def metrics(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def encoder(command, data_dir, tmp_path, request):
    """Of rotary positions, or of those that `both_positions` asks for."""
    flags = [*SMALL, *ROWS, "--positions", getattr(request, "param", "rotary")]
    command(train_encoder, "--data", data_dir, *flags, "--steps", 3, "--lr", 0.01, "--out", "enc.pt")
    return tmp_path / "enc.pt"


both_positions = pytest.mark.parametrize("encoder", ["rotary", "learned"], indirect=True)


# What must hold ----------------------------------------------------------------------------------------------------


@both_positions
def test_the_two_recipes(command, data_dir, encoder, tmp_path, capsys):
    """Encoder first; seq2seq around it; the encoder of that taken out again, bit for bit, and continued."""
    stage2 = ["--data", data_dir, *ROWS, "--init", "enc.pt", "--lr", 0.01, "--steps", 4]
    command(train_seq2seq, *stage2, "--unfreeze-at", 1, "--out", "frozen.pt")
    printed = capsys.readouterr().out
    tables = load_checkpoint(encoder)["config"]["positions"] == "learned"  # one more tensor in each stack
    assert f"loaded {31 + tables} tensors (embed, encoder)" in printed
    assert f"new {46 + tables} tensors (cross-attention, decoder)" in printed
    assert "unused 5 tensors (head, head_bias)" in printed
    command(train_seq2seq, *stage2, "--unfreeze-at", 0.5, "--out", "seq2seq.pt")
    start, frozen, thawed = weights(encoder), weights(tmp_path / "frozen.pt"), weights(tmp_path / "seq2seq.pt")
    for part in ("embed", "encoder"):
        assert all(torch.equal(frozen[name], start[name]) for name in start if name.startswith(part))
        assert not any(torch.equal(thawed[name], start[name]) for name in start if name.startswith(part))

    command(extract, "seq2seq.pt", "--out", "enc-extracted.pt")
    seq2seq, _ = load_model(tmp_path / "seq2seq.pt", "seq2seq")
    extracted, checkpoint = load_model(tmp_path / "enc-extracted.pt", "encoder")
    src = torch.randint(106, 1000, (4, 20))
    mask = torch.arange(20) < torch.tensor([20, 3, 7, 1])[:, None]
    assert torch.equal(extracted.encode(src, mask), seq2seq.encode(src, mask))
    assert [stage["stage"] for stage in checkpoint["history"]] == ["encoder", "seq2seq", "extract"]

    command(train_encoder, "--data", data_dir, *ROWS, "--init", "enc-extracted.pt", "--steps", 2, "--out", "more.pt")
    history = load_checkpoint(tmp_path / "more.pt")["history"]
    assert [stage["stage"] for stage in history] == ["encoder", "seq2seq", "extract", "encoder"]
    assert [stage["tokens"] for stage in history] == [3 * 128, 4 * 128, 0, 2 * 128]


def test_fusion_over_a_frozen_encoder(command, data_dir, encoder, tmp_path, capsys):
    flags = ["--data", data_dir, *ROWS, "--init", "enc.pt", "--fusion", "--unfreeze-at", 1, "--steps", 3]
    command(train_seq2seq, *flags, "--lr", 0.01)
    assert "new 49 tensors (cross-attention, decoder, fusion)" in capsys.readouterr().out
    start, end = weights(encoder), weights(tmp_path / "seq2seq.pt")
    assert all(torch.equal(end[name], start[name]) for name in start if name.startswith(("embed", "encoder")))
    assert (end["fusion.query"] != 0).all() and (end["fusion.norm.weight"] != 1).any()
    command(extract, "seq2seq.pt", "--out", "enc-extracted.pt")
    assert all(torch.equal(weights(tmp_path / "enc-extracted.pt")[n], start[n]) for n in start if "encoder" in n)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_decoder_from_the_encoders_layers(command, data_dir, encoder, tmp_path, capsys, layers):
    """Two layers of the encoder go round: every decoder weight but cross-attention's is one of the encoder's."""
    flags = ["--data", data_dir, *ROWS, "--init", "enc.pt", "--decoder-layers", layers, "--steps", 0]
    command(train_seq2seq, *flags, "--out", "plain.pt")
    plain = capsys.readouterr().out
    command(train_seq2seq, *flags, "--init-decoder", "--out", "seeded.pt")
    seeded = capsys.readouterr().out
    assert "(embed, encoder)" in plain and "(cross-attention, decoder)" in plain
    assert "(decoder, embed, encoder)" in seeded and f"new {layers * 8} tensors (cross-attention)" in seeded
    enc, dec = weights(encoder), weights(tmp_path / "seeded.pt")
    source = {1: [0], 2: [0, 1], 4: [0, 0, 1, 1]}[layers]
    for name in dec:
        if name.startswith("decoder") and ".cross" not in name:
            twin = re.sub(r"blocks\.(\d+)", lambda m: f"blocks.{source[int(m[1])]}", name.replace("decoder", "encoder"))
            assert torch.equal(dec[name], enc[twin]), name


def test_causal_rows_are_a_share_of_the_rows(data_dir):
    """The rest is de-noised; without the flag the noise is what it was before there was one."""
    data = TokenData(data_dir, 32)
    objectives = [
        train_seq2seq.seq2seq_objective(data.ids, train_seq2seq.DenoiseConfig(clm_fraction=share)) for share in (0, 0.2)
    ]
    n, causal = 2000, 0
    for i in range(n):
        plain, mixed = (make(data.row(i), trainer.sample_rng(0, trainer.NOISE, i)) for make in objectives)
        assert (plain["src"] == noise_row(data.row(i), trainer.sample_rng(0, trainer.NOISE, i), data.ids)[0]).all()
        if mixed["src"][0] == data.ids.clm:
            causal += 1
            assert len(mixed["src"]) + len(mixed["tgt_out"]) == 33 and mixed["tgt_in"][0] == data.ids.bos
            assert (mixed["tgt_in"][1:] == mixed["tgt_out"][:-1]).all()
        else:
            assert len(mixed["src"]) == len(plain["src"]) == 32 - round(32 * 0.15)
    assert abs(causal / n - 0.2) < 5 * math.sqrt(0.2 * 0.8 / n)


def test_loss_at_step_0_is_about_ln_v(command, data_dir, tmp_path, capsys):
    command(train_encoder, "--data", data_dir, "--steps", 1, "--batch-size", 8, "--seq-len", 64)
    before, first, _ = metrics(tmp_path / "enc.run" / "metrics.jsonl")
    for loss in (before["mean"], first["loss"]):
        assert abs(loss / math.log(1000) - 1) < 0.03


@pytest.mark.parametrize("encoder", ["learned"], indirect=True)
def test_a_checkpoint_of_before_there_was_a_choice_has_learned_positions(command, data_dir, encoder, tmp_path):
    """It is evaluated, continued and resumed as what it is, and refused to whoever asks for rotary positions."""
    for path in (encoder, *(tmp_path / "enc.run").glob("*.pt")):
        content = torch.load(path, weights_only=True)
        del content["config"]["positions"]
        for settings in [stage["settings"] for stage in content["history"]] + [content.get("settings", {})]:
            settings.pop("positions", None)
        torch.save(content, path)
    assert load_checkpoint(encoder)["config"]["positions"] == "learned"
    command(train_encoder, "--data", data_dir, "--resume", "--out", "enc.pt")
    with pytest.raises(InputError, match="--positions rotary: .* has learned; leave the flag"):
        command(train_encoder, "--data", data_dir, "--resume", "--positions", "rotary", "--out", "enc.pt")
    stage2 = ["--data", data_dir, *ROWS, "--init", "enc.pt", "--steps", 1, "--unfreeze-at", 1]
    command(train_seq2seq, *stage2)
    taken = weights(tmp_path / "seq2seq.pt")
    assert all(torch.equal(taken[name], x) for name, x in weights(encoder).items() if name.startswith("encoder"))
    with pytest.raises(InputError, match="--positions rotary: enc.pt has learned; leave the flag"):
        command(train_seq2seq, *stage2, "--positions", "rotary", "--out", "other.pt")


@both_positions
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("cut", [2, 3, 4])
def test_resume_is_exact_across_the_unfreeze_step(command, data_dir, encoder, tmp_path, monkeypatch, optimizer, cut):
    """Six steps, unfrozen after three, killed after `cut` and resumed: the same weights and the same log."""
    flags = ["--data", data_dir, *ROWS, "--init", "enc.pt", "--unfreeze-at", 0.5, "--steps", 6, "--dropout", 0.1,
             "--optimizer", optimizer, "--save-every", 1, "--log-every", 1, "--eval-every", 2]  # fmt: skip
    command(train_seq2seq, *flags, "--out", "whole.pt")
    real = trainer.Log.step

    def killed(self, step, *rest):  # after the update, its line half written
        real(self, step, *rest)
        if step == cut:
            with open(self.path, "a") as file:
                file.write('{"step": 2, "held_out": {"de": 1.5}')
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Log, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        command(train_seq2seq, *flags, "--out", "cut.pt")
    monkeypatch.setattr(trainer.Log, "step", real)
    assert not (tmp_path / "cut.pt").exists() and trainer.run_checkpoints(tmp_path / "cut.run")
    command(train_seq2seq, "--out", "cut.pt", "--resume")
    assert same(weights(tmp_path / "cut.pt"), weights(tmp_path / "whole.pt"))
    whole, cut_ = (metrics(tmp_path / f"{name}.run" / "metrics.jsonl") for name in ("whole", "cut"))
    for line in whole + cut_:
        line.pop("tokens_per_second", None)
    assert cut_ == whole
    before = (tmp_path / "cut.pt").read_bytes()
    command(train_seq2seq, "--out", "cut.pt", "--resume")  # finished: nothing to do
    assert (tmp_path / "cut.pt").read_bytes() == before


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_micro_batches_change_nothing(command, data_dir, encoder, tmp_path, micro):
    """With sources padded differently in each split, and targets of unequal number (sentinels)."""
    flags = ["--data", data_dir, "--init", "enc.pt", "--noise", "sentinel", "--mean-span", 1.5, "--steps", 3]
    flags += ["--batch-size", 8, "--dtype", "fp32"]
    command(train_seq2seq, *flags, "--out", "whole.pt")
    command(train_seq2seq, *flags, "--micro-batch-size", micro, "--out", "split.pt")
    for name, x in weights(tmp_path / "whole.pt").items():
        torch.testing.assert_close(weights(tmp_path / "split.pt")[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_the_same_model(command, data_dir, encoder, tmp_path):
    """DDP over gloo, across the unfreeze step; both ranks end with the same weights as one process alone."""
    flags = ["--data", data_dir, "--init", "enc.pt", "--noise", "sentinel", "--mean-span", 1.5, "--steps", 4,
             "--unfreeze-at", 0.5, "--batch-size", 8, "--micro-batch-size", 2, "--dtype", "fp32"]  # fmt: skip
    command(train_seq2seq, *flags, "--out", "one.pt")
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train_seq2seq.py")]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    subprocess.run([*line, *map(str, flags), "--out", "two.pt"], cwd=tmp_path, env=environment, check=True, timeout=200)
    one, two = weights(tmp_path / "one.pt"), weights(tmp_path / "two.pt")
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, rtol=1e-4, atol=1e-5)
    a, b = (metrics(tmp_path / f"{name}.run" / "metrics.jsonl")[-1]["held_out"] for name in ("one", "two"))
    assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.slow
def test_freed_memory_is_kept():
    """The pages of a tensor that was freed serve the next one, even where malloc is told to hand back all it can.

    The heap first grows for some turns: glibc before 2.38 finds no aligned room in what it has just freed.
    """
    code = "import resource, torch, trainer\nfaults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
    code += "{}\nfor turn in range(30):\n    before = faults()\n"
    code += "    tensors = [torch.ones(4 << 20) for _ in range(3)]\n    del tensors\nprint(faults() - before)"
    environment = dict(os.environ, MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="4096")
    pages = 3 * (16 << 20) // resource.getpagesize()
    for keep, least, most in (("", pages, 2 * pages), ("trainer.keep_memory()", 0, pages / 100)):
        line = [sys.executable, "-c", code.format(keep)]
        done = subprocess.run(line, cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
        assert least <= int(done.stdout) <= most


def test_frozen_encoder_costs_no_backward(data_dir):
    model = Seq2Seq(ModelConfig(1000, **{**PRESETS["tiny"], "dropout": 0.5}, max_len=32)).train()
    trainer.freeze_encoder(model, True)
    src = torch.randint(106, 1000, (2, 8))
    assert not model.encode(src).requires_grad
    assert torch.equal(model.encode(src), model.encode(src)) and model.decoder.training
    model(src, src, src).backward()
    assert all(p.grad is None for part in (model.embed, model.encoder) for p in part.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())
    trainer.freeze_encoder(model, False)
    model(src, src, src).backward()
    assert all(p.grad is not None for p in model.embed.parameters()) and model.encoder.training


LEDGER = [(preset, kind) for preset in PRESETS for kind in ("encoder", "seq2seq", "frozen")]
LEDGER += [(preset, kind) for preset in ("tiny", "small") for kind in ("shallow", "fused", "fused, frozen")]


@pytest.mark.parametrize("preset, kind", LEDGER)
@pytest.mark.slow
def test_ledger_counts_what_torch_counts(preset, kind):
    """Within 1 %, on a batch in which sources and targets are of unequal length."""
    decoder_layers = {"encoder": 0, "shallow": 1}.get(kind, PRESETS[preset]["n_decoder_layers"])
    shape = {**PRESETS[preset], "dropout": 0.0, "n_decoder_layers": decoder_layers, "fusion": "fused" in kind}
    cfg = ModelConfig(2000, **shape, max_len=64)
    with torch.device("meta"):
        model = (MaskedLM if kind == "encoder" else Seq2Seq)(cfg)
    model.to_empty(device="cpu")  # what the weights are makes no difference here, and drawing 350M takes a while
    long, short = np.arange(106, 170), np.arange(106, 140)
    if kind == "encoder":
        examples = [{"src": x, "labels": np.where(np.arange(len(x)) < 8, x, IGNORE)} for x in (long, short)]
    else:
        examples = [{"src": x[10:], "tgt_in": x, "tgt_out": x} for x in (long, short)]
    if "frozen" in kind:
        trainer.freeze_encoder(model, True)
    batch = collate(examples, 0)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(**batch).backward()
    flops = batch_flops(cfg, batch, trainer.n_targets(examples), "frozen" in kind)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_ledger_of_a_run_adds_up(command, data_dir, encoder, tmp_path):
    command(train_seq2seq, "--data", data_dir, "--init", "enc.pt", *ROWS, "--steps", 4, "--unfreeze-at", 0.5)
    first, second = load_checkpoint(tmp_path / "seq2seq.pt")["history"]
    cfg = ModelConfig(**load_checkpoint(tmp_path / "seq2seq.pt")["config"])
    source = 32 - round(32 * 0.15)
    costs = [train_flops(cfg, 4, source, 32, 4 * 32, frozen) for frozen in (True, False)]
    assert second["flops"] == pytest.approx(2 * sum(costs)) and costs[0] < 0.8 * costs[1]
    assert first == load_checkpoint(encoder)["history"][0] and first["steps"] == 3 and first["seconds"] > 0


# Parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, fall", [("linear", 100), ("wsd", 800)])
def test_rate_rises_and_falls_to_a_twentieth(schedule, fall):
    cfg = TrainConfig(steps=1000, warmup=0.1, schedule=schedule)
    rates = [rate(step, cfg) for step in range(1000)]
    assert max(rates) == min(rates[100 : fall + 1]) == 1 and rates[-1] == pytest.approx(0.05)
    assert np.diff(rates[:101]).min() > 0 and np.diff(rates[fall:]).max() < 0
    assert 0 < rates[0] < 0.02 and np.ptp(np.diff(rates[fall:])) < 1e-12


def test_only_matrices_decay_and_muon_gets_the_blocks():
    model = Seq2Seq(ModelConfig(1000, **PRESETS["tiny"], max_len=32))
    names = {id(p): name for name, p in model.named_parameters()}
    (adamw,) = make_optimizers(model, TrainConfig(lr=1e-3, optimizer="adamw"), torch.bfloat16)
    decayed = {names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert len(decayed) == len(names)
    assert all((wd > 0) == (not re.search("bias|norm", name)) for name, wd in decayed.items())
    adamw, muon = make_optimizers(model, TrainConfig(lr=1e-3, optimizer="muon"), torch.bfloat16)
    moved = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert moved == {n for n in names.values() if ".blocks." in n and n.endswith("weight") and "norm" not in n}
    assert sum(len(group["params"]) for group in adamw.param_groups) + len(moved) == len(names)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0), (torch.float32, 2e-3)])
def test_muon_is_that_of_torch(dtype, tolerance):
    """Bit for bit in bf16, in which torch's iterates; in fp32 to the rounding of bf16."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((32, 64), (64, 32), (48, 48))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = Muon(ours, 0.02, 0.1, dtype), torch.optim.Muon(theirs, 0.02, 0.1)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert max((p - q).abs().max().item() for p, q in zip(ours, theirs)) <= tolerance


@pytest.mark.parametrize("dtype, has_bf16, expected", [("bf16", True, "bfloat16"), ("bf16", False, "float32"),
                                                       ("fp32", True, "float32")])  # fmt: skip
def test_a_processor_without_bf16_gets_fp32(monkeypatch, dtype, has_bf16, expected):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    assert trainer.product_dtype(dtype) == getattr(torch, expected)


def test_collate_pads_only_where_it_must():
    a = {"src": np.array([5, 6, 7]), "tgt_in": np.array([1, 5]), "tgt_out": np.array([5, 6])}
    b = {"src": np.array([8]), "tgt_in": np.array([1]), "tgt_out": np.array([9])}
    batch = {name: x.tolist() for name, x in collate([a, b], pad=0).items()}
    assert batch == {
        "src": [[5, 6, 7], [8, 0, 0]], "src_mask": [[True, True, True], [True, False, False]],
        "tgt_in": [[1, 5], [1, 0]], "tgt_out": [[5, 6], [9, IGNORE]],
    }  # fmt: skip
    assert "src_mask" not in collate([a, a], pad=0)


def test_held_out_loss_is_the_mean_over_targets(data_dir):
    torch.manual_seed(0)
    data = TokenData(data_dir, 32)
    model = MaskedLM(ModelConfig(1000, d_model=32, n_heads=2, d_ff=64, n_encoder_layers=1, max_len=32))
    objective = train_encoder.encoder_objective(data.ids, train_encoder.MLMConfig())
    seen = trainer.held_out_loss(model, data, ["hi", "en"], objective, "fp32")
    assert list(seen) == ["hi", "en"]
    examples = trainer.valid_examples(data, "en", objective)
    assert len(examples) == data.n_valid_rows("en")
    losses = [model(torch.tensor(x["src"])[None], torch.tensor(x["labels"])[None]).item() for x in examples]
    assert seen["en"] == pytest.approx(sum(losses) / trainer.n_targets(examples), rel=1e-5)
    few = trainer.valid_examples(data, "en", objective, at_most=3)
    assert len(few) == 3 and all(any((a["src"] == b["src"]).all() for b in examples) for a in few)


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, flags, complaint",
    [
        (train_encoder, ["--data", "nowhere"], "nowhere: no such folder"),
        (train_encoder, ["--batch-size", 0], "--batch-size is 0"),
        (train_encoder, ["--steps", -1], "--steps is -1"),
        (train_encoder, ["--lr", "nan"], "--lr is nan"),
        (train_encoder, ["--warmup", 2], "--warmup is 2.0"),
        (train_encoder, ["--seed", -1], "--seed is -1"),
        (train_encoder, ["--alpha", "nan"], "--alpha is nan"),
        (train_encoder, ["--seed", 2**64], "--seed is 18446744073709551616"),
        (train_encoder, ["--dropout", 1], "--dropout is 1.0"),
        (train_encoder, ["--n-heads", 3], "--d-model 128 is not a multiple"),
        (train_encoder, ["--d-model", 0], "--d-model is 0"),
        (train_encoder, ["--encoder-layers", 0], "--encoder-layers is 0"),
        (train_encoder, ["--mask-prob", 0], "--mask-prob is 0.0"),
        (train_encoder, ["--seq-len", 3, "--mask-prob", 0.1], "masks nothing"),
        (train_encoder, ["--seq-len", 20_000], "tokens to train on, but a row needs 20000"),
        (train_encoder, ["--max-len", 16], "--seq-len 64: the model has 16 positions"),
        (train_encoder, ["--out", "no/where.pt"], "no: no such folder"),
        (train_encoder, ["--out", "enc.run"], "--out enc.run: name it something.pt"),
        (train_encoder, ["--init", "nowhere.pt"], "nowhere.pt: no such file; run the command that writes it first"),
        (train_seq2seq, ["--unfreeze-at", 0.5], "--unfreeze-at: there is no trained encoder to work with"),
        (train_seq2seq, ["--fusion"], "--fusion: there is no trained encoder to work with; give one with --init"),
        (train_seq2seq, ["--init-decoder"], "--init-decoder: there is no trained encoder to work with"),
        (train_seq2seq, ["--clm-fraction", 1.1], "--clm-fraction is 1.1"),
        (train_seq2seq, ["--unfreeze-at", 1.5, "--init", "enc.pt"], "--unfreeze-at is 1.5"),
        (train_seq2seq, ["--noise-density", 1], "--noise-density is 1.0"),
        (train_seq2seq, ["--noise-density", 0.003], "--noise-density 0.003 of --seq-len 64 is no token; raise it"),
        (train_seq2seq, ["--mean-span", 0], "--mean-span is 0.0"),
        (train_seq2seq, ["--decoder-layers", 0], "--decoder-layers 0: it must be at least 1"),
        (train_seq2seq, ["--init", "enc.pt", "--preset", "tiny"], "--d-model 256: enc.pt has 32; leave the flag"),
        (train_seq2seq, ["--init", "enc.pt", "--d-ff", 99], "--d-ff 99: enc.pt has 64; leave the flag"),
        (train_seq2seq, ["--init", "enc.pt", "--seq-len", 64], "--seq-len 64: the model has 32 positions"),
    ],
)
def test_bad_flags_get_one_line(command, data_dir, encoder, tmp_path, module, flags, complaint):
    before = sorted(tmp_path.iterdir())
    given = [] if "--data" in flags else ["--data", data_dir]
    with pytest.raises(InputError, match=re.escape(complaint)):
        command(module, *given, *flags, *([] if "--out" in flags else ["--out", "new.pt"]))
    assert sorted(tmp_path.iterdir()) == before


def test_compiling_without_a_compiler_is_refused_before_training(command, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "nowhere")
    monkeypatch.setattr(trainer, "device", lambda: torch.device("cpu"))
    with pytest.raises(InputError, match="--compile: needs a C"):
        command(train_encoder, "--data", data_dir, *SMALL, *ROWS, "--compile")
    assert not list(tmp_path.glob("enc*"))


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--noise-density", 0.99], "lower the density"),
        (["--noise-density", 0.99, "--workers", 1], r"^\d+ of \d+ tokens"),  # not behind a worker's traceback
    ],
)
def test_settings_that_no_row_can_meet_are_refused_before_training(command, data_dir, tmp_path, flags, complaint):
    with pytest.raises(InputError, match=complaint):
        command(train_seq2seq, "--data", data_dir, *SMALL, "--batch-size", 8, *flags)
    assert not (tmp_path / "seq2seq.pt").exists()


def test_too_little_held_out_is_refused_before_training(command, data_dir, tmp_path):
    longest = min(len(tokens) for tokens in TokenData(data_dir, 16).valid.values())
    with pytest.raises(InputError, match=f"tokens held out, but a row needs {longest + 1}: .*--valid-fraction"):
        command(train_encoder, "--data", data_dir, *SMALL, "--seq-len", longest + 1)
    assert not (tmp_path / "enc.pt").exists()


def test_the_log_of_a_run_whose_checkpoints_are_gone_is_kept(command, data_dir, tmp_path):
    flags = ["--data", data_dir, *SMALL, *ROWS, "--steps", 1]
    for number in range(4):
        command(train_encoder, *flags, "--seed", number)
        (tmp_path / "enc.pt").unlink()
        trainer.run_checkpoints(tmp_path / "enc.run")[-1].unlink()
        if number == 2:
            (tmp_path / "enc.run" / "metrics-1.jsonl").unlink()  # room for the next
    logs = [(tmp_path / "enc.run" / f"metrics{x}.jsonl").read_text() for x in ("-1", "-2", "")]
    assert len(set(logs)) == 3


@pytest.mark.parametrize("share, steps, expected", [(0.55, 100, 55), (0.14, 50, 7), (1 / 3, 100, 34)])
def test_the_frozen_share_is_no_update_longer(monkeypatch, share, steps, expected):
    run = SimpleNamespace(
        objective=train_seq2seq.DenoiseConfig(unfreeze_at=share), settings={"init": "enc.pt"}, init=None
    )
    run.model, run.train = ModelConfig(106, max_len=128, n_decoder_layers=1), TrainConfig(steps=steps)
    run.data = SimpleNamespace(ids=None)
    monkeypatch.setattr(trainer, "start", lambda *_: run)
    monkeypatch.setattr(trainer, "fit", lambda *run: found.append(sum(map(run[2], range(steps)))))
    found = []
    train_seq2seq.main()
    assert found == [expected]


def test_nothing_is_overwritten(command, data_dir, encoder, tmp_path):
    with pytest.raises(InputError, match=r"enc\.pt: exists; give another --out, or --resume"):
        command(train_encoder, "--data", data_dir)
    (tmp_path / "enc.pt").rename(tmp_path / "moved.pt")
    with pytest.raises(InputError, match=r"000000003\.pt: exists"):
        command(train_encoder, "--data", data_dir)
    command(train_seq2seq, "--data", data_dir, *SMALL, *ROWS, "--steps", 0)
    with pytest.raises(InputError, match="exists; give another --out"):
        command(extract, "seq2seq.pt", "--out", "moved.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(InputError, match=r"folder\.pt: exists"):
        command(train_encoder, "--data", data_dir, "--out", "folder.pt")


def test_a_file_that_came_while_a_run_was_stopped_is_not_taken_for_its_result(command, data_dir, tmp_path, monkeypatch):
    stopped = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Log, "step", stopped)
        command(train_encoder, "--data", data_dir, *SMALL, *ROWS, "--steps", 3, "--out", "a.pt")
    (tmp_path / "a.pt").write_text("another's")
    with pytest.raises(InputError, match=r"a\.pt: exists but is not the result of this run"):
        command(train_encoder, "--resume", "--out", "a.pt")
    (tmp_path / "a.pt").unlink()
    command(train_encoder, "--resume", "--out", "a.pt")
    assert load_checkpoint(tmp_path / "a.pt")["history"][0]["steps"] == 3


def test_an_environment_that_is_not_torchruns_is_refused(command, data_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="the environment is not torchrun's .*; start with torchrun"):
        command(train_encoder, "--data", data_dir, *SMALL, *ROWS, "--steps", 1)


def test_without_data_a_second_stage_reads_that_of_the_first(command, data_dir, encoder, tmp_path, capsys):
    command(train_seq2seq, *ROWS, "--init", "enc.pt", "--steps", 1, "--out", "two.pt")
    assert f"enc.pt was trained on {data_dir}: so is this model; --data names another" in capsys.readouterr().out
    first, second = load_checkpoint(tmp_path / "two.pt")["history"]
    assert first["settings"]["data"] == second["settings"]["data"] == str(data_dir)


def test_a_run_lets_go_of_the_checkpoints_it_started_from(command, data_dir, encoder, tmp_path, monkeypatch):
    runs = []
    start = trainer.start
    monkeypatch.setattr(trainer, "start", lambda *a: runs.append(start(*a)) or runs[-1])
    flags = ["--data", data_dir, *ROWS, "--init", "enc.pt", "--init-decoder", "--steps", 2]
    for more in ([], ["--resume"]):
        command(train_seq2seq, *flags, "--out", "two.pt", *more)
    assert "weights" not in runs[0].init and not {"weights", "optimizers"} & runs[1].state.keys()


@pytest.mark.parametrize("flags", [["--steps", 2], ["--preset", "tiny"], ["--seed", 1], ["--init", "x.pt"]])
def test_resume_with_a_contradicting_flag_is_refused(command, data_dir, encoder, flags):
    with pytest.raises(InputError, match="has .*; leave the flag or --preset out"):
        command(train_encoder, "--resume", *flags)
    more = ["--log-every", 1, "--data", data_dir]
    command(train_encoder, "--resume", "--steps", 3, *more)  # no contradiction


def test_the_command_that_began_a_run_resumes_it(command, data_dir, monkeypatch, tmp_path):
    """With --preset, whose decoder an encoder leaves out and whose dropout is not that of the encoder of --init, and
    with 0 for a default.
    """
    monkeypatch.setitem(PRESETS, "small", {**PRESETS["small"], "d_model": 32, "n_heads": 2, "d_ff": 64})
    flags = ["--data", data_dir, "--preset", "small", *ROWS, "--steps", 2]
    flags += ["--lr", 0, "--embed-lr", 0, "--max-len", 0]
    command(train_encoder, *flags, "--dropout", 0, "--out", "enc.pt")
    command(train_encoder, *flags, "--dropout", 0, "--out", "enc.pt", "--resume")
    command(train_seq2seq, *flags, "--init", "enc.pt", "--out", "two.pt")
    command(train_seq2seq, *flags, "--init", "enc.pt", "--out", "two.pt", "--resume")
    settings = load_checkpoint(tmp_path / "two.pt")["history"][-1]["settings"]
    assert settings["dropout"] == 0 and settings["n_decoder_layers"] == 6


@pytest.mark.parametrize("schedule", ["linear", "wsd"])
def test_the_same_command_starts_continues_and_extends_a_run(command, data_dir, encoder, tmp_path, capsys, schedule):
    """Stopped, started again and, at its end, extended: the weights of the run that nothing disturbed."""
    flags = ["--data", data_dir, *ROWS, "--init", "enc.pt", "--unfreeze-at", 0.5, "--schedule", schedule, "--resume"]
    for steps in (6, 10):
        command(train_seq2seq, *flags, "--steps", steps, "--out", "whole.pt")
    stop = lambda log, step, *_: os.kill(os.getpid(), signal.SIGTERM) if step in (1, 7) else None
    for steps in (6, 6, 10, 10):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.Log, "step", stop)
            command(train_seq2seq, *flags, "--steps", steps, "--out", "parts.pt")
    printed = capsys.readouterr().out
    assert "parts.run: nothing to resume; starting a new run" in printed
    assert "parts.pt: extended from 6 to 10 steps" in printed
    assert printed.count("parts.pt: stopped after") == 2
    assert same(weights(tmp_path / "parts.pt"), weights(tmp_path / "whole.pt"))
    history = load_checkpoint(tmp_path / "parts.pt")["history"]
    assert [stage["steps"] for stage in history] == [3, 10]
    with pytest.raises(InputError, match="--steps 6: .* has 10"):
        command(train_seq2seq, *flags, "--steps", 6, "--out", "parts.pt")
    assert printed.count("parts.pt: held-out loss") == 2
    (tmp_path / "parts.run" / "metrics.jsonl").unlink()
    command(train_seq2seq, *flags, "--steps", 11, "--out", "parts.pt")
    assert "before" not in capsys.readouterr().out  # nobody knows any more what it was


def test_a_model_that_was_initialised_is_trained_with_a_pause(command, data_dir, tmp_path):
    flags = ["--data", data_dir, *SMALL, *ROWS, "--resume"]
    command(train_encoder, *flags, "--steps", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Log, "step", lambda log, step, *_: os.kill(os.getpid(), signal.SIGTERM))
        command(train_encoder, *flags, "--steps", 3)
    command(train_encoder, *flags, "--steps", 3)
    assert load_checkpoint(tmp_path / "enc.pt")["history"][-1]["steps"] == 3


def test_shares_of_the_steps_are_of_those_that_a_run_began_with():
    cfg = TrainConfig(steps=200, first_steps=100, warmup=0.1)
    rates = [rate(step, cfg) for step in range(200)]
    assert rates.index(1) == 10 and rates[10:161] == [1] * 151 and rates[161] < 1 and rates[-1] == pytest.approx(0.05)


def test_a_checkpoint_to_resume_from_can_be_evaluated(command, data_dir, encoder, capsys):
    command(evaluation, "enc.pt", "--task", "loss")
    whole = capsys.readouterr().out
    command(evaluation, "enc.run/000000003.pt", "--task", "loss")
    assert capsys.readouterr().out == whole


def test_resume_on_other_data_is_refused(command, data_dir, encoder, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(data_dir, other)
    (other / "de.json").unlink()
    with pytest.raises(InputError, match="other: not the data that"):
        command(train_encoder, "--resume", "--data", other, "--steps", 9)
    assert "extended" not in capsys.readouterr().out


def test_init_of_the_wrong_kind_or_tokenizer_is_refused(command, data_dir, text_dir, encoder, tmp_path):
    command(train_seq2seq, "--data", data_dir, *SMALL, *ROWS, "--steps", 0)
    for module in (train_encoder, train_seq2seq):
        with pytest.raises(InputError, match="of kind 'seq2seq', not encoder; take its encoder out with extract.py"):
            command(module, "--data", data_dir, "--init", "seq2seq.pt", "--out", "x.pt")
    with pytest.raises(InputError, match="of kind 'encoder', not seq2seq"):
        command(extract, "enc.pt", "--out", "x.pt")
    prepare(text_dir, tmp_path / "other", vocab_size=900, valid_fraction=0.2)
    with pytest.raises(InputError, match=r"its tokenizer is not that of enc\.pt"):
        command(train_seq2seq, "--data", "other", "--init", "enc.pt", "--out", "x.pt")


def test_warm_start_takes_parts_whole_or_not_at_all(encoder, capsys):
    checkpoint = load_checkpoint(encoder)
    model = MaskedLM(ModelConfig(**checkpoint["config"]))
    for change in (
        lambda w: w.pop("encoder.norm.bias"),
        lambda w: w.pop("head.0.weight"),
        lambda w: w.pop("embed.weight"),
        lambda w: w.update({"encoder.blocks.2.attn.q.weight": torch.zeros(32, 32)}),
        lambda w: w.update({"encoder.norm.bias": torch.zeros(31)}),
    ):
        broken = dict(checkpoint["weights"])
        change(broken)
        with pytest.raises(InputError, match="does not fit this model"):
            warm_start(model, encoder, broken)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a checkpoint"),
        lambda path: torch.save(Evil(), path),
        lambda path: torch.save({"weights": np.arange(3)}, path),
        lambda path: torch.save([1], path),
        lambda path: torch.save({"kind": "encoder"}, path),
    ],
)
def test_a_damaged_checkpoint_is_refused(command, data_dir, encoder, tmp_path, damage):
    damage(encoder)
    with pytest.raises(InputError, match=r"enc\.pt: (refused|not a checkpoint)"):
        command(train_seq2seq, "--data", data_dir, "--init", "enc.pt")
    assert not (tmp_path / "executed").exists()


def test_a_failed_save_leaves_the_last_good_checkpoint(command, data_dir, tmp_path, script):
    """No room on the disk, by a limit on file size: one line, and the file of the step before still loads."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"x": torch.zeros(10)})
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); import signal; "
    limit += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import torch, checkpoint; from pathlib import Path; "
    limit += "checkpoint.save_checkpoint(Path('a.pt'), {'x': torch.zeros(10**6)})"
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    run = subprocess.run([sys.executable, "-c", limit], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert re.search(r"InputError: a\.pt: cannot be written \(.*\); make room .* --resume", run.stderr)
    assert torch.load(path)["x"].tolist() == [0.0] * 10 and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line_and_it_can_go_on(data_dir, tmp_path, script):
    flags = ["--data", data_dir, *SMALL, *ROWS, "--steps", 4, "--save-every", 1, "--keep", 4]
    script("train_encoder.py", *flags, "--out", "enc.pt")
    expected = load_checkpoint(tmp_path / "enc.pt")["weights"]
    (tmp_path / "enc.pt").unlink()
    *_, second, third, last = trainer.run_checkpoints(tmp_path / "enc.run")
    third.unlink(), last.unlink()
    size = second.stat().st_size

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, size - 1000))

    full = script("train_encoder.py", "--out", "enc.pt", "--resume", preexec_fn=limited)
    assert full.returncode == 2 and len(full.stderr.splitlines()) == 1, full.stderr
    assert "cannot be written" in full.stderr and "--resume" in full.stderr
    assert not list(tmp_path.rglob("*.part")) and trainer.run_checkpoints(tmp_path / "enc.run")[-1] == second
    assert script("train_encoder.py", "--out", "enc.pt", "--resume").returncode == 0  # once there is room
    weights = load_checkpoint(tmp_path / "enc.pt")["weights"]
    assert all(torch.equal(weights[name], x) for name, x in expected.items())


def test_a_disk_too_full_for_the_log_is_one_line_that_names_it(data_dir, tmp_path, script):
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))  # less than the first line
    full = script("train_encoder.py", "--data", data_dir, *SMALL, *ROWS, "--steps", 2, preexec_fn=limited)
    assert full.returncode == 2 and len(full.stderr.splitlines()) == 1, full.stderr
    assert "enc.run/metrics.jsonl: cannot be written" in full.stderr and "--resume" in full.stderr


def test_a_log_is_whole_even_if_the_disk_is_too_full_to_resume(data_dir, tmp_path, script):
    flags = ["--data", data_dir, *SMALL, *ROWS, "--steps", 4, "--log-every", 1]
    script("train_encoder.py", *flags)
    (tmp_path / "enc.pt").unlink()
    before = (log := tmp_path / "enc.run" / "metrics.jsonl").read_bytes()
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
    full = script("train_encoder.py", *flags, "--resume", preexec_fn=limited)
    assert full.returncode == 2 and "enc.run/metrics.jsonl: cannot be written" in full.stderr
    assert log.read_bytes() == before


def test_a_run_does_not_go_on_from_a_checkpoint_that_is_no_longer_the_newest(command, data_dir, tmp_path, monkeypatch):
    """As when a run that was told to stop saves while the next one starts."""
    flags = ["--data", data_dir, *SMALL, *ROWS, "--steps", 4, "--save-every", 2, "--keep", 2]
    command(train_encoder, *flags)
    (tmp_path / "enc.pt").unlink()
    real = config.run_checkpoints
    monkeypatch.setattr(config, "run_checkpoints", lambda folder: real(folder)[:1])
    with pytest.raises(InputError, match=r"enc\.run/000000004\.pt: another run has just saved it; start again"):
        command(train_encoder, *flags, "--resume")


def test_too_little_memory_is_no_damage(monkeypatch):
    def load(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 480000000 bytes.")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="allocate memory"):
        load_checkpoint("enc.pt")


def test_more_processes_than_gpus_are_refused(command, data_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="--nproc-per-node: more than the 1 GPUs here"):
        command(train_encoder, "--data", data_dir, *SMALL, *ROWS, "--steps", 1)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_that_cannot_lock_nor_flush_a_folder(command, data_dir, tmp_path, monkeypatch, capsys, code):
    """As those of clusters may be: the run goes on, and says once that nothing keeps others out."""

    def flock(*_):
        raise OSError(code, os.strerror(code))

    def fsync(descriptor, real=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(os, "fsync", fsync)
    command(train_encoder, "--data", data_dir, *SMALL, *ROWS, "--steps", 2, "--save-every", 1)
    said = f"enc.run/lock: cannot be locked ({os.strerror(code)}); make sure that nothing else writes there"
    assert capsys.readouterr().out.count(said) == 1 and load_checkpoint(tmp_path / "enc.pt")


def test_a_result_whose_run_is_gone_is_not_made_again(command, data_dir, encoder, tmp_path, capsys):
    shutil.rmtree(tmp_path / "enc.run")
    with pytest.raises(InputError, match=r"enc\.pt: exists; give another --out"):
        command(train_encoder, "--data", data_dir, "--resume", "--out", "enc.pt")
    assert encoder.exists() and "starting a new run" not in capsys.readouterr().out


def test_rows_without_a_target_are_no_error(command, data_dir, tmp_path):
    """A stretch of padding, as a hole in a shard would be."""
    shutil.copytree(data_dir, tmp_path / "holes")
    for path in (tmp_path / "holes").glob("*.bin"):
        raw = path.read_bytes()
        path.write_bytes(raw[:32] + bytes(len(raw) - 32))
    command(train_encoder, "--data", "holes", *SMALL, *ROWS, "--steps", 2)
    assert load_checkpoint(tmp_path / "enc.pt")["history"][0]["skipped"] == 0


def test_a_folder_that_is_called_like_the_embedded_corpus_is_not_passed_over(command, tmp_path):
    (tmp_path / config.SAMPLE).mkdir(parents=True)
    with pytest.raises(InputError, match="--data sample/data: means the embedded corpus; to use the folder /"):
        command(train_encoder, *SMALL, *ROWS, "--steps", 1)
