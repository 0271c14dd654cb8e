import gzip
import lzma
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from corpus_layouts import DE, EN, LAYOUTS, PACK, SW, made, write

import text
from data import TokenData, prepare
from text import InputError, find_text, print_text, read_documents, text_lines


def documents(path, text_field="") -> list[str]:
    return [document.text() for document in read_documents(path, text_field)]


def extra(name: str) -> None:
    """Skips a test whose format needs a package that is not there."""
    if name.lower().endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    if name.lower().endswith(".zst") and sys.version_info < (3, 14):
        pytest.importorskip("backports.zstd", reason="zst needs backports.zstd")


# Folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_a_corpus(tmp_path, name):
    layout = LAYOUTS[name]
    for file in layout.files:
        extra(file)
    if layout.refused:
        with pytest.raises(InputError, match=rf"^{tmp_path}.*: {layout.refused}"):
            made(layout, tmp_path)
    else:
        read, skipped = made(layout, tmp_path)
        assert (list(read), read, skipped) == (sorted(read), layout.read, layout.skipped)


def test_the_table_of_layouts(script):
    extra(".parquet"), extra(".zst")
    result = script("tests/corpus_layouts.py")
    lines = result.stdout.splitlines()
    assert not result.stderr and len(lines) == len(LAYOUTS)
    assert lines[0] == "cc100                      read: en 3, hi_rom 2, zh-Hans 2"
    refused = {line[:26].strip() for line in lines if line[27:].startswith("refused: ")}
    assert refused == {name for name, layout in LAYOUTS.items() if layout.refused}


def test_what_is_found_is_printed(tmp_path, capsys):
    write(tmp_path / "en" / "a.txt", ["\n", *EN])
    write(tmp_path / "en" / "b.txt", b"a sentence on each line\n" * 5000)
    write(tmp_path / "en" / "c.txt", b"a sentence and the next " * 5000)
    write(tmp_path / "my corpus" / "x_clean_0000.jsonl.gz", [r"one\ntwo"])
    for i in range(1200):
        (tmp_path / "en" / f"{i:04}.pdf").touch()
    print_text(*find_text(tmp_path))
    head, *lines = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in (tmp_path / "en").iterdir())
    assert head == "language    files             bytes  begins"
    assert lines == [
        f"en              3           {size:7,}  A tram climbs the hill. It stops at the school. a sentence o",
        f"my corpus       1           {next((tmp_path / 'my corpus').iterdir()).stat().st_size:7}  one two",
        "not a language code (such as hi, zh-Hans, als_Latn), rename: my corpus",
        f"{tmp_path}/en/0000.pdf and 1,199 more: not read (not a format that data.py reads)",
        f"{tmp_path}/en/b.txt: few blank lines, cut into documents of 64 kB",
        f"{tmp_path}/en/c.txt: a line of over 64 kB is one document; break it up",
        rf"{tmp_path}/my corpus/x_clean_0000.jsonl.gz: MADLAD-400, \n read as the end of a line",
    ]


def test_every_file_is_opened_before_the_work(tmp_path):
    for name, content in (("a.txt", EN), ("b.txt", b""), ("c.txt.gz", b"cut off"), ("d.txt", EN)):
        write(tmp_path / "en" / name, content)
    (tmp_path / "en" / "c.txt.gz").write_bytes((tmp_path / "en" / "c.txt.gz").read_bytes()[:9])
    with pytest.raises(InputError, match=r"c\.txt\.gz: cut or damaged"):
        print_text(*find_text(tmp_path))
    os.replace(tmp_path / "en" / "a.txt", tmp_path / "en" / "c.txt.gz")
    os.symlink("nowhere.txt", tmp_path / "en" / "a.txt")
    with pytest.raises(InputError, match=r"a\.txt: .*No such file"):
        print_text(*find_text(tmp_path))


@pytest.mark.parametrize("code", ["hi", "zh-Hans", "als_Latn", "pt_BR", "hi_rom", "zh-yue-Hant", "es-419", "ceb"])
def test_codes_of_languages(code):
    assert text.CODE.fullmatch(code)


@pytest.mark.parametrize("name", ["EN", "multilingual", "en.part1", "v1.0", "sw_clean_0000", "english", "a"])
def test_other_names(name):
    assert not text.CODE.fullmatch(name)


# Documents ---------------------------------------------------------------------------------------------------------


def test_documents_of_a_text_file(tmp_path):
    path = tmp_path / "en.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n\n three\n")
    assert [text_lines(document) for document in documents(path)] == [["one", "two"], [" three"]]


def test_a_line_separator_inside_a_line_is_kept(tmp_path):
    path = tmp_path / "en.txt"
    path.write_text("one\u2028two\x0bthree\n", "utf-8")
    assert [text_lines(document) for document in documents(path)] == [["one\u2028two\x0bthree"]]


FORMATS = [f"x.{kind}{packed}" for kind in ("txt", "jsonl", "json", "ndjson") for packed in ("", *PACK)]


