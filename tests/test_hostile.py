"""Files of a stranger: refused in one line, soon, in little memory; nothing in them is run, nothing is overwritten."""

import gzip
import hashlib
import json
import lzma
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROWS, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import train_encoder
from checkpoint import load_checkpoint, load_model
from data import InputError, TokenData, document_text, load_tokenizer, raw_documents

SECONDS, MEMORY = (
    5,
    1 << 30,
)  # of processor time, for a busy machine is no fault of ours; bytes resident, torch's included


class Evil:
    """Pickled, it is a call that leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


# A folder with everything that the commands below read; made once, copied for each case.


@pytest.fixture(scope="module")
def original(tmp_path_factory, data_dir, text_dir):
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(data_dir, folder / "DATA")
    shutil.copytree(text_dir, folder / "TEXT")
    before, sys.argv = (os.getcwd(), sys.argv), ["train_encoder.py", "--data", "DATA", *SMALL, *ROWS, "--steps", "2"]
    os.chdir(folder)
    train_encoder.main()
    os.chdir(before[0])
    sys.argv = before[1]
    shutil.copytree(folder / "DATA", folder / "PARTS")
    (folder / "PARTS" / "meta.json").rename(folder / "PARTS" / "meta.1of1000.json")
    return folder


# Checkpoints -------------------------------------------------------------------------------------------------------


def changed(change: Callable[[dict], object], name: str = "enc.pt") -> Callable[[], None]:
    """Writes the checkpoint again after a change to its content."""

    def write() -> None:
        content = torch.load(name, weights_only=True)
        change(content)
        torch.save(content, name)

    return write


def config(**values) -> Callable[[], None]:
    return changed(lambda c: c["config"].update(values))


def weight(x) -> Callable[[], None]:
    """x, or x(embedding), in place of the embedding's tensor."""
    return changed(
        lambda c: c["weights"].update({"embed.weight": x(c["weights"]["embed.weight"]) if callable(x) else x})
    )


def stage(**values) -> Callable[[], None]:
    return changed(lambda c: c["history"][0].update(values))


def records(change: Callable[[str, bytes], tuple[str, bytes, int]]) -> Callable[[], None]:
    """Writes the archive again with each record as change(name, content) gives it: name, content, compression."""

    def write() -> None:
        with zipfile.ZipFile("enc.pt") as old, zipfile.ZipFile("new.pt", "w") as new:
            for name in old.namelist():
                name, content, compression = change(name, old.read(name))
                new.writestr(name, content, compression)
        os.replace("new.pt", "enc.pt")

    return write


def flipped(where: float) -> Callable[[], None]:
    """One bit changed, at this share of the file."""

    def write() -> None:
        raw = bytearray(Path("enc.pt").read_bytes())
        raw[int(where * (len(raw) - 1))] ^= 4
        Path("enc.pt").write_bytes(raw)

    return write


