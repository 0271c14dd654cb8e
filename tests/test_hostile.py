"""Files of a stranger: refused in one line, soon, in little memory; nothing in them is run, nothing is overwritten."""

import gzip
import hashlib
import json
import lzma
import multiprocessing
import os
import re
import resource
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROWS, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import train_encoder
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

NEW = ("train_encoder", "--data", "DATA", "--out", "x.pt", *SMALL, *ROWS)
CASES = [
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
