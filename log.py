"""The log of a run: the progress bar, metrics.jsonl, and the lock on the run's folder."""

import json
import math
from itertools import count
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from cli import InputError, append_json, cannot_write, lock_file, rank, say
from config import Run, run_checkpoints


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without a half-written last one. Raises InputError for a damaged file."""
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError:
        raise InputError(f"{path}: damaged; remove it (the checkpoints do not need it)") from None


class Log:
    """Progress bar and metrics.jsonl of rank 0; a resumed run drops the lines that came after its checkpoint.

    Locks the run's folder, so that no two runs write there. Raises InputError if one already does.
    """

    def __init__(self, run: Run):
        self.run, self.path = run, run.folder / "metrics.jsonl"
        self.means: dict[int, float] = {}  # updates done -> held-out loss
        done = run.state["spent"]["steps"] if run.state else 0
        self.lock = self._open(done) if rank() == 0 else None
        self.bar = tqdm(total=run.train.steps, initial=done, desc=run.out.name, disable=None if rank() == 0 else True)

    def _open(self, done: int) -> BinaryIO:
        """Locks the folder, prepares the log, and returns the lock."""
        folder, state = self.run.folder, self.run.state
        folder.mkdir(exist_ok=True)
        lock = lock_file(folder / "lock", f"{folder}: another run is writing there; wait, or give another --out")
        if state and (newest := run_checkpoints(folder)[-1]).stem != f"{done:09d}":
            lock.close()
            raise InputError(f"{newest}: another run has just saved it; start again to go on from there")
        for part in folder.glob("*.part"):  # left by an interrupted save
            part.unlink()
        if state is None and self.path.exists():  # left by a run whose checkpoints are gone
            names = (folder / f"metrics-{k}.jsonl" for k in count(1))
            self.path.rename(next(name for name in names if not name.exists()))
        old = read_metrics(self.path) if state and self.path.exists() else []
        # The loss of step n belongs to the update after checkpoint n, a held-out loss to the one before it.
        kept = [line for line in old if line["step"] < done + ("held_out" in line)]
        part = self.path.with_suffix(".part")
        try:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            part.replace(self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.means = {line["step"]: line["mean"] for line in kept if "held_out" in line}
        return lock

    def close(self) -> None:
        """Ends the bar and releases the lock."""
        self.bar.close()
        if self.lock:
            self.lock.close()

    def _write(self, **values: object) -> None:
        if rank() == 0:
            append_json(self.path, values)

    def step(self, step: int, loss: float, norm: float, lr: float, speed: float) -> None:
        """Logs one update: loss in nats, gradient norm, AdamW's rate, tokens per second."""
        self.bar.set_postfix_str(f"loss {loss:.3f}, norm {norm:.2f}, lr {lr:.1e}, {speed:,.0f} tokens/s")
        self.bar.update()
        if step % self.run.train.log_every == 0:
            self._write(step=step, loss=loss, grad_norm=norm, lr=lr, tokens_per_second=speed)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            say(f"step {step}: loss {loss}, gradient norm {norm}; update skipped, weights unchanged")

    def losses(self, done: int, losses: dict[str, float]) -> None:
        """Logs held-out losses in nats, by language, after `done` updates."""
        self.means[done] = mean = sum(losses.values()) / len(losses)
        self._write(step=done, held_out=losses, mean=mean)
        at_the_start = "" if done else f", ln V = {math.log(self.run.model.vocab_size):.3f}"
        say(f"step {done}: held-out loss {mean:.3f}{at_the_start}")
