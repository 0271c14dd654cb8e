"""On a GPU: what must be equal, what training costs, and where its time goes. In parts of under ten minutes each.

    python benchmarks/gpu.py                          # every part
    python benchmarks/gpu.py equality speed-base      # some
    python benchmarks/gpu.py --smoke --out /tmp/gpu   # the same code on a CPU, at a tiny shape: does it run?

Every measurement adds a line to OUT/<part>.jsonl, which is also printed; those that are there are not repeated. What is
measured are the commands themselves, train_encoder.py and train_seq2seq.py, in processes of their own.
"""

import argparse
import importlib
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from throughput import BASE, fetching, matmul_rate, take_turns  # noqa: E402

import trainer  # noqa: E402
from checkpoint import load_checkpoint  # noqa: E402
from cli import InputError, append_json, rank, run_command  # noqa: E402
from config import SAMPLE, open_data  # noqa: E402
from data import SAMPLE_DATA, SAMPLE_OPTIONS, SAMPLE_TEXT, prepare  # noqa: E402
from log import read_metrics  # noqa: E402
from model import ProjectionLoss, projection_loss  # noqa: E402

Runs = Iterator[tuple[str, Callable[[Path], dict]]]  # names, and what measures each in an empty folder
SMOKE = "--smoke" in sys.argv
GPUS = 2 if SMOKE else torch.cuda.device_count()  # processes of a parallel run
ROWS = {"small": (256, 64), "base": (128, 32), "paper": (128, 32), "micro": (4, 2)}  # an update's, a micro-batch's
VOCABULARY, WARM = 150_000, 4  # pieces; updates that do not count
TEMPORARY = tempfile.TemporaryDirectory()
SHORT = "--log-every 1 --eval-every 1000 --seq-len 64 --batch-size 32 --micro-batch-size 8 --steps 20 --save-every 10"
if SMOKE:
    SHORT = "--log-every 1 --eval-every 1000 --seq-len 32 --batch-size 4 --micro-batch-size 2 --steps 4 --save-every 2"
    SHORT += " --d-model 32 --n-heads 2 --d-ff 64 --encoder-layers 1"


def execute(folder: Path, line: str, processes: int = 1, **environment: str) -> str:
    """Runs a script with its arguments, under torchrun where there are several processes; returns what it printed.

    Raises ValueError with the last error on stderr where it fails.
    """
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split() if processes > 1 else []
    command, environment = [sys.executable, *torchrun, *line.split()], os.environ | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "rror" in line or line.startswith("train_")]
        raise ValueError((errors or [done.stderr])[-1][:300])
    return done.stderr + done.stdout


# What must be equal -------------------------------------------------------------------------------------------------


def two_stages(
    folder: Path, name: str, flags: str, encoder: str = "", seq2seq: str = "", processes: int = 1, **environment: str
) -> str:
    """An encoder NAME-enc.pt, and around it a seq2seq model NAME.pt in which it thaws for the last quarter, by flags of
    both and of each. Returns what was printed.
    """
    stage1 = f"{ROOT}/train_encoder.py --out {name}-enc.pt {SHORT} {flags} {encoder}"
    stage2 = f"{ROOT}/train_seq2seq.py --out {name}.pt --init {name}-enc.pt --unfreeze-at 0.75"
    stage2 += f" {SHORT} {flags} {seq2seq}"
    return "".join(execute(folder, line, processes, **environment) for line in (stage1, stage2))


