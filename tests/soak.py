"""Kills training at random instants, again and again, and resumes it: nothing may be lost but the steps since a save.

    python tests/soak.py --kills 200

Both scripts, on one process and on two over gloo, each with its share of the kills; on two, either rank is the victim.
After every SIGKILL all checkpoints must load; the final weights must be those of the run that nobody disturbed. Prints
what was being done when the kills came, and the steps lost. Processes are forked off this one, which has imported
everything, so that a kill meets training and not the start of Python.
"""

import argparse
import faulthandler
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # forking is safe as long as there are no threads
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm

import cli
import data
import train_encoder
import train_seq2seq
import trainer
from checkpoint import load_checkpoint

FLAGS = "--steps 24 --save-every 2 --eval-every 9 --keep 2 --batch-size 16 --seq-len 32 --dtype fp32 --dropout 0.1"
MODEL = " --d-model 128 --n-heads 2 --d-ff 512 --encoder-layers 2"
STAGES = {train_encoder: FLAGS + MODEL, train_seq2seq: FLAGS + " --init enc.pt --unfreeze-at 0.5"}
HUNG = 300  # seconds after which a run, which takes five on a quiet machine, ends and says where it stood
PHASES = ("starting", "updating", "validating", "saving")
shared = mmap.mmap(-1, 16)  # what rank 0 is doing, and the steps it has done


def watch(place: object, name: str, phase: int, steps: int = 0) -> None:
    """Makes a function note its phase, and count the steps that it did."""
    original = getattr(place, name)

    def noted(*args: object, **options: object) -> object:
        if cli.rank() == 0:
            before = struct.unpack("qq", shared[:])
            shared[:] = struct.pack("qq", phase, before[1])
        try:
            return original(*args, **options)
        finally:
            if cli.rank() == 0:
                shared[:] = struct.pack("qq", before[0], args[3] + 1 if steps else before[1])

    setattr(place, name, noted)


def fork(module: object, flags: list[str], rank: int, world: int, port: int) -> int:
    """A training process, as torchrun would start it; its id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [module.__name__ + ".py", *flags]
    tqdm.set_lock(threading.RLock())  # its own is one for all forks, and a killed process never gives it back
    faulthandler.dump_traceback_later(HUNG, exit=True)
    status = 1
    try:
        cli.run_command(module.main)
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)


def ended(pids: list[int], seconds: float) -> dict[int, int]:
    """Those that end within so many seconds, and the status of each."""
    found: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(found) < len(pids) and time.monotonic() < until:
        for pid in set(pids) - found.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return found


def run(module: object, world: int, out: str, rng: random.Random | None = None, length: float = 0) -> bool:
    """Starts or resumes a run and kills a process of it at a random instant. Whether it came to its end.

    One kill in three is aimed at a save, which is short and where most could go wrong.
    """
    resumed = trainer.run_checkpoints(Path(out).with_suffix(".run"))
    flags = [
        "--out",
        out,
        "--timeout",
        "60",
        *(["--resume"] if resumed else [*STAGES[module].split(), "--data", "DATA"]),
    ]
    done = int(resumed[-1].stem) if resumed else 0
    shared[:] = struct.pack("qq", 0, done)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [fork(module, flags, rank, world, port) for rank in range(world)]
    statuses = ended(pids, rng.uniform(0, length / 2) if rng else 2 * HUNG)
    if rng and rng.random() < 1 / 3:
        while len(statuses) < world and struct.unpack("qq", shared[:])[0] != PHASES.index("saving"):
            statuses |= ended([pid for pid in pids if pid not in statuses], 0.002)
        time.sleep(rng.uniform(0, 0.03))
    assert not any(statuses.values()), Path("log").read_text()[-4000:]
    if len(statuses) == world:
        return True
    left = [pid for pid in pids if pid not in statuses]
    os.kill(rng.choice(left), signal.SIGKILL)
    late = set(left) - ended(left, 10).keys()  # the others notice; torchrun would end them
    for pid in late:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return False


def soak(module: object, world: int, kills: int, rng: random.Random) -> None:
    """So many kills of a script's runs; prints a line of figures. Raises AssertionError where something was lost."""
    began = time.monotonic()
    reference = "enc.pt" if module is train_encoder and world == 1 else f"{module.__name__}{world}.pt"
    run(module, world, reference)
    length, expected = time.monotonic() - began, load_checkpoint(Path(reference))["weights"]
    seen, lost, resumes, finished, worst = Counter(), [], 0, 0, 0.0
    out, folder = f"soak-{module.__name__}{world}.pt", Path(f"soak-{module.__name__}{world}.run")
    while sum(seen.values()) < kills or finished == 0 or folder.exists():
        resumes += bool(trainer.run_checkpoints(folder))
        over = sum(seen.values()) >= kills
        if not run(module, world, out, None if over else rng, length):
            phase, steps = struct.unpack("qq", shared[:])
            checkpoints = trainer.run_checkpoints(folder)
            for path in checkpoints:
                load_checkpoint(path)
            seen[PHASES[phase]] += 1
            lost.append(steps - int(checkpoints[-1].stem) if checkpoints else steps)
            assert 0 <= lost[-1] <= 2, f"{lost[-1]} steps lost, saved every 2"
            continue
        weights = load_checkpoint(Path(out))["weights"]
        worst = max(worst, *((weights[name] - x).abs().max().item() for name, x in expected.items()))
        assert worst <= (0 if world == 1 else 1e-6), f"{out}: {worst} off the undisturbed run"
        finished += 1
        os.remove(out)
        shutil.rmtree(folder)
    during = ", ".join(f"{seen[phase]} {phase}" for phase in PHASES)
    print(f"{module.__name__}, processes {world}: {sum(seen.values())} kills ({during}), {resumes} resumes,", end=" ")
    print(f"{sum(lost)} steps lost, at most {max(lost)} a kill; {finished} runs came to their end,", end=" ")
    print(f"weights off by {worst:.1g} at most; {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    watch(trainer.Training, "update", 1, steps=1)
    watch(trainer, "held_out_loss", 2)
    watch(trainer, "save_checkpoint", 3)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        data.prepare(data.SAMPLE_TEXT, Path("DATA"), **data.SAMPLE_OPTIONS)
        for number, (module, world) in enumerate((m, w) for w in (1, 2) for m in STAGES):
            soak(module, world, args.kills // 4 + (number < args.kills % 4), random.Random(args.seed * 4 + number))
        os.chdir("/")


if __name__ == "__main__":
    main()