@pytest.mark.parametrize("name", [*FORMATS, "x.parquet", "x.TXT.XZ", "x.JSONL.zst", "X.Parquet"])
def test_every_format(tmp_path, name):
    path = tmp_path / name
    extra(name)
    texts = [*EN, "drei ü", *SW] * 50
    write(path, texts)
    sizes = []
    seen = [document.text().strip("\n") for document in read_documents(path, progress=sizes.append)]
    assert seen == texts
    assert sum(sizes) == path.stat().st_size and min(sizes) >= 0


def test_text_without_blank_lines_is_many_documents(tmp_path, data_dir):
    (tmp_path / "text").mkdir()
    lines = [f"Sentence number {i} is about ships.\n" for i in range(20_000)]
    (tmp_path / "text" / "en.txt").write_text("".join(lines))
    pieces = documents(tmp_path / "text" / "en.txt")
    assert "".join(pieces) == "".join(lines) and max(map(len, pieces)) <= 64 << 10 < 36 + len(pieces[0])
    assert [document.number for document in read_documents(tmp_path / "text" / "en.txt")] == [
        1 + "".join(pieces[:i]).count("\n") for i in range(len(pieces))
    ]
    prepare(tmp_path / "text", tmp_path / "out", 0, data_dir / "tokenizer.model", valid_fraction=0.3)
    assert TokenData(tmp_path / "out", 64).n_valid_rows("en") > 10


def test_only_madlad_has_its_line_ends_spelled(tmp_path):
    for name, expected in (("sw_clean_0012.jsonl.gz", "one\ntwo"), ("sw.jsonl.gz", r"one\ntwo")):
        write(tmp_path / name, [r"one\ntwo"])
        assert documents(tmp_path / name) == [expected]


@pytest.mark.parametrize("content", [b"1\tone line", b"1\tone\n2\ttwo\nthree\n", b"1\tone\n\n2\ttwo\n", b"7\n8\n9\n"])
def test_text_with_some_numbers_is_text(tmp_path, content):
    write(tmp_path / "en.txt", content)
    assert "".join(documents(tmp_path / "en.txt")) == content.decode().replace("\n\n", "\n")


def test_numbered_lines_of_a_long_file_are_refused(tmp_path):
    write(tmp_path / "de.txt.xz", "".join(f"{i}\tSatz von vielen.\r\n" for i in range(1, 9999)).encode())
    with pytest.raises(InputError, match=r"de\.txt\.xz: every line begins with its number"):
        documents(tmp_path / "de.txt.xz")


@pytest.mark.parametrize("name", ["en.jsonl", "en.parquet"])
def test_the_field_of_the_text(tmp_path, name):
    extra(name)
    rows = [{"id": "1", "content": EN[0], "body": SW[0]}, {"id": "2", "content": EN[1], "body": None}]
    path = tmp_path / name
    if name == "en.jsonl":
        write(path, [dict(row, n=1) for row in rows])
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([dict(row, n=1) for row in rows]), path)
    assert documents(path) == EN[:2]
    assert documents(path, "body") == [SW[0], ""]
    for missing in ("text", "n", "words"):
        with pytest.raises(InputError, match=rf"{name}.*: no .*{missing}.* --text-field: .*content, body"):
            documents(path, missing)


def test_text_comes_before_content(tmp_path):
    write(tmp_path / "en.jsonl", [{"content": "5 kB", "text": "a river"}])
    assert documents(tmp_path / "en.jsonl") == ["a river"]


def test_every_format_in_shards(tmp_path, data_dir, script):
    """The command with two workers makes the same shards of every format."""
    extra(".parquet"), extra(".zst")
    rows = [{"body": f"{x} {i}"} for i in range(40) for x in (*EN, *DE)]
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"en.{name[2:]}", rows)
        if name == "c.parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name / "en.parquet")
        model = ("--tokenizer", data_dir / "tokenizer.model", "--valid-fraction", 0.2, "--text-field", "body")
        result = script("data.py", tmp_path / name, tmp_path / f"out.{name}", *model)
        assert result.returncode == 0, result.stderr
        assert "A tram climbs the hill." in result.stdout.splitlines()[1]
    shards = [
        (tmp_path / f"out.{x}" / "en.train.000.bin").read_bytes() for x in ("a.jsonl", "b.jsonl.zst", "c.parquet")
    ]
    assert shards[0] == shards[1] == shards[2]


# Damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("en.txt", b"fine\nb\xffd\n", r"en\.txt:2: not UTF-8 \(byte 0xff\)"),
        ("en.txt", b"one\n\ntwo\nthr\xe9e\n", r"en\.txt:4: not UTF-8"),
        ("en.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"en\.jsonl:2: not UTF-8"),
        ("en.jsonl", b'{"text": "a"}\n{"text": \n', r"en\.jsonl:2: not a JSON object"),
        ("en.jsonl", b'{"title": "a"}\n', r'en\.jsonl:1: no "text" or "content" string; .* --text-field: title'),
        ("en.jsonl", b'{"text": 5}\n', r'en\.jsonl:1: no "text"'),
        ("en.jsonl", b'{"text": ["a"]}\n', r'en\.jsonl:1: no "text"'),
        ("en.jsonl", b"[1]\n", r"en\.jsonl:1: not a JSON object"),
        ("en.jsonl", b'"text"\n', r"en\.jsonl:1: not a JSON object"),
        ("en.jsonl", b'{"text": "\\ud800"}\n', r"en\.jsonl:1: half a surrogate pair"),
        ("en.txt.gz", gzip.compress(b"hello\n" * 1000, mtime=0)[:-20], r"en\.txt\.gz: cut or damaged"),
        ("en.txt.gz", b"no archive", r"en\.txt\.gz: cut or damaged after line 0"),
        ("en.txt.xz", lzma.compress(bytes(range(32, 120)) * 100)[:-30], r"en\.txt\.xz: cut or damaged"),
        ("en.json.xz", b"no archive", r"en\.json\.xz: cut or damaged"),
        ("en.txt.bz2", b"no archive", r"en\.txt\.bz2: cut or damaged"),
        ("en.txt.zst", b"no archive", r"en\.txt\.zst: cut or damaged"),
        ("en.parquet", b"no table", r"en\.parquet: cut or damaged"),
        ("en.parquet", b"", r"en\.parquet: cut or damaged"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, data_dir, name, content, complaint):
    extra(name)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    for workers in (1, 2):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(InputError, match=complaint):
            prepare(tmp_path / "text", tmp_path / "out", 1000, data_dir / "tokenizer.model", n_workers=workers)
        assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.xz", "x.jsonl.bz2", "x.jsonl.zst", "x.parquet"])
def test_a_cut_file_is_refused_wherever_it_was_cut(tmp_path, name):
    extra(name)
    texts = [os.urandom(2000).hex() for _ in range(300)]
    write(tmp_path / "whole" / name, texts)
    raw = (tmp_path / "whole" / name).read_bytes()
    numbers = []
    for part in (0.1, 0.5, 0.9, 1):
        (tmp_path / name).write_bytes(raw[: int(part * len(raw)) - 5])
        with pytest.raises(
            InputError, match=rf"{name}: cut or damaged after (line|row) \d+ .*; fetch it again"
        ) as error:
            documents(tmp_path / name)
        numbers.append(int(re.search(r"after \w+ (\d+)", str(error.value))[1]))
    assert numbers == sorted(numbers) and (name == "x.parquet" or 200 < numbers[-1] <= 600)


def test_a_damaged_page_of_parquet_is_refused_after_its_rows(tmp_path):
    extra(".parquet")
    import pyarrow
    from pyarrow import parquet

    texts = [f"{i} {os.urandom(500).hex()}" for i in range(1000)]
    table = pyarrow.table({"text": texts})
    parquet.write_table(
        table, tmp_path / "x.parquet", data_page_size=1 << 14, write_batch_size=10, use_dictionary=False
    )
    raw = bytearray((tmp_path / "x.parquet").read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 40_000] = bytes(40_000)
    (tmp_path / "x.parquet").write_bytes(raw)
    seen = []
    with pytest.raises(InputError, match=r"x\.parquet: cut or damaged after row [1-9]\d* \("):
        for document in read_documents(tmp_path / "x.parquet"):
            seen.append(document.text())
    assert 300 < len(seen) < 600 and seen == texts[: len(seen)]


def test_a_line_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_LINE", 1000)
    (tmp_path / "en.txt").write_text("x" * 2000)
    with pytest.raises(InputError, match=r"en\.txt:1: a line of over"):
        documents(tmp_path / "en.txt")


def test_what_zstd_packs_with_a_long_window_is_read(tmp_path):
    extra(".zst")
    try:
        from compression import zstd
    except ImportError:
        from backports import zstd
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 30})
    (tmp_path / "en.txt.zst").write_bytes(packer.compress(b"a river\n") + packer.flush())
    assert documents(tmp_path / "en.txt.zst") == ["a river\n"]


@pytest.mark.parametrize("name, package", [("en.txt.zst", "backports.zstd"), ("en.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    for module in ("pyarrow", "pyarrow.parquet", "backports", "backports.zstd", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(InputError, match=f"{name}: to read it, pip install {package}$"):
        documents(tmp_path / name)


def test_memory_of_parquet_does_not_grow_with_its_row_groups(tmp_path):
    extra(".parquet")
    import pyarrow
    from pyarrow import parquet

    texts = [os.urandom(500).hex() for _ in range(60_000)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet", row_group_size=len(texts))
    assert (tmp_path / "x.parquet").stat().st_size > 30e6
    code = (
        "import pathlib, pyarrow, text\n"
        f"n = sum(len(x.raw) for x in text.read_documents(pathlib.Path({str(tmp_path / 'x.parquet')!r})))\n"
        "print(n, pyarrow.default_memory_pool().max_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    size, peak = map(int, done.stdout.split())
    assert size == 60e6 and peak < 10e6
