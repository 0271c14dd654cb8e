"""The losses of a short run of every kind, beside those in golden.json: whoever moves code changes no computed bit.

    python tests/test_golden.py    # writes golden.json anew, where a change of the numbers is meant

On the kind of processor and the version of torch that wrote the file the numbers must be equal; elsewhere, where
products are added up in another order, they must agree to four digits.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden.json"
SHAPE = "--d-model 32 --n-heads 2 --d-ff 64 --encoder-layers 2 --dropout 0.1"
ROWS = "--batch-size 8 --seq-len 32 --dtype fp32 --log-every 1 --eval-every 3 --save-every 3 --schedule linear"
RUNS = {  # name of the checkpoint -> script and flags, or the number of the processes before them
    "enc": f"train_encoder.py {SHAPE} --steps 6 --mask-prob 0.15",
    "adamw": f"train_encoder.py {SHAPE} --steps 6 --mask-prob 0.15 --optimizer adamw --positions learned "
    "--micro-batch-size 3",
    "scratch": f"train_seq2seq.py {SHAPE} --decoder-layers 1 --steps 6 --clm-fraction 0.2",
    "masks": f"train_seq2seq.py {SHAPE} --decoder-layers 1 --steps 3 --noise mask",
    "thaw": "train_seq2seq.py --init enc.pt --unfreeze-at 0.5 --steps 6 --fusion --noise sentinel",
    "init-decoder": "train_seq2seq.py --init enc.pt --unfreeze-at 0.5 --steps 6 --init-decoder",
    "extracted": "extract.py scratch.pt",
    "continued": "train_encoder.py --init extracted.pt --steps 6 --mask-prob 0.15",
    "ddp": "2 train_seq2seq.py --init enc.pt --unfreeze-at 0.5 --steps 6",
    "fsdp": "2 train_seq2seq.py --init enc.pt --unfreeze-at 0.5 --steps 6 --parallel fsdp",
}


def machine() -> list[str]:
    return [torch.__version__, torch.backends.cpu.get_cpu_capability()]


def measured(folder: Path) -> dict[str, list[float]]:
    """Training and held-out losses of every run, in the order of their log."""
    losses = {}
    for name, line in RUNS.items():
        processes, script, *flags = line.split() if line[0].isdigit() else ["1", *line.split()]
        start = ["-m", "torch.distributed.run", "--nproc-per-node", processes] if processes != "1" else []
        command = [sys.executable, *start, str(ROOT / script), *flags, "--out", f"{name}.pt"]
        command += ROWS.split() if script.startswith("train") else []
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        log = folder / f"{name}.run" / "metrics.jsonl"
        if log.exists():
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            losses[name] = [line["loss"] if "loss" in line else line["mean"] for line in lines]
    return losses


@pytest.mark.slow
def test_no_computed_bit_has_changed(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    seen = measured(tmp_path)
    if golden["machine"] == machine():
        assert seen == golden["losses"]
    else:
        assert seen.keys() == golden["losses"].keys()
        for name, losses in seen.items():
            assert losses == pytest.approx(golden["losses"][name], rel=1e-4), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps({"machine": machine(), "losses": measured(Path(folder))}, indent=1) + "\n")
