"""Several processes over gloo, signals, faults: the same model as one process makes, and nothing lost."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, SMALL

import config
import train_encoder
import train_seq2seq
import trainer
from checkpoint import load_checkpoint
from cli import InputError, OneProcessError
from data import TokenData
from model import ModelConfig

# A training script as torchrun starts it, with faults at given steps on the last rank; it leaves each rank's weights.
FAULTY = f"""
import math, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import cli, train_seq2seq, trainer, torch

rank, world = (int(os.environ.get(x, d)) for x, d in (("RANK", 0), ("WORLD_SIZE", 1)))
fault, _, steps = os.environ.get("FAULT", "").partition(" ")
steps = [int(step) for step in steps.split()]
update, seen = trainer.Training.update, []

def faulty(training, wrapped, examples, step):
    last = rank == world - 1
    seen[:] = [wrapped]
    if step in steps and last and fault in ("TERM", "USR1", "KILL"):
        os.kill(os.getpid(), getattr(signal, "SIG" + fault))
    if step in steps and last and fault == "hang":
        time.sleep(1000)
    if step in steps and last and fault == "nan":
        # the loss of this rank alone is not a number
        hook = wrapped.register_forward_hook(lambda *call: call[2] * math.nan)
        out = update(training, wrapped, examples, step)
        hook.remove()
        return out
    return update(training, wrapped, examples, step)

def main():
    train_seq2seq.main()
    if seen and not fault and not hasattr(seen[0], "unshard"):
        model = getattr(seen[0], "module", seen[0])
        torch.save(model.state_dict(), f"{{os.environ['NAME']}}.rank{{rank}}")

trainer.Training.update = faulty
cli.run_command(main)
"""

# Rank 1 comes to its end while a thread of the process group waits for the interpreter, to let go of a tensor.
LATE = f"""
import ctypes, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import cli, torch
import torch.distributed as dist

class Slow:
    def __del__(self):
        time.sleep(1)  # draws the interpreter's tear-down out

def main():
    dist.init_process_group("gloo")
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))  # held for ever, as the caches of DTensor do
    dist.barrier()
    if dist.get_rank() == 0:
        time.sleep(1)
        dist.all_reduce(torch.ones(1))
    else:
        tensor = torch.ones(1)
        tensor.of_python = True
        work = dist.group.WORLD.allreduce([tensor])
        del tensor, work
        sys.setswitchinterval(1000)  # from here on no other thread gets the interpreter
        until = time.time() + 3
        while time.time() < until:
            pass
    print("done")