def bomb() -> None:
    """A tensor of 4 GB in 4 MB."""
    with zipfile.ZipFile("enc.pt") as old, zipfile.ZipFile("new.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name in old.namelist():
            if not name.endswith("/data/0"):
                new.writestr(name, old.read(name))
        with new.open("enc/data/0", "w", force_zip64=True) as record:
            for _ in range(64):
                record.write(bytes(1 << 24))
    os.replace("new.pt", "enc.pt")


def claim() -> None:
    """The first tensor of the archive says that it has 2**60 rows."""

    def change(name: str, content: bytes) -> tuple[str, bytes, int]:
        if name.endswith("data.pkl"):
            rows = b"M" + struct.pack("<H", 1000) + b"K\x20\x86"  # the pickle of the shape (1000, 32)
            assert content.count(rows) >= 1
            content = content.replace(rows, b"\x8a\x08" + struct.pack("<q", 1 << 60) + b"K\x20\x86", 1)
        return name, content, zipfile.ZIP_STORED

    records(change)()


def cycle(content: dict) -> None:
    content["history"].append(content["history"])


def deep(content: dict) -> None:
    nest: list = []
    for _ in range(300):
        nest = [nest]
    content["history"] = nest


def pickled(content: object) -> Callable[[], None]:
    return lambda: Path("enc.pt").write_bytes(pickle.dumps(content))


CHECKPOINTS = {
    "a pickle that runs code": (pickled(Evil()), "refused"),
    "an archive whose pickle runs code": (changed(lambda c: c.update(config=Evil())), "more than tensors"),
    "code in the history": (changed(lambda c: c["history"].append(Evil())), "more than tensors"),
    "code in torch's older format": (
        lambda: torch.save({"weights": Evil()}, "enc.pt", _use_new_zipfile_serialization=False), "refused"
    ),
    "a zip bomb": (bomb, "refused, damaged"),
    "compressed records": (records(lambda n, c: (n, c, zipfile.ZIP_DEFLATED)), "refused, damaged"),
    "a tensor that claims 2**60 rows": (claim, "refused|do not fit"),
    "a tensor of 2**60 numbers over one": (weight(torch.zeros(1).expand(1 << 60)), "do not fit"),
    "an embedding over one row": (weight(lambda x: x[:1].expand(*x.shape)), "claims more than there is"),
    "a sparse tensor": (weight(lambda x: x.to_sparse()), "do not fit|refused"),
    "a tensor of another shape": (weight(lambda x: x.T.contiguous()), "do not fit"),
    "a tensor of float64": (weight(lambda x: x.double()), "not float32"),
    "a tensor of integers": (weight(lambda x: x.long()), "not float32"),
    "a complex tensor": (weight(lambda x: x + 0j), "not float32"),
    "a list for a tensor": (weight([1.0, 2.0]), "do not fit"),
    "a string for a tensor": (weight("embed.weight"), "do not fit"),
    "a tensor too few": (changed(lambda c: c["weights"].pop("embed.weight")) , "do not fit"),
    "a tensor too many": (changed(lambda c: c["weights"].update(more=torch.ones(3))), "do not fit"),
    "weights that are a list": (changed(lambda c: c.update(weights=[torch.ones(3)])), "do not fit"),
    "weights under numbers": (changed(lambda c: c.update(weights={1: torch.ones(3)})), "do not fit"),
    "a width of 2**40": (config(d_model=1 << 40), "do not fit"),
    "a width of 2**62": (config(d_model=1 << 62), "do not fit"),
    "2**30 layers": (config(n_encoder_layers=1 << 30), "do not fit"),
    "2**50 pieces": (config(vocab_size=1 << 50), "do not fit"),
    "2**50 positions": (config(max_len=1 << 50), "do not fit"),
    "0 heads": (config(n_heads=0), "do not fit"),
    "half a head": (config(n_heads=0.5), "do not fit"),
    "a negative width": (config(d_model=-32), "do not fit"),
    "a width in letters": (config(d_model="32"), "do not fit"),
    "a field that we do not have": (config(activation="relu"), "do not fit"),
    "a config that is a list": (changed(lambda c: c.update(config=[1])), "do not fit"),
    "a kind that we do not have": (changed(lambda c: c.update(kind="decoder")), "kind 'decoder'"),
    "a kind that is a list": (changed(lambda c: c.update(kind=["encoder"])), "of kind|do not fit"),
    "a tokenizer of random bytes": (changed(lambda c: c.update(tokenizer=os.urandom(999))), "not a Sent"),
    "an empty tokenizer": (changed(lambda c: c.update(tokenizer=b"")), "not a Sent|refused"),
    "a tokenizer that is a number": (changed(lambda c: c.update(tokenizer=5)), "do not fit"),
    "a history of numbers": (changed(lambda c: c.update(history=[1, 2])), "do not fit"),
    "data that is a number": (changed(lambda c: c["history"][0]["settings"].update(data=1)), "not one"),
    "rows of a word": (changed(lambda c: c["history"][0]["settings"].update(seq_len="long")), "not one"),
    "rows of 32.0 tokens": (changed(lambda c: c["history"][0]["settings"].update(seq_len=32.0)), "not one"),
    "rows over the positions": (changed(lambda c: c["history"][0]["settings"].update(seq_len=1 << 40)), "not one"),
    "a history that holds itself": (changed(cycle), "do not fit|refused"),
    "a history of 300 lists in each other": (changed(deep), "do not fit|refused"),
    "steps in letters": (stage(steps="2"), "do not fit"),
    "fewer steps than none": (stage(steps=-1), "do not fit"),
    "10**400 operations": (stage(flops=10**400), "do not fit|refused"),
    "operations that are no number": (stage(flops=float("nan")), "do not fit"),
    "settings that are a list": (stage(settings=[]), "do not fit"),
    "a stage without a name": (stage(stage=None), "do not fit"),
    "a bit flipped early": (flipped(0.02), "refused"),
    "a bit flipped in a tensor": (flipped(0.5), "refused"),
    "a bit flipped in the directory": (flipped(0.98), "refused"),
    "a record twice": (
        lambda: zipfile.ZipFile("enc.pt", "a").writestr("enc/data/1", b"x" * 40), "refused"
    ),
    "half a file": (lambda: os.truncate("enc.pt", 5000), "refused"),
    "100,000 lists in each other": (
        records(lambda n, c: (n, c if "data.pkl" not in n else b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", 0)),
        "refused|not a checkpoint",
    ),
    "an empty file": (lambda: os.truncate("enc.pt", 0), "refused"),
    "a folder": (lambda: (os.remove("enc.pt"), os.mkdir("enc.pt")), "cannot be read"),
    "a pipe": (lambda: (os.remove("enc.pt"), os.mkfifo("enc.pt")), "cannot be read"),
    "a file of NumPy's": (lambda: (np.savez("x.npz", x=np.ones(3)), os.replace("x.npz", "enc.pt")), "refused"),
    "a text": (lambda: Path("enc.pt").write_text("weights"), "refused"),
}  # fmt: skip


# Checkpoints to resume from ----------------------------------------------------------------------------------------

NO_FIT = "optimizer state of its newest checkpoint does not fit"
RESUME = "enc.run/000000002.pt"


def resume(change: Callable[[dict], object]) -> Callable[[], None]:
    def write() -> None:
        os.remove("enc.pt")
        changed(change, RESUME)()

    return write


def first_state(content: dict) -> dict:
    return content["optimizers"][0][0]


STATES = {
    "no optimizer state": (resume(lambda c: c.pop("optimizers")), "not a checkpoint"),
    "optimizers that are a number": (resume(lambda c: c.update(optimizers=5)), NO_FIT),
    "an optimizer too many": (resume(lambda c: c["optimizers"].append({})), NO_FIT),
    "a parameter too many": (resume(lambda c: c["optimizers"][0].update({999: {}})), NO_FIT),
    "a moment of another shape": (
        resume(lambda c: first_state(c).update(exp_avg=torch.ones(3))), NO_FIT
    ),
    "a moment that is a string": (resume(lambda c: first_state(c).update(exp_avg="x")), NO_FIT),
    "a moment too few": (resume(lambda c: first_state(c).pop("exp_avg")), NO_FIT),
    "a moment that claims more": (
        resume(lambda c: first_state(c).update(exp_avg=torch.zeros(1, 1).expand(1000, 32))), "do not fit each other"
    ),
    "-1 steps": (resume(lambda c: c["spent"].update(steps=-1)), "not a checkpoint to resume from"),
    "more steps than all": (resume(lambda c: c["spent"].update(steps=3)), "not a checkpoint to resume from"),
    "half a step": (resume(lambda c: c["spent"].update(steps=0.5)), "not a checkpoint to resume from"),
    "settings of another width": (resume(lambda c: c["settings"].update(d_model=64)), "not what its settings say"),
    "a seed in letters": (resume(lambda c: c["settings"].update(seed="0")), "--seed '0': a int is needed"),
    "rows of -1 tokens": (resume(lambda c: c["settings"].update(seq_len=-1)), "--seq-len is -1"),
    "settings that are a list": (resume(lambda c: c.update(settings=[])), "not a checkpoint to resume from"),
    "code in the settings": (resume(lambda c: c["settings"].update(data=Evil())), "more than tensors"),
    "data that is a number": (resume(lambda c: c["settings"].update(data=5)), "--data 5: a str is needed"),
    "a log of nothing": (
        lambda: (os.remove("enc.pt"), Path("enc.run/metrics.jsonl").write_text("{}\n")), "not lines of a run"
    ),
}  # fmt: skip


# Data folders ------------------------------------------------------------------------------------------------------

SHARD = "DATA/en.train.000.bin"


def meta(change: Callable[[dict], object]) -> Callable[[], None]:
    def write() -> None:
        content = json.loads(Path("DATA/meta.json").read_text())
        change(content)
        Path("DATA/meta.json").write_text(json.dumps(content))

    return write


def shard(change: Callable[[bytearray], object]) -> Callable[[], None]:
    def write() -> None:
        raw = bytearray(Path(SHARD).read_bytes())
        change(raw)
        Path(SHARD).write_bytes(raw)

    return write


def replaced(path: str, make: Callable[[Path], object]) -> Callable[[], None]:
    return lambda: (os.remove(path), make(Path(path)))


def names(shards: list) -> Callable[[], None]:
    return meta(lambda m: m["languages"]["en"].update(train=shards))


DATA = {
    "a header that counts 2**60 tokens": (
        shard(lambda raw: struct.pack_into("<Q", raw, 24, 1 << 60)), r"en\.train\.000\.bin: .* bytes, not the"
    ),
    "a folder that counts 2**60 tokens": (names([["en.train.000.bin", 1 << 60]]), r"meta\.json: damaged"),
    "a folder that counts 2**40 tokens": (names([["en.train.000.bin", 1 << 40]]), "bytes, not the"),
    "a folder that counts -1 tokens": (names([["en.train.000.bin", -1]]), r"meta\.json: damaged"),
    "no tokens": (names([]), "'en' has 0 tokens"),
    "tokens over the vocabulary": (
        shard(lambda raw: raw.__setitem__(slice(32, None), b"\xff" * (len(raw) - 32))), "token 65535"
    ),
    "another tokenizer's shard": (shard(lambda raw: raw.__setitem__(10, raw[10] ^ 1)), "not a shard of this folder"),
    "a shard outside": (names([["../enc.pt", 100]]), r"meta\.json: damaged"),
    "a shard of the system": (names([["/etc/passwd", 100]]), r"meta\.json: damaged"),
    "a shard's name that is a number": (names([[5, 100]]), r"meta\.json: damaged"),
    "a link out of the folder": (replaced(SHARD, lambda p: p.symlink_to("/etc/passwd")), "a symbolic link out of"),
    "a shard that is a pipe": (replaced(SHARD, os.mkfifo), "cannot be read"),
    "a shard that is a folder": (replaced(SHARD, os.mkdir), "cannot be read"),
    "languages in a list": (meta(lambda m: m.update(languages=["en"])), r"meta\.json: damaged"),
    "no languages": (meta(lambda m: m.update(languages={})), "no text in any part"),
    "a folder description of lists in lists": (
        lambda: Path("DATA/meta.json").write_text("[" * 100_000), r"meta\.json: damaged"
    ),
    "a folder description of 1 GB": (lambda: os.truncate("DATA/meta.json", 1 << 30), r"meta\.json: damaged"),
    "a folder description that is a pipe": (replaced("DATA/meta.json", os.mkfifo), r"meta\.json: damaged"),
    "one part of a thousand": (lambda: (shutil.rmtree("DATA"), os.rename("PARTS", "DATA")), r"no meta\.2of1000\.json"),
    "a tokenizer of random bytes": (
        replaced("DATA/tokenizer.model", lambda p: p.write_bytes(os.urandom(9999))), "not a SentencePiece model"
    ),
    "a tokenizer linked in": (
        replaced("DATA/tokenizer.model", lambda p: p.symlink_to("/etc/passwd")), "a symbolic link out of"
    ),
    "a tokenizer that is a pipe": (replaced("DATA/tokenizer.model", os.mkfifo), "not a file of at most 64 MB"),
}  # fmt: skip


# Text --------------------------------------------------------------------------------------------------------------


def text(name: str, content: bytes) -> Callable[[], None]:
    return lambda: Path("TEXT", name).write_bytes(content)


def long_line() -> None:
    Path("TEXT/fr.jsonl").write_bytes(b'{"text": "')
    os.truncate("TEXT/fr.jsonl", 1 << 30)


def long_packed_line() -> None:
    with gzip.open("TEXT/fr.jsonl.gz", "wb", 1) as file:
        file.write(b'{"text": "')
        for _ in range(1 << 6):
            file.write(b"a" * (1 << 24))


def wide_xz() -> None:
    """An archive that asks for 1.5 GB to be unpacked: the dictionary's size stands in its header."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    raw = bytearray(lzma.compress(b"text\n" * 9, lzma.FORMAT_XZ, filters=filters, check=lzma.CHECK_NONE))
    at = 12 + 4  # stream header, then size, flags, filter id, size of properties: the properties
    assert raw[at] == 16  # 2**20 so coded
    raw[at] = 37  # 3 * 2**29
    size = (raw[12] + 1) * 4
    struct.pack_into("<I", raw, 12 + size - 4, zlib.crc32(raw[12 : 12 + size - 4]))
    Path("TEXT/fr.txt.xz").write_bytes(raw[:-30])


TEXT = {
    "a line of 1 GB": (long_line, r"fr\.jsonl:1: a line of over 16 MB"),
    "a line of 1 GB in an archive of 1 MB": (long_packed_line, r"fr\.jsonl\.gz:1: a line of over 16 MB"),
    "an archive that asks for 1.5 GB": (wide_xz, r"fr\.txt\.xz: a"),
    "lists in lists": (text("fr.jsonl", b"[" * 1_000_000), r"fr\.jsonl:1: not JSON"),
    "5 million empty lists": (text("fr.jsonl", b"[" + b"[]," * 5_000_000 + b"1]"), r'fr\.jsonl:1: no "text"'),
    "a number of 10 million digits": (text("fr.jsonl", b"1" * 10_000_000), r"fr\.jsonl:1: not JSON"),
    "text that is an object": (text("fr.jsonl", b'{"text": {"text": "x"}}'), r'fr\.jsonl:1: no "text"'),
    "half a surrogate pair": (text("fr.jsonl", b'{"text": "\\udfff"}'), r"fr\.jsonl:1: half a surrogate"),
    "random bytes": (text("fr.txt", bytes(range(256)) * 10), r"fr\.txt:\d+: not UTF-8"),
    "UTF-16": (text("fr.txt", "bonjour".encode("utf-16")), r"fr\.txt:1: not UTF-8"),
    "an archive cut short": (text("fr.txt.gz", gzip.compress(b"hello\n" * 9)[:-9]), r"fr\.txt\.gz: a damaged archive"),
    "no archive at all": (text("fr.txt.xz", os.urandom(500)), r"fr\.txt\.xz: a damaged archive"),
    "a link out of the folder": (lambda: os.symlink("/etc/passwd", "TEXT/fr.txt"), r"fr\.txt: a symbolic link out"),
    "a link to another folder": (lambda: os.symlink("/etc", "TEXT/fr"), r"fr: a symbolic link out of TEXT"),
    "a link further down": (
        lambda: (os.mkdir("TEXT/fr"), os.symlink("../../enc.pt", "TEXT/fr/a.txt")), r"a\.txt: a symbolic link out"
    ),
    "nothing but links in a ring and a pipe": (
        lambda: (shutil.rmtree("TEXT"), os.mkdir("TEXT"), os.symlink("a.txt", "TEXT/a.txt"), os.mkfifo("TEXT/en.txt")),
        "no text in it",
    ),
}  # fmt: skip

TOKENIZERS = {
    "random bytes": (lambda: Path("t.model").write_bytes(os.urandom(9999)), "not a SentencePiece model"),
    "a pipe": (lambda: os.mkfifo("t.model"), "not a file of at most 64 MB"),
    "2 GB": (lambda: (Path("t.model").touch(), os.truncate("t.model", 1 << 31)), "not a file of at most 64 MB"),
    "a link to the system's zeros": (lambda: os.symlink("/dev/zero", "t.model"), "not a file of at most 64 MB"),
}

INIT = ("train_seq2seq", "--data", "DATA", "--init", "enc.pt", "--steps", "1", "--dtype", "fp32")
NEW = ("train_encoder", "--data", "DATA", "--out", "x.pt", *SMALL, *ROWS)
CASES = [
    *((f"checkpoint: {name}", *case, INIT) for name, case in CHECKPOINTS.items()),
    *((f"resume: {name}", *case, ("train_encoder", "--resume")) for name, case in STATES.items()),
    *((f"data: {name}", *case, NEW) for name, case in DATA.items()),
    *((f"text: {name}", *case, ("data", "TEXT", "OUT", "--vocab-size", "500")) for name, case in TEXT.items()),
    *((f"tokenizer: {n}", *case, ("data", "TEXT", "OUT", "--tokenizer", "t.model")) for n, case in TOKENIZERS.items()),
]  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of up to 100 MB; a run's lock and a folder that was to be written are no matter."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size < 1e8 and "OUT" not in path.parts and path.name != "lock":
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run(line: tuple, folder: Path, report: multiprocessing.connection.Connection) -> None:
    """A command in this process; reports its status, processor time in seconds, memory in bytes."""
    os.chdir(folder)
    sys.stdout = open("stdout", "w")
    sys.stderr = open("stderr", "w")
    sys.argv = [f"{line[0]}.py", *line[1:]]
    status = 0
    try:
        cli.run_command(__import__(line[0]).main)
    except SystemExit as end:
        status = end.code
    sys.stderr.flush()
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(u.ru_utime + u.ru_stime for u in usage)
    report.send((status, seconds, sum(u.ru_maxrss for u in usage) * 1024))


@pytest.fixture(scope="module")
def processes():
    """Processes forked off one that has imported the scripts and done nothing else."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # Python before 3.13 does not hand it to the server
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_encoder", "train_seq2seq", "extract", "test_hostile"])
    return context


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_refused(case, original, tmp_path, monkeypatch, processes):
    _, prepare, complaint, line = case
    shutil.copytree(original, tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    prepare()
    assert not Path("executed").exists()
    before = contents(tmp_path / "x")
    report, end = processes.Pipe(duplex=False)
    process = processes.Process(target=run, args=(line, tmp_path / "x", end))
    process.start()
    end.close()
    try:
        assert report.poll(100), "it hangs"
        status, seconds, memory = report.recv()
    finally:
        process.kill()
        process.join()
    said = Path("stderr").read_text()
    print(f"{seconds:.1f} s, {memory / 2**20:.0f} MB: {said}")
    Path("stdout").unlink()
    Path("stderr").unlink()
    assert status == 2 and len(said.splitlines()) == 1 and "Traceback" not in said
    assert re.search(complaint, said), said
    assert seconds < SECONDS and memory < MEMORY
    assert before.items() <= contents(tmp_path / "x").items() and not Path("executed").exists()


def test_the_folder_is_accepted_where_nothing_was_changed(original, tmp_path, monkeypatch, processes):
    """Each command of the cases ends well on the files as they were made."""
    for number, line in enumerate(dict.fromkeys(case[3] for case in CASES)):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        shutil.copy(folder / "DATA" / "tokenizer.model", folder / "t.model")
        if "enc.pt" not in line:
            (folder / "enc.pt").unlink()
        if "x.pt" in line:
            line = (*line, "--steps", "1")
        report, end = processes.Pipe(duplex=False)
        process = processes.Process(target=run, args=(line, folder, end))
        process.start()
        assert report.recv()[0] == 0, (folder / "stderr").read_text()
        process.join()


# Fuzzing: whatever the bytes, a reader gives an answer or an InputError; `make fuzz` tries 125,000 inputs -----------

FUZZ = settings(max_examples=int(os.environ.get("FUZZ", 100)), database=None)


@st.composite
def mutated(draw, raw: bytes) -> bytes:
    """Bytes with a few stretches of them replaced, moved or left out."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        to = min(len(raw), at + draw(st.integers(0, 12)))
        other = draw(st.integers(0, len(raw)))
        piece = draw(st.binary(max_size=12) | st.just(raw[other : other + 12]) | st.just(b"\xff" * 8))
        raw = raw[:at] + piece + raw[to:]
    return raw


def refused_or(use: Callable[[], object]) -> None:
    try:
        use()
    except InputError as error:
        assert str(error)


GOOD = b'{"text": "a \\u00fc", "url": [1, {"x": null}]}\n{"text": "b\\nc"}\n'
FILES = {
    ".txt": "one\ntwo ü\n\nthree\r\n".encode(),
    ".jsonl": GOOD,
    ".json.gz": gzip.compress(GOOD, mtime=0),
    ".jsonl.xz": lzma.compress(GOOD, preset=0),
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@FUZZ
@given(data=st.data(), extension=st.sampled_from(sorted(FILES)))
def test_fuzz_text(scratch, data, extension):
    path = scratch / f"en{extension}"
    path.write_bytes(data.draw(mutated(FILES[extension]) | st.binary(max_size=200)))
    refused_or(lambda: [document_text(path, number, raw) for number, raw in raw_documents(path)])


@FUZZ
@given(data=st.data(), name=st.sampled_from(["meta.json", "en.valid.000.bin", "tokenizer.model"]))
def test_fuzz_data_folder(scratch, data_dir, data, name):
    folder = scratch / "data"
    if not folder.exists():
        shutil.copytree(data_dir, folder)
    raw = (data_dir / name).read_bytes()
    head = raw if name == "meta.json" else raw[: data.draw(st.sampled_from([40, 400, len(raw)]))]
    (folder / name).write_bytes(data.draw(mutated(head)))

    def use() -> None:
        stream = TokenData(folder, 16)
        stream.row(0)
        for language in stream.languages:  # not by their names: those may be what was changed
            stream.n_valid_rows(language)
            stream.valid_row(language, 0)

    try:
        refused_or(use)
    finally:
        (folder / name).write_bytes(raw)


@FUZZ
@given(data=st.data())
def test_fuzz_tokenizer(data, data_dir):
    raw = (data_dir / "tokenizer.model").read_bytes()
    model = data.draw(mutated(raw) | st.binary(max_size=200))

    def use() -> None:
        tokenizer = load_tokenizer(model, "x")
        tokenizer.decode(tokenizer.encode("Some text, übrigens."))
        tokenizer.decode(list(range(tokenizer.vocab_size())))

    refused_or(use)


@FUZZ
@given(data=st.data())
def test_fuzz_checkpoint(scratch, original, data):
    """The pickle inside the archive is changed and its checksum made to fit, for a checksum alone keeps nobody out."""
    path = scratch / "x.pt"
    with zipfile.ZipFile(original / "enc.pt") as old, zipfile.ZipFile(path, "w") as new:
        for record in old.namelist():
            content = old.read(record)
            new.writestr(record, data.draw(mutated(content)) if record.endswith("data.pkl") else content)
    refused_or(lambda: load_model(path))


@FUZZ
@given(data=st.data())
def test_fuzz_archive(scratch, original, data):
    """A damaged archive is refused, or it was damaged where nothing is read from."""
    path, raw = scratch / "y.pt", (original / "enc.pt").read_bytes()
    path.write_bytes(data.draw(mutated(raw) | mutated(raw[-2000:])))
    try:
        loaded = load_checkpoint(path)
    except InputError:
        return
    whole = load_checkpoint(original / "enc.pt")
    weights, expected = loaded.pop("weights"), whole.pop("weights")
    assert loaded == whole and all(torch.equal(weights[name], x) for name, x in expected.items())
