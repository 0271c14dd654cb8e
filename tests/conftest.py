import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

MODULES = tempfile.TemporaryDirectory()  # for code that transformers copies out of a folder, else in the user's home
os.environ["HF_MODULES_CACHE"] = MODULES.name

import torch  # noqa: E402

import data  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

torch.set_num_threads(1)  # models this small are no faster with two, and slower beside other work
hypothesis.settings.register_profile("steady", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("steady")

# A model of a few thousand weights, so that a test takes a second.
SMALL = ["--d-model", "32", "--n-heads", "2", "--d-ff", "64", "--encoder-layers", "2"]
ROWS = ["--batch-size", "4", "--seq-len", "32", "--dtype", "fp32"]


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory) -> Path:
    """Three languages of the embedded corpus."""
    folder = tmp_path_factory.mktemp("text")
    for language in ("de", "en", "hi"):
        (folder / f"{language}.txt").write_bytes((data.SAMPLE_TEXT / f"{language}.txt").read_bytes())
    return folder


@pytest.fixture(scope="session")
def data_dir(text_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    data.prepare(text_dir, folder, vocab_size=1000, valid_fraction=0.2)
    return folder


@pytest.fixture
def command(monkeypatch, tmp_path) -> Callable[..., None]:
    """Runs the main function of a script in this process and in an empty folder, with the given arguments."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        module.main()

    return run


@pytest.fixture(scope="session")
def tokenizer(data_dir):
    return load_tokenizer((data_dir / "tokenizer.model").read_bytes(), "x")


@pytest.fixture(scope="session")
def ids(tokenizer):
    return data.SpecialIds(tokenizer.vocab_size())


@pytest.fixture
def checkpoints(command, data_dir, tmp_path) -> Path:
    """A folder with enc.pt and, on top of it, seq2seq.pt, of two steps each."""
    import train_encoder
    import train_seq2seq

    command(train_encoder, "--data", data_dir, *SMALL, *ROWS, "--steps", 2, "--out", "enc.pt")
    command(train_seq2seq, "--data", data_dir, *ROWS, "--init", "enc.pt", "--steps", 2, "--out", "seq2seq.pt")
    return tmp_path


@pytest.fixture
def script(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script in a process of its own, as a user does."""

    def run(name: str, *arguments: object, **more) -> subprocess.CompletedProcess:
        line = [sys.executable, str(ROOT / name), *map(str, arguments)]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300, **more)

    return run