slow = Slow()
cli.run_command(main)
"""


def test_the_end_of_a_process_group_is_no_abort(tmp_path):
    """A thread that needs the interpreter while it is torn down ends the process with SIGABRT."""
    (tmp_path / "late.py").write_text(LATE)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "late.py"]
    done = subprocess.run(line, cwd=tmp_path, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr


@pytest.fixture
def encoder(command, data_dir, tmp_path, request):
    """Of rotary positions, or of those that a test asks for."""
    flags = [*SMALL, *ROWS, "--positions", getattr(request, "param", "rotary")]
    command(train_encoder, "--data", data_dir, *flags, "--steps", 3, "--lr", 0.01, "--out", "enc.pt")
    (tmp_path / "faulty.py").write_text(FAULTY)
    return tmp_path / "enc.pt"


# Sources padded differently in each split, targets of unequal number, a decoder and a fusion of its own.
# Rounding, which the split changes, grows with the sum of the rates: wsd's is almost twice the linear schedule's.
STAGE2 = ["--init", "enc.pt", "--noise", "sentinel", "--mean-span", 1.5, "--fusion", "--decoder-layers", 1]
STAGE2 += [
    "--unfreeze-at",
    0.5,
    "--batch-size",
    8,
    "--dtype",
    "fp32",
    "--log-every",
    1,
    "--lr",
    3e-4,
    "--schedule",
    "linear",
    "--optimizer",
    "adamw",
]


@pytest.fixture
def launch(tmp_path, data_dir):
    """Runs stage 2 on so many processes, each of one thread."""

    def run(processes: int, name: str, *flags: object, fault: str = "", steps: int = 20) -> subprocess.CompletedProcess:
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        stage2 = [] if "--resume" in flags else [*STAGE2, "--data", data_dir, "--steps", steps]
        line = [*start, "faulty.py", *stage2, "--out", f"{name}.pt", *flags]
        environment = dict(os.environ, OMP_NUM_THREADS="1", NAME=name, FAULT=fault)
        return subprocess.run(
            [str(word) for word in line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


def worst(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def losses(path: Path) -> list[float]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_ranks(data_dir, monkeypatch, ranks):
    """1,000 steps, within which every language comes round several times."""
    data = TokenData(data_dir, 32)
    config = trainer.TrainConfig(batch_size=8, seq_len=32)
    objective = train_encoder.encoder_objective(data.ids, train_encoder.MLMConfig())
    run = trainer.Run("encoder", Path("x.pt"), {}, config, ModelConfig(1000, max_len=32), None, data, None, None)
    assert all(len(tokens) // 32 < 1000 for tokens in data.train.values())
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for step in range(1000):
        rows = []
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            rows += trainer.batch_of(run, objective, step)
        for k, row in enumerate(rows):
            i = 8 * step + k
            expected = objective(data.row(i), trainer.sample_rng(0, trainer.NOISE, i))
            assert len(rows) == 8 and all(np.array_equal(row[name], expected[name]) for name in expected)


@pytest.mark.parametrize("encoder", ["rotary", "learned"], indirect=True)
@pytest.mark.slow
def test_one_model_whatever_the_split(encoder, launch, tmp_path):
    """After 20 steps, the encoder thawed after 10: weights equal to 1e-6, on every rank of DDP too."""
    for processes, name, flags in (
        (1, "one", []),
        (1, "micro", ["--micro-batch-size", 2]),
        (2, "ddp", ["--micro-batch-size", 2]),
        (2, "fsdp", ["--parallel", "fsdp", "--micro-batch-size", 3]),
        (2, "fsdp2", ["--parallel", "fsdp"]),
    ):
        done = launch(processes, name, *flags)
        assert done.returncode == 0, done.stderr
    one = load_checkpoint(tmp_path / "one.pt")["weights"]
    start = load_checkpoint(encoder)["weights"]
    assert worst({n: one[n] for n in start if n in one}, {n: start[n] for n in start if n in one}) > 1e-4
    for name in ("micro", "ddp", "fsdp", "fsdp2"):
        assert worst(one, load_checkpoint(tmp_path / f"{name}.pt")["weights"]) < 1e-6, name
        assert losses(tmp_path / f"{name}.run" / "metrics.jsonl") == pytest.approx(
            losses(tmp_path / "one.run" / "metrics.jsonl"), rel=1e-6
        )
    a, b = (torch.load(tmp_path / f"ddp.rank{rank}", weights_only=True) for rank in (0, 1))
    assert worst(a, b) == 0


@pytest.mark.slow
def test_muon_whatever_the_split(encoder, launch, tmp_path):
    """Muon iterates in the dtype of the run, here fp32; over FSDP2 it sees whole matrices."""
    for processes, name, flags in ((1, "one", []), (2, "ddp", []), (2, "fsdp", ["--parallel", "fsdp"])):
        done = launch(processes, name, "--optimizer", "muon", *flags)
        assert done.returncode == 0, done.stderr
    weights = [load_checkpoint(tmp_path / f"{name}.pt")["weights"] for name in ("one", "ddp", "fsdp")]
    one, ddp, fsdp = (torch.cat([x.flatten() for _, x in sorted(w.items())]) for w in weights)
    assert (one - ddp).norm() < 1e-5 * one.norm() and (one - fsdp).norm() < 1e-5 * one.norm()


def test_resumed_by_any_number_of_processes_and_either_wrapper(encoder, launch, tmp_path):
    """DDP, one process, FSDP2, DDP; each stopped by a signal to its last rank; the thaw after step 10 is on the way."""
    assert launch(1, "whole").returncode == 0
    for processes, flags, fault in (
        (2, [], "TERM 4"),
        (1, ["--resume"], "USR1 8"),
        (2, ["--resume", "--parallel", "fsdp"], "TERM 11"),
        (2, ["--resume", "--parallel", "ddp"], "USR1 15"),
        (2, ["--resume", "--parallel", "fsdp"], ""),
    ):
        done = launch(processes, "parts", *flags, fault=fault)
        assert done.returncode == 0, done.stderr
        if fault:
            after = int(fault.split()[1]) + 1
            assert f"parts.pt: stopped after {after} steps, all saved; continue with --resume" in done.stdout
            assert not (tmp_path / "parts.pt").exists()
            assert [path.name for path in trainer.run_checkpoints(tmp_path / "parts.run")] == [f"{after:09d}.pt"]
    whole, parts = (load_checkpoint(tmp_path / f"{name}.pt") for name in ("whole", "parts"))
    assert worst(whole["weights"], parts["weights"]) < 1e-6
    seen = [losses(tmp_path / f"{name}.run" / "metrics.jsonl") for name in ("whole", "parts")]
    assert len(seen[0]) == 20 and seen[0] == pytest.approx(seen[1], abs=1e-6)


@pytest.mark.parametrize("processes, parallel", [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
@pytest.mark.slow
def test_a_loss_that_is_not_a_number(encoder, launch, tmp_path, processes, parallel):
    """On one rank, once: all ranks skip that update. Three times running: the run ends and names the samples."""
    done = launch(processes, "once", "--parallel", parallel, fault="nan 1 3", steps=6)
    assert done.returncode == 0 and done.stdout.count("update skipped, weights unchanged") == 2, done.stderr
    assert "2 skipped" in done.stdout.splitlines()[-2]
    checkpoint = load_checkpoint(tmp_path / "once.pt")
    assert checkpoint["history"][-1]["skipped"] == 2
    assert all(x.isfinite().all() for x in checkpoint["weights"].values())
    done = launch(processes, "thrice", "--parallel", parallel, fault="nan 2 3 4", steps=6)
    assert done.returncode != 0
    assert "thrice.pt: loss or gradients not finite in steps [2, 3, 4], samples 16 to 39; lower" in done.stderr


@pytest.mark.parametrize("fault, complaint", [("KILL 3", "another process"), ("hang 3", "did not answer within")])
@pytest.mark.slow
def test_a_rank_that_dies_or_hangs_ends_the_run(encoder, launch, tmp_path, fault, complaint):
    done = launch(2, "lost", "--timeout", 5, fault=fault)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("faulty.py: ")]
    assert len(lines) == 1 and complaint in lines[0] and "--resume" in lines[0], done.stderr
    running = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split()
    assert not [pid for pid in running if int(pid) != os.getpid()]


def test_row_workers(command, data_dir, tmp_path, monkeypatch):
    """The same weights with them; one that dies, or finds a bad row, ends the run with one line."""
    flags = ["--data", data_dir, *SMALL, *ROWS, "--steps", 6]
    command(train_encoder, *flags, "--out", "none.pt")
    command(train_encoder, *flags, "--out", "some.pt", "--workers", 1)
    a, b = (load_checkpoint(tmp_path / f"{name}.pt")["weights"] for name in ("none", "some"))
    assert worst(a, b) == 0
    main, real = os.getpid(), TokenData.row

    def dies(self, i):
        if os.getpid() != main and i > 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, i)

    monkeypatch.setattr(TokenData, "row", dies)
    with pytest.raises(InputError, match="a process that prepares rows died"):
        command(train_encoder, *flags, "--out", "dead.pt", "--workers", 1)

    def bad(self, i):
        raise OneProcessError(f"row {i} is bad")

    monkeypatch.setattr(TokenData, "row", bad)
    with pytest.raises(InputError, match=r"^row \d+ is bad$"):
        command(train_encoder, *flags, "--out", "bad.pt", "--workers", 1)


def test_a_signal_to_the_whole_group_lets_the_last_update_have_its_rows(data_dir, tmp_path):
    """As `timeout` and schedulers send it, to the group and to each process: row workers hear it, too."""
    line = [sys.executable, ROOT / "train_encoder.py", "--data", data_dir, *SMALL, *ROWS, "--steps", 10**6]
    run = subprocess.Popen(
        [*map(str, line), "--workers", "2", "--log-every", "1"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    log = tmp_path / "enc.run" / "metrics.jsonl"
    while run.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.05)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for number in map(int, workers):
        os.kill(number, signal.SIGTERM)
    os.killpg(run.pid, signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert len(workers) >= 2
    steps = int(re.search(r"stopped after (\d+) steps, all saved", said)[1])
    assert run.returncode == 0 and trainer.run_checkpoints(tmp_path / "enc.run")[-1].stem == f"{steps:09d}"


def test_processes_wait_for_the_embedded_corpus_whether_they_find_it_made_or_not(monkeypatch):
    """One that comes after it was made must not leave the others waiting."""
    config.open_data(config.SAMPLE, 32)
    monkeypatch.setattr(config.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(config.dist, "barrier", lambda: waited.append(1))
    waited = []
    config.open_data(config.SAMPLE, 32)
    assert waited == [1]


def test_machines_without_a_common_folder_are_refused(command, data_dir, tmp_path):
    """Two processes, one of which does not see the checkpoint that the other resumes from."""
    flags = [*map(str, ["--data", data_dir, *SMALL, *ROWS, "--steps", 4, "--resume"])]
    command(train_encoder, *flags[:-3], "--steps", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "elsewhere").mkdir()
    runs = []
    for rank, folder in (("0", tmp_path), ("1", tmp_path / "elsewhere")):
        machine = dict(RANK=rank, LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        line, pipe = [sys.executable, str(ROOT / "train_encoder.py"), *flags], subprocess.PIPE
        runs.append(subprocess.Popen(line, cwd=folder, env=os.environ | machine, stderr=pipe, text=True))
    for run in runs:
        said = run.communicate(timeout=100)[1]
        assert run.returncode == 2 and "enc.run: the updates done are not the same for all processes (2, 0)" in said


def test_one_run_at_a_time(command, data_dir, tmp_path):
    flags = ["--data", data_dir, *SMALL, *ROWS, "--steps", 2]
    (tmp_path / "enc.run").mkdir()
    with open(tmp_path / "enc.run" / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="enc.run: another run is writing there"):
            command(train_encoder, *flags)
    assert not (tmp_path / "enc.pt").exists()
    command(train_encoder, *flags)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(command, data_dir, tmp_path, keep):
    flags = ["--data", data_dir, *SMALL, *ROWS, "--steps", 6, "--save-every", 1, "--keep", keep]
    command(train_encoder, *flags)
    names = [path.name for path in trainer.run_checkpoints(tmp_path / "enc.run")]
    assert names == [f"{step:09d}.pt" for step in range(7 - keep, 7)]
    if keep == 3:  # an older one serves where the newest is lost
        before = load_checkpoint(tmp_path / "enc.pt")["weights"]
        (tmp_path / "enc.pt").unlink()
        (tmp_path / "enc.run" / names[-1]).unlink()
        command(train_encoder, "--resume")
        assert worst(before, load_checkpoint(tmp_path / "enc.pt")["weights"]) == 0


@pytest.mark.slow
def test_compiling_changes_no_result(command, data_dir, encoder, tmp_path, script):
    flags = ["--data", data_dir, "--init", "enc.pt", "--batch-size", 4, "--dtype", "fp32", "--steps", 4, "--lr", 1e-3]
    flags += ["--unfreeze-at", 0.5]
    command(train_seq2seq, *flags, "--out", "eager.pt")
    done = script("train_seq2seq.py", *flags, "--out", "compiled.pt", "--compile")
    assert done.returncode == 0, done.stderr
    eager, compiled = (load_checkpoint(tmp_path / f"{name}.pt")["weights"] for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys() and worst(eager, compiled) < 1e-5


@pytest.mark.slow
def test_killed_at_random_instants_and_resumed(tmp_path):
    """A short `make soak`: both scripts, one process and two."""
    line = [sys.executable, str(ROOT / "tests" / "soak.py"), "--kills", "8"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": 2 kills (") == 4 and done.stdout.count("weights off by 0 ") >= 2, done.stdout


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
@pytest.mark.slow
def test_workers_do_not_outlive_torchrun(data_dir, tmp_path, sent):
    """torchrun passes SIGTERM on and dies of the other two: its workers then save and end by themselves."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    flags = ["--data", data_dir, *SMALL, *ROWS, "--steps", 10**6, "--log-every", 1]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with open(tmp_path / "said", "w") as said:
        line = [*launch, ROOT / "train_encoder.py", *flags]
        agent = subprocess.Popen([*map(str, line)], cwd=tmp_path, env=environment, stdout=said, stderr=said)
    log = tmp_path / "enc.run" / "metrics.jsonl"
    while agent.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.05)
    agent.send_signal(sent)
    agent.wait(timeout=60)
    until = time.monotonic() + 60
    while not (found := re.search(r"stopped after (\d+) steps, all saved", (tmp_path / "said").read_text())):
        assert time.monotonic() < until, (tmp_path / "said").read_text()
        time.sleep(0.05)
    assert trainer.run_checkpoints(tmp_path / "enc.run")[-1].stem == f"{int(found[1]):09d}"
