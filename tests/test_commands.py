"""The documented commands as a new user runs them: a copy of the repository, processes of their own."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, SMALL

import cli
import data

LANGUAGES = ["ar", "de", "en", "es", "fr", "hi", "it", "ja", "mr", "pt", "ta", "te"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The repository without anything that git ignores: what a fresh clone holds."""
    folder = tmp_path_factory.mktemp("fresh") / "clone"
    ignored = shutil.ignore_patterns(".git", ".venv", "data", "demo", "*.run", "*.pt", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def run(checkout: Path, line: str, **more) -> subprocess.CompletedProcess:
    """A line of the README, with this interpreter's torchrun and python."""
    words = line.split()
    start = {"torchrun": [sys.executable, "-m", "torch.distributed.run"], "python": [sys.executable]}
    words = start[words[0]] + words[1:]
    return subprocess.run(words, cwd=checkout, capture_output=True, text=True, timeout=280, **more)


@pytest.mark.slow
def test_the_three_commands_without_any_flag_but_the_length(checkout):
    """They make the shards of the embedded corpus on first use; 2 steps of 4 rows in place of the default's."""
    short = "--steps 2 --batch-size 4"
    for line in (
        f"torchrun train_encoder.py {short}",
        f"torchrun train_seq2seq.py --init enc.pt --unfreeze-at 0.5 {short}",
        "python eval.py seq2seq.pt",
        "python extract.py seq2seq.pt --out enc-extracted.pt",
        f"torchrun train_encoder.py --init enc-extracted.pt --out enc-mlm.pt {short}",
    ):
        done = run(checkout, line)
        assert done.returncode == 0, done.stderr
        if "eval" in line:
            table = {row.split()[0] for row in done.stdout.splitlines() if re.match(r"[a-z]{2}  ", row)}
            assert table == set(LANGUAGES)
    assert (checkout / "enc-mlm.pt").exists() and (checkout / "sample" / "data" / "te.json").exists()
    moved = checkout.rename(checkout.with_name("moved"))  # checkpoints do not name the folder that the code was in
    assert run(moved, "python eval.py enc.pt --task loss --langs en").returncode == 0
    os.truncate(moved / "sample" / "data" / "en.json", 0)  # as if it had not been finished
    done = run(moved, "python eval.py enc.pt")
    assert done.returncode == 2 and re.fullmatch(
        r".*sample/data: not finished: en; run data.py again .*\n", done.stderr
    )
    assert [path.name for path in (moved / "sample").iterdir() if "data." in path.name] == []
    shutil.rmtree(moved / "sample" / "data")
    assert run(moved, "python eval.py enc.pt --task loss --langs en").returncode == 0
    moved.rename(checkout)


@pytest.mark.parametrize("name", ["train_encoder.py", "train_seq2seq.py", "extract.py", "eval.py", "data.py"])
def test_every_flag_has_a_help_line(checkout, name):
    done = run(checkout, f"python {name} --help")
    assert done.returncode == 0
    flags = re.findall(r"^  (--[a-z-]+)(.*(?:\n {10,}.*)?)", done.stdout, re.M)
    assert flags or name == "extract.py"
    for flag, rest in flags:
        words = re.sub(r"\{.*?\}|[A-Z_]{2,}|\[.*?\]|\.\.\.", "", rest).split()
        assert len(words) >= 2, f"{flag} has no help"


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("python train_encoder.py --steps -1", "--steps is -1"),
        ("python train_encoder.py --steps many", "--steps"),
        ("python train_encoder.py --colour red", "--colour"),
        ("python train_encoder.py --optimizer sgd", "--optimizer"),
        ("python train_seq2seq.py --unfreeze-at 0.5", "--unfreeze-at: there is no trained encoder to work with"),
        ("python eval.py nowhere.pt", "nowhere.pt: no such file"),
        ("python extract.py nowhere.pt", "nowhere.pt: no such file"),
        ("python data.py nowhere out", "nowhere: no such folder"),
    ],
)
def test_mistakes_end_with_status_2_and_no_traceback(checkout, line, complaint):
    done = run(checkout, line + (" --out mistake.pt" if "train" in line or "extract" in line else ""))
    assert done.returncode == 2 and complaint in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr + done.stdout
    assert not (checkout / "mistake.pt").exists()