def apart(folder: Path, a: str, b: str) -> dict:
    """How far losses and weights of two pairs of models lie apart, as shares of the first's."""
    found = {}
    for stage, x, y in (("encoder", f"{a}-enc", f"{b}-enc"), ("seq2seq", a, b)):
        logs = [read_metrics(folder / f"{name}.run" / "metrics.jsonl") for name in (x, y)]
        p, q = ([row.get("loss", row.get("mean")) for row in log] for log in logs)
        weights = [load_checkpoint(folder / f"{name}.pt")["weights"] for name in (x, y)]
        v, w = (torch.cat([part.flatten() for _, part in sorted(model.items())]) for model in weights)
        found[stage] = {
            "agree": all(math.isclose(*pair, rel_tol=1e-4) for pair in zip(p, q, strict=True)),  # as test_golden.py
            "same bits": torch.equal(v, w),
            "losses": max(abs(k - m) / k for k, m in zip(p, q)),
            "weights": float((v - w).norm() / v.norm()),
        }
    return found


def compare(folder: Path, first: dict, second: dict) -> dict:
    """Two pairs of models, each by arguments of `two_stages`; how often layers of the second were compiled anew."""
    two_stages(folder, "first", **first)
    said = two_stages(folder, "second", **second)
    return apart(folder, "first", "second") | {"compiled anew": said.count("Recompiling function")}


def equality() -> Runs:
    """The same on the CPU and on the GPU."""
    kinds = [(positions, noise) for positions in ("rotary", "learned") for noise in ("drop", "mask")]
    for positions, noise in kinds[::3] if SMOKE else kinds:
        both = {"flags": "--dtype fp32", "encoder": f"--positions {positions}", "seq2seq": f"--noise {noise}"}
        yield f"{positions}, {noise}", partial(compare, first=both | {"CUDA_VISIBLE_DEVICES": ""}, second=both)


def compiled() -> Runs:
    """The same compiled and not. torch gives up a layer that has to be compiled for more than 8 cases."""
    for noise in ("mask",) if SMOKE else ("drop", "mask"):
        both = {"flags": "--dtype fp32", "seq2seq": f"--noise {noise}"}
        more = {"flags": "--dtype fp32 --compile", "TORCH_LOGS": "recompiles"}
        yield noise, partial(compare, first=both, second=both | more)


def parallel() -> Runs:
    """The same on one GPU and on all there are; speed on all."""
    if GPUS == 1:
        print("parallel: one GPU, nothing to compare")
        return
    for wrapper in ("ddp", "fsdp"):
        many, preset = {"flags": f"--parallel {wrapper}", "processes": GPUS}, "micro" if SMOKE else "base"
        second = many | {"flags": f"--dtype fp32 --parallel {wrapper}"}
        yield f"{wrapper} on {GPUS}", partial(compare, first={"flags": "--dtype fp32"}, second=second)
        yield f"{wrapper} on {GPUS}, {preset}", partial(train, preset=preset, task="denoise", **many)


def resume() -> Runs:
    """Both stages continued from half-way, in bf16 with dropout; and run again, since a GPU may differ from itself."""

    def measure(folder: Path) -> dict:
        for name in ("whole", "again", "parts"):
            two_stages(folder, name, "--keep 2", "--dropout 0.1")
        for name, script in (("parts-enc", "train_encoder.py"), ("parts", "train_seq2seq.py")):
            (folder / f"{name}.pt").unlink()
            trainer.run_checkpoints(folder / f"{name}.run")[-1].unlink()
            execute(folder, f"{ROOT}/{script} --out {name}.pt --resume")
        return {name: apart(folder, "whole", name) for name in ("again", "parts")}

    yield "both stages", measure


# What it costs ------------------------------------------------------------------------------------------------------


@cache
def large_vocabulary() -> Path:
    """The embedded corpus by its own tokenizer and so many more pieces that no text is cut into."""
    open_data(SAMPLE, 32)
    folder, tokenizer = Path(TEMPORARY.name), (SAMPLE_DATA / "tokenizer.model").read_bytes()
    for i in range(SAMPLE_OPTIONS["vocab_size"], VOCABULARY):  # protocol buffers put end to end are one
        piece = b"w%06d" % i
        entry = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + struct.pack("<f", -20.0)
        tokenizer += b"\x0a" + bytes([len(entry)]) + entry
    (folder / "x.model").write_bytes(tokenizer)
    prepare(SAMPLE_TEXT, folder / "data", **SAMPLE_OPTIONS, tokenizer=folder / "x.model")
    return folder / "data"


