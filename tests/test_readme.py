"""What README.md and recipes/README.md say can be typed, typed: every command, shortened, and every listing."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import report
from conftest import ROOT

import data
import eval as evaluation
import extract
import objectives
import train_encoder
import train_seq2seq
from checkpoint import load_checkpoint
from tokenizer import SpecialIds

TEXT = (ROOT / "README.md").read_text("utf-8")
RECIPES, RESULTS = ((ROOT / folder / "README.md").read_text("utf-8") for folder in ("recipes", "results"))
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT + RECIPES, re.S)
MODULES = {f"{m.__name__}.py": m for m in (data, evaluation, extract, report, train_encoder, train_seq2seq)}
ELSEWHERE = {  # why a command is not run here
    r"make |pip install transformers": "continuous integration runs make test; the others were run by hand",
    r"recipes/[^r]|recipes/r[ou]|SCALE=": "test_recipes.py runs every recipe",
}
SHORT = {
    "data.py": ["--vocab-size", "2000", "--valid-fraction", "0.2"],
    "train_encoder.py": ["--steps", "2", "--batch-size", "4", "--eval-every", "1000"],
    "train_seq2seq.py": ["--steps", "2", "--batch-size", "4", "--eval-every", "1000"],
}


def commands() -> list[str]:
    """Command lines of the README without comments, each section that prepares data of its own behind a `cd own`."""
    out = []
    for section in re.split(r"^#+ ", TEXT + RECIPES, flags=re.M):
        lines = [line for block in re.findall(r"```\n(.*?)```", section, re.S) for line in block.splitlines()]
        lines = [line.split(" #")[0].strip() for line in lines]
        out += ["cd own" if "data.py TEXT" in section else "cd ."]
        out += [line for line in lines if re.match(r"(torchrun|python) |" + "|".join(ELSEWHERE), line)]
    return out


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder with text and small task sets, in which command lines are run in this process."""
    monkeypatch.chdir(tmp_path)
    Path("own/TEXT").mkdir(parents=True)
    for language in ("en", "hi"):
        (Path("own/TEXT") / f"{language}.txt").write_bytes((data.SAMPLE_TEXT / f"{language}.txt").read_bytes())
    for folder, name, item in (
        ("UDPOS", "conllu", "1\tthe\t_\tDET\t_\n2\triver\t_\tNOUN\t_\n\n"),
        ("MTOP", "tsv", "call home\t[IN:CALL [SL:PLACE home ] ]\n"),
        ("TOPICS", "tsv", "rivers\tthe river sleeps\nbread\tthe bread is warm\n"),
    ):
        (Path(folder) / "en").mkdir(parents=True)
        for split in ("train", "dev", "test"):
            (Path(folder) / "en" / f"{split}.{name}").write_text(item * 4)

    def run(line: str) -> None:
        starter, name, *arguments = shlex.split(line)
        if starter == "cd":
            monkeypatch.chdir(tmp_path / name)
            return
        if name.startswith("train"):  # an earlier screen's model of that name may be there
            default = "enc.pt" if name == "train_encoder.py" else "seq2seq.pt"
            out = Path(arguments[arguments.index("--out") + 1] if "--out" in arguments else default)
            for old in (out, *out.with_suffix(".run").glob("*")):
                old.unlink(missing_ok=True)
        elif name == "data.py" and Path(arguments[1]).exists():
            return  # the same command as on an earlier screen
        if ("--task" in arguments and "--data" in arguments) or "slots" in arguments:
            arguments += ["--epochs", "1"]
        monkeypatch.setattr(sys, "argv", [name, *arguments, *SHORT.get(name, [])])
        MODULES[Path(name).name].main()

    return run


@pytest.mark.slow
def test_every_command(user, tmp_path):
    done = []
    for line in commands():
        if any(re.match(pattern, line) for pattern in ELSEWHERE) or line.startswith("python benchmarks"):
            continue
        if "runs/demo/" in line:
            user("torchrun train_seq2seq.py --init enc.pt --fusion --unfreeze-at 1 --out fused.pt")
            for name in re.findall(r"\S+\.pt", line):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_bytes(Path("fused.pt").read_bytes())
        user(line)
        done.append(line)
    assert len(done) > 20 and (tmp_path / "OUT" / "tables.md").exists() and (tmp_path / "again.pt").exists()