@pytest.mark.parametrize("ask", [torch.empty, np.empty], ids=["torch", "numpy"])
def test_too_little_memory_is_one_line(ask, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.run_command(lambda: ask(1 << 50))
    said = capsys.readouterr().err
    assert re.fullmatch(r"[^\n]*: out of memory \([^\n]*\); use smaller micro-batches [^\n]*\n", said)


@pytest.mark.parametrize(
    "error, said",
    [
        (MemoryError("full"), "process 1: .*: out of memory .*\n"),
        (cli.InputError("--lr -1: raise it"), ""),
        (cli.OneProcessError("row 7: bad"), "[^\n]*row 7: bad\n"),
    ],
)
def test_a_process_that_is_not_the_first_says_what_only_it_can_know(monkeypatch, capsys, error, said):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")

    def main() -> None:
        raise error

    with pytest.raises(SystemExit, match="2"):
        cli.run_command(main)
    assert re.fullmatch(said, capsys.readouterr().err)


def test_other_faults_of_memory_keep_their_traceback():
    def main() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        cli.run_command(main)


def test_a_folder_that_may_not_be_read_is_one_line(capsys):
    root = os.geteuid() == 0  # whom no mode keeps out
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which is below a folder of root's
        os.chmod(folder, 0o755)
        text = Path(folder) / "text"
        text.mkdir(mode=0)
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(SystemExit, match="2"):
                cli.run_command(lambda: data.find_text(text))
        finally:
            if root:
                os.seteuid(0)
    assert re.fullmatch(r"/\S+: permission denied; [^\n]*\n", capsys.readouterr().err)


def test_output_that_nobody_reads_or_no_disk_takes_is_no_traceback(tmp_path):
    line = [sys.executable, "-c", "import cli; cli.run_command(lambda: print('x' * 10**6))"]
    for flags, status, said in (
        ("| true", 141, ""),
        ("> /dev/full", 2, "-c: its output: no space left on device; "),
    ):
        shell = f"{shlex.join(line)} {flags}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", shell], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert done.returncode == status and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)
    line = [sys.executable, ROOT / "train_encoder.py", *SMALL, *ROWS, "--steps", 3, "--eval-every", 1]
    shell = f"{shlex.join(map(str, line))} | true; exit ${{PIPESTATUS[0]}}"
    unbuffered = dict(os.environ, PYTHONUNBUFFERED="1")  # every line meets the closed pipe, and the run outlives it
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=unbuffered, stderr=subprocess.PIPE, text=True)
    assert not done.stderr and done.returncode == 0 and (tmp_path / "enc.pt").exists()


def test_output_that_takes_ascii_only_is_no_traceback():
    line = [sys.executable, "-c", "import cli; cli.run_command(lambda: print('नदी'))"]
    done = subprocess.run(
        line, cwd=ROOT, env=dict(os.environ, PYTHONIOENCODING="ascii"), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "\\u0928\\u0926\\u0940\n"


def test_a_name_too_long_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.run_command(lambda: open("x" * 300))
    assert capsys.readouterr().err.endswith(
        "xxx: file name too long; change its permissions, make room or choose another\n"
    )


def test_the_embedded_corpus():
    """Twelve languages, at least 150 sentences each, line by line translations of each other, each line once."""
    files = {path.stem: path.read_text("utf-8") for path in (ROOT / "sample" / "text").iterdir()}
    assert sorted(files) == LANGUAGES
    lines = {language: text.split("\n") for language, text in files.items()}
    shape = [bool(line) for line in lines["en"]]
    assert sum(shape) >= 150 and all([bool(x) for x in each] == shape for each in lines.values())
    for language, each in lines.items():
        sentences = [line for line in each if line]
        assert len(set(sentences)) == len(sentences), language
    scripts = {"ar": "؀-ۿ", "hi": "ऀ-ॿ", "mr": "ऀ-ॿ", "ja": "぀-ヿ一-鿿", "ta": "஀-௿", "te": "ఀ-౿"}
    for language, script in scripts.items():
        letters = [c for c in files[language] if c.isalpha()]
        assert sum(bool(re.match(f"[{script}]", c)) for c in letters) > 0.9 * len(letters), language


def test_nothing_needs_more_than_the_four_packages():
    """Every import statement of the scripts names the standard library, another script, or one of the four.

    The files for transformers, hf*.py, and two formats of text are the exceptions: only functions import them.
    """
    optional = {"extract.py": {"hf"}, "task_data.py": {"pyarrow"}}
    optional["text.py"] = {"pyarrow", "backports", "compression"}
    scripts = [path for path in ROOT.glob("*.py") if not path.name.startswith("hf")]
    allowed = (
        {"torch", "numpy", "sentencepiece", "tqdm"} | set(sys.stdlib_module_names) | {path.stem for path in scripts}
    )
    for path in scripts:
        tree = ast.parse(path.read_text("utf-8"))
        inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
        for node in ast.walk(tree):
            names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            extra = optional.get(path.name, set()) if id(node) in inside else set()
            assert {name.split(".")[0] for name in names} <= allowed | extra, f"{path.name}: {names}"
    assert len(scripts) > 15