def train(folder: Path, preset: str, task: str, flags: str = "", processes: int = 1) -> dict:
    """A training run in bf16: tokens/s by its log, the median update; the rest of what `watch` prints."""
    rows, micro = ROWS[preset]
    length, steps, data = (64, WARM + 3, SAMPLE_DATA) if SMOKE else (512, WARM + 12, large_vocabulary())
    line = f"{__file__} --watch {'train_encoder' if task == 'mlm' else 'train_seq2seq'} --out x.pt --preset {preset}"
    line += f" --seq-len {length} --batch-size {rows * processes} --micro-batch-size {micro} --steps {steps}"
    line += f" --data {data} --log-every 1 --eval-every 1000 --workers 2 {flags}"
    seen = json.loads(execute(folder, line, processes).splitlines()[-1])
    log = [row for row in read_metrics(folder / "x.run" / "metrics.jsonl") if "loss" in row]
    speed = statistics.median(row["tokens_per_second"] for row in log[WARM:-2])
    flops = seen.pop("flops a token") * speed / processes
    return seen | {
        "tokens/s": speed,
        "TFLOP/s of a process": flops / 1e12,
        "of a large product's rate": flops / matmul_rate("bf16", 128 if SMOKE else 8192),
        "tokens/s of rows alone": rows * length / fetching(dict(task=task, rows=rows, length=length), 1),
    }


