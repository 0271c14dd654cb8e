"""What a GPU will meet, as far as a CPU can show it: when Python waits for a result, and benchmarks/gpu.py in small."""

import json

import pytest
import torch
from conftest import ROWS, SMALL
from torch.utils._python_dispatch import TorchDispatchMode

import train_encoder
import train_seq2seq
import trainer


class Waits(TorchDispatchMode):
    """Notes the operations whose result, or its shape, Python must know: on a GPU each waits for all work before it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "index" in op.name():  # by a mask it looks for the positions first
            waits = any(i is not None and i.dtype == torch.bool for i in args[1] if isinstance(args[1], (list, tuple)))
        else:
            waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(op.tags)
        if waits:
            self.seen.append(op.name())
        return op(*args, **kwargs or {})


def test_python_waits_for_a_gpu_once_an_update(command, data_dir, monkeypatch):
    """For loss and norm together, at the end, whether there are four micro-batches or one."""
    update, to_list, counts = trainer.Training.update, torch.Tensor.tolist, []

    def counted(*arguments):
        with Waits() as waits, monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda x: waits.seen.append("tolist") or to_list(x))
            out = update(*arguments)
        counts.append(waits.seen)
        return out

    monkeypatch.setattr(trainer.Training, "update", counted)
    for micro in (1, 4):
        flags = ["--data", data_dir, *ROWS, "--steps", 2, "--micro-batch-size", micro]
        command(train_encoder, *flags, *SMALL, "--out", f"enc{micro}.pt")
        stage2 = ["--init", f"enc{micro}.pt", "--unfreeze-at", 0.5, "--fusion", "--noise", "sentinel"]
        command(train_seq2seq, *flags, *stage2, "--optimizer", "adamw", "--out", f"seq2seq{micro}.pt")
    assert counts == 8 * [["tolist"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_the_benchmark_says_so(script):
    done = script("benchmarks/gpu.py")
    expected = "gpu.py: no GPU was found; --smoke runs the same code at a tiny shape on a CPU\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


@pytest.mark.slow
def test_the_benchmark_in_small(script, tmp_path):
    """What is measured is not measured again."""
    parts = ["benchmarks/gpu.py", "--smoke", "--out", tmp_path, "projection", "speed-small"]
    done, again = script(*parts), script(*parts)
    assert done.returncode == 0 and done.stdout.count("\n") == 7 and "failed" not in done.stdout, done.stdout
    assert (again.returncode, again.stdout) == (0, ""), again.stderr
    (row, _) = [json.loads(line) for line in (tmp_path / "speed-small.jsonl").read_text().splitlines()]
    assert row["tokens/s"] > 0 and "aten::" in (tmp_path / "speed-small-small-mlm-eager.txt").read_text()