@pytest.mark.slow
def test_how_to_change_it(user, data_dir):
    scripts = {re.match(r"# (\w+\.py)\n", block)[1]: block for kind, block in BLOCKS if kind == "python"}
    assert sorted(scripts) == ["shuffled.py", "topics.py"]
    user(f"torchrun train_encoder.py --data {data_dir} --out enc.pt")
    (line,) = re.findall(r"`(python topics\.py [^`]*)`", RECIPES)
    for name, words in (
        ("shuffled.py", "python shuffled.py --init enc.pt --unfreeze-at 1 --out s.pt --steps 2 --batch-size 4"),
        ("topics.py", f"{line} --epochs 1"),
    ):
        assert sum(bool(x) and x[0] != "#" for x in scripts[name].splitlines()) <= 10
        Path(name).write_text(scripts[name])
        line_ = [sys.executable, *words.split()[1:]]
        done = subprocess.run(line_, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    stage = load_checkpoint(Path("s.pt"))["history"][-1]
    assert re.search(r"en +8 +\d+\.\d\d", done.stdout) and stage["flops"] < stage["thawed_flops"]


def test_the_drawn_objectives():
    words = re.search(r"^row +(.*)", TEXT, re.M)[1].split()
    ids = SpecialIds(106 + len(words))
    names = {ids.mask: "<mask>", ids.clm: "[CLM]"} | {ids.sentinel + k: f"<extra_id_{k}>" for k in range(3)}
    names |= {106 + i: word for i, word in enumerate(words)}
    row, spans = 106 + np.arange(6), (np.array([1, 5]), np.array([2, 1]))

    def drawn(name: str) -> list[list[str]]:
        return [x.split() for x in re.search(rf"^{name}  +(.*?)   +asks for: (.*)", TEXT, re.M).groups()]

    source, target = objectives.sentinel_spans(row, *spans, ids)
    shown = {
        "drop": (objectives.drop_spans(row, *spans), row),
        "mask": (objectives.mask_spans(row, *spans, ids), row),
        "sentinel": (source, target),
    }
    for name, pair in shown.items():
        assert drawn(name) == [[names[t] for t in tokens] for tokens in pair]
    rngs = [np.random.default_rng(i) for i in range(2000)]  # some draw must be the one shown
    masked = [objectives.mask_tokens(row, rng, ids, 0.4) for rng in rngs]
    asked = [" ".join(f"{names[t]} at {i}," for i, t in enumerate(labels) if t >= 0)[:-1] for _, labels in masked]
    assert drawn("MLM") in [[[names[t] for t in x], y.split()] for (x, _), y in zip(masked, asked)]
    cut = [objectives.clm_row(row, rng, ids) for rng in rngs[:100]]
    assert drawn("CLM") in [[[names[t] for t in tokens] for tokens in pair] for pair in cut]


def test_every_file_and_function_that_is_named_exists():
    for name in re.findall(r"`((?:\w+/)?\w+\.(?:py|sh|md))`", TEXT):
        found = [folder / name for folder in (ROOT, ROOT / "tests") if (folder / name).exists()]
        assert found or name in ("scale.sh",), name
    guide = TEXT[TEXT.index("## Reading it") : TEXT.index("## Changing it")]
    code = "".join(path.read_text("utf-8") for path in ROOT.glob("*.py"))
    for name in re.findall(
        r"`([A-Za-z_]+)`", guide[guide.index("| in the paper") : guide.index("What the objectives")]
    ):
        assert re.search(rf"^(def|class) {name}\b", code, re.M), name


LEARNED = [f"learned/{name}" for name in ("mini", "three", "twelve", "plateau")]


@pytest.mark.parametrize("name", ["midi", "mini", "long", "six-times", *LEARNED])
def test_the_results_are_those_of_the_files(tmp_path, command, name):
    """The tables are made again from the collected numbers; the pages have the claim's losses as they are there."""
    files = sorted((ROOT / "results").glob(f"{name}*/results.jsonl"))
    command(report, *files, "--out", "OUT")
    tables = Path("OUT/tables.md").read_text()
    assert tables == (ROOT / "results" / name / "tables.md").read_text()
    claim = ("2stage-bart-12e12d-unfrz", "bart-12e12d", "2stage-bart-12e12d")
    half = ("bart-12e12d", "stage2-0.3-id")
    short = (*half, "stage2-4-id", "stage2-0.4-id")
    if wanted := {"mini": claim, "midi": claim, "long": short, "six-times": half}.get(name.split("/")[-1]):
        page = RESULTS if "/" not in name else (ROOT / "results/learned/README.md").read_text("utf-8")
        generation = tables[tables.index("# Generation") :].split("Held-out losses")[0].splitlines()
        rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in generation if line.startswith("| ")}
        for row in wanted:
            loss = rows[row][3].strip(" |")
            assert loss in page and (name != "midi" or loss in TEXT), (row, loss)
    if name == "midi":
        shown = [set(re.findall(r"[\d.]+ ± [\d.]+", page)) for page in (TEXT, RESULTS)]
        lines = [line.strip("| ").split(" | ") for line in tables.split("Held-out losses")[0].splitlines()]
        tasks = next(line for line in lines if line[0] == "model")
        trained = [k for k, title in enumerate(tasks) if title.endswith(": trained")]
        for line in lines[lines.index(tasks) :]:
            if line[0] in ("roberta-12e", "bart-12e12d", "bart-12e12d+mlm", "random"):
                assert {line[k] for k in trained} <= shown[1], line[0]
                k = tasks.index("pos: trained")  # tagging: other languages, the trained one
                assert line[0] == "random" or set(line[k - 1 : k + 1]) <= shown[0] & shown[1], line[0]