def watch(script: str) -> None:
    """A training script in this process, which writes no checkpoint. Its last update is profiled; in the one before it
    torch warns where Python waits for the GPU. The last line that it prints is JSON.
    """
    on_gpu, update, seen = torch.cuda.is_available(), trainer.Training.update, {}
    trainer.save_checkpoint = lambda *_: None

    def watched(training: trainer.Training, wrapped: torch.nn.Module, examples: list, step: int) -> tuple:
        left, spent = training.run.train.steps - step, training.spent
        profiler = torch.profiler.profile() if left == 1 else nullcontext()
        with warnings.catch_warnings(record=True) as caught, profiler:
            warnings.simplefilter("always")
            if on_gpu:
                torch.cuda.set_sync_debug_mode("warn" if left == 2 else "default")
            out = update(training, wrapped, examples, step)
        if left == 2:
            seen["flops a token"] = spent["flops"] / spent["tokens"]
            if on_gpu:
                seen["waits"] = sum("synchronizing" in str(warning.message) for warning in caught)
                seen["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        if left == 1:
            order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            seen["profile"] = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
        return out

    trainer.Training.update = watched
    importlib.import_module(script).main()
    if rank() == 0:
        print(json.dumps(seen))


def speed(preset: str) -> Runs:
    """Both models, as they are and compiled."""
    shape = "micro" if SMOKE else preset
    for task in ("mlm", "denoise"):
        for how, flags in (("eager", ""), ("compiled", "--compile")):
            if not (SMOKE and flags):
                yield f"{preset}, {task}, {how}", partial(train, preset=shape, task=task, flags=flags)


def turns(options: list[dict]) -> list[dict]:
    """Milliseconds of an update and memory of each contender; they take turns."""
    found = take_turns(options, *(1, 1) if SMOKE else (5, 4))
    if any(math.isnan(seconds) for seconds, _ in found):
        raise ValueError("a process ended: out of memory?")
    return [{"ms": 1000 * seconds, "peak GB": memory / 1e9} for seconds, memory in found]


def peers(preset: str) -> Runs:
    """Updates by AdamW beside transformers, which attends by sdpa: both compiled, with learned positions."""
    o = BASE | dict(preset=preset, vocab=VOCABULARY, rows=16, length=512, dtype="bf16", positions="learned")
    o |= dict(preset="micro", vocab=2000, rows=2, length=32) if SMOKE else dict(compile=True)

    def measure(folder: Path, task: str) -> dict:
        who = ("ours", "transformers")
        ours, theirs = turns([o | dict(task=task, who=x) for x in who])
        return {"ours": ours, "transformers": theirs, "times as fast": theirs["ms"] / ours["ms"]}

    for task in ("mlm", "denoise"):
        yield f"{preset}, {task}", partial(measure, task=task)


def positions(preset: str) -> Runs:
    """What the rotation of queries and keys costs: updates by AdamW beside ones with learned positions."""
    o = BASE | dict(preset=preset, who="ours", length=512, dtype="bf16")
    o |= dict(preset="micro", vocab=2000, rows=2, length=32) if SMOKE else {}

    def measure(folder: Path) -> dict:
        kinds = [(task, how) for task in ("mlm", "denoise") for how in ("eager", "compiled")[: 1 if SMOKE else 2]]
        both = [{"positions": x} for x in ("rotary", "learned")]
        found = turns([o | dict(task=task, compile=how == "compiled") | x for task, how in kinds for x in both])
        pairs = zip(kinds, found[::2], found[1::2])
        return {", ".join(kind): {"rotary": a, "learned": b, "ratio": a["ms"] / b["ms"]} for kind, a, b in pairs}

    yield preset, measure


def projection() -> Runs:
    """Loss and gradients of the output projection, by the number of logits in a chunk: 2^24 was chosen on a CPU."""
    rows, width, vocabulary = (64, 32, 1000) if SMOKE else (16_384, 1024, VOCABULARY)

    def measure(folder: Path, power: int) -> dict:
        seconds, device = [], trainer.device()
        ProjectionLoss.CHUNK_LOGITS[device.type] = 1 << power
        hidden, weight = (torch.randn(n, width, device=device, requires_grad=True) for n in (rows, vocabulary))
        targets = torch.randint(vocabulary, (rows,), device=device)
        for _ in range(6):
            began = time.perf_counter()
            with trainer.autocast("bf16"):
                torch.autograd.grad(projection_loss(hidden, weight, None, targets), (hidden, weight))[0].sum().item()
            seconds.append(time.perf_counter() - began)
        return {"ms": 1e3 * statistics.median(seconds[1:])}

    for power in (24, 25, 26, 27, 28):
        yield f"2^{power} logits", partial(measure, power=power)


PARTS: dict[str, Callable[[], Runs]] = {"equality": equality, "resume": resume, "parallel": parallel}
PARTS |= {"compile": compiled, "projection": projection}
PARTS |= {f"speed-{preset}": partial(speed, preset) for preset in ("small", "base", "paper")}
PARTS |= {f"peers-{preset}": partial(peers, preset) for preset in ("small", "base", "paper")}
PARTS |= {f"positions-{preset}": partial(positions, preset) for preset in ("tiny", "small")}


def run_part(part: str, out: Path) -> None:
    """Measures what OUT/<part>.jsonl lacks; one that failed is measured again the next time."""
    path = out / f"{part}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {row["run"] for row in rows if "failed" not in row}
    for name, measure in ((name, measure) for name, measure in PARTS[part]() if name not in done):
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = measure(Path(folder))
            except ValueError as error:
                row = {"failed": str(error)}
        if table := row.pop("profile", None):
            (out / f"{part}-{name.replace(', ', '-')}.txt").write_text(table)
        append_json(path, {"run": name} | row)
        print(f"{part}: {name}: {json.dumps(row)}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--watch"]:
        script, sys.argv = sys.argv[2], sys.argv[2:]
        return watch(script)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "printed" / "gpu", help="folder to write to")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, on a CPU too")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        raise InputError(f"{min(unknown)}: no such part; there are {', '.join(PARTS)}")
    if not (SMOKE or torch.cuda.is_available()):
        raise InputError("no GPU was found; --smoke runs the same code at a tiny shape on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts or PARTS:
        run_part(part, args.out)


if __name__ == "__main__":
    run_command(main)
