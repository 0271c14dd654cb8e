import gzip
import json
import lzma
import os
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
from data import InputError, TokenData, document_text, find_text, permuted, prepare, raw_documents

LANGUAGES = ["ar", "de", "en", "es", "fr", "hi", "it", "ja", "mr", "pt", "ta", "te"]


def documents(path) -> list[str]:
    return [document_text(path, number, raw) for number, raw in raw_documents(path)]


# Reading -----------------------------------------------------------------------------------------------------------


def test_documents_of_a_text_file(tmp_path):
    path = tmp_path / "en.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n\n three\n")
    assert [data.text_lines(text) for text in documents(path)] == [["one", "two"], [" three"]]


def test_a_line_separator_inside_a_line_is_kept(tmp_path):
    path = tmp_path / "en.txt"
    path.write_text("one\u2028two\x0bthree\n", "utf-8")
    assert [data.text_lines(text) for text in documents(path)] == [["one\u2028two\x0bthree"]]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json.gz", "x.jsonl.xz", "x.json", "x.txt.jsonl", "x.txt.json.gz"])
def test_json_lines_of_every_packing(tmp_path, name):
    """The layout of the mC4 release: an object a line with text, timestamp and url."""
    path = tmp_path / name
    rows = [{"text": "one\ntwo", "timestamp": "2019", "url": "http://x"}, {"text": "drei ü"}]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(raw))
    assert documents(path) == ["one\ntwo", "drei ü"]


def test_a_document_without_end_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_DOCUMENT", 100)
    path = tmp_path / "en.txt"
    path.write_text("".join(f"line {i}\n" for i in range(100)))
    parts = documents(path)
    assert max(map(len, parts)) <= 100 and "".join(parts) == path.read_text()


def test_files_of_a_language(tmp_path):
    (tmp_path / "fr").mkdir()
    for name in ("en.txt", "fr/b.json.gz", "fr/a.txt.xz", "de.jsonl", "notes.md", ".hidden.txt"):
        (tmp_path / name).write_text("x")
    found = find_text(tmp_path)
    assert {k: [p.name for p in v] for k, v in found.items()} == {
        "de": ["de.jsonl"], "en": ["en.txt"], "fr": ["a.txt.xz", "b.json.gz"]
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("en.txt", b"fine\nb\xffd\n", r"en\.txt:2: not UTF-8 \(byte 0xff\)"),
        ("en.txt", b"one\n\ntwo\nthr\xe9e\n", r"en\.txt:4: not UTF-8"),
        ("en.jsonl", b'{"text": "a"}\n{"text": \n', r"en\.jsonl:2: not JSON"),
        ("en.jsonl", b'{"title": "a"}\n', r'en\.jsonl:1: no "text"'),
        ("en.jsonl", b'{"text": 5}\n', r'en\.jsonl:1: no "text"'),
        ("en.jsonl", b"[1]\n", r'en\.jsonl:1: no "text"'),
        ("en.jsonl", b'{"text": "\\ud800"}\n', r"en\.jsonl:1: half a surrogate pair"),
        ("en.jsonl", b"[" * 100_000, r"en\.jsonl:1: not JSON"),
        ("en.txt.gz", gzip.compress(b"hello\n" * 1000)[:-20], r"en\.txt\.gz: a damaged archive"),
        ("en.txt.gz", b"no archive", r"en\.txt\.gz: a damaged archive"),
        ("en.txt.xz", lzma.compress(bytes(range(32, 120)) * 100)[:-30], r"en\.txt\.xz: a damaged archive"),
        ("en.json.xz", b"no archive", r"en\.json\.xz: a damaged archive"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, data_dir, name, content, complaint):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    for workers in (1, 2):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(InputError, match=complaint):
            prepare(tmp_path / "text", tmp_path / "out", 1000, data_dir / "tokenizer.model", n_workers=workers)
        assert not (tmp_path / "out" / "meta.json").exists()


def test_a_line_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_LINE", 1000)
    (tmp_path / "en.txt").write_text("x" * 2000)
    with pytest.raises(InputError, match=r"en\.txt:1: a line of over"):
        documents(tmp_path / "en.txt")


# Tokenizer ---------------------------------------------------------------------------------------------------------


def test_special_tokens_have_fixed_ids(tokenizer):
    ids = data.SpecialIds(tokenizer.vocab_size())
    names = [tokenizer.id_to_piece(i) for i in range(ids.ordinary)]
    assert names == ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "[CLM]"] + [f"<extra_id_{k}>" for k in range(100)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_script_survives(tokenizer, language):
    """Also the nine languages that this tokenizer never saw."""
    for line in (data.SAMPLE_TEXT / f"{language}.txt").read_text("utf-8").splitlines():
        assert tokenizer.decode(tokenizer.encode(line)) == line


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_every_text_survives_and_makes_no_special_token(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(token >= data.SpecialIds.sentinel + data.SpecialIds.n_sentinels for token in tokens)


@pytest.mark.parametrize("text", ["<mask>", "<s> </s>", "<pad>", "[CLM]", "<extra_id_0>", "<unk>", "<0x41>"])
def test_names_of_special_tokens_are_text(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert min(tokens) >= 106 and tokenizer.decode(tokens) == text


def test_the_tokenizer_is_reproducible_and_balanced(text_dir):
    text = find_text(text_dir)
    assert data.train_tokenizer(text, 1000, seed=0) == data.train_tokenizer(text, 1000, seed=0)
    sizes = {x: sum(map(len, data.sample_lines(files, 5000, 0))) for x, files in text.items()}
    assert all(4500 < size <= 5000 for size in sizes.values())


@pytest.mark.parametrize(
    "vocab_size, complaint",
    [(0, "it must be from 400"), (399, "it must be from 400"), (10**6, "does not fit"), (10**10, "to 2,000,000")],
)
def test_an_impossible_vocabulary_is_refused(text_dir, tmp_path, vocab_size, complaint):
    with pytest.raises(InputError, match=f"--vocab-size {vocab_size}:? .*{complaint}"):
        prepare(text_dir, tmp_path / "out", vocab_size)
    assert not any((tmp_path / "out").iterdir())


def test_a_file_that_is_no_tokenizer_is_refused(text_dir, tmp_path):
    (tmp_path / "noise.model").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="not a SentencePiece model"):
        prepare(text_dir, tmp_path / "out", 0, tmp_path / "noise.model")


# Shards ------------------------------------------------------------------------------------------------------------


def all_tokens(folder, split) -> dict[str, list[int]]:
    stream = TokenData(folder, 8)
    return {x: t.read(0, len(t)).tolist() for x, t in getattr(stream, split).items()}


def test_shards_hold_the_text(data_dir, text_dir, tokenizer):
    tokens = {split: all_tokens(data_dir, split) for split in ("train", "valid")}
    for language in ("de", "en", "hi"):
        texts = documents(text_dir / f"{language}.txt")
        expected = Counter("\n".join(data.text_lines(text)).replace("\n", " ") for text in texts)
        seen = Counter()
        for split in ("train", "valid"):
            row = tokens[split][language]
            assert row[-1] == 2 and split and row.count(2) > 0
            start = 0
            for end in [i for i, token in enumerate(row) if token == 2]:
                seen[tokenizer.decode(row[start:end])] += 1
                start = end + 1
        assert seen == expected


def test_workers_and_shard_size_change_nothing(text_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_TOKENS", 500)
    monkeypatch.setattr(data, "BLOCK_BYTES", 3000)
    meta = prepare(text_dir, tmp_path / "out", 0, data_dir / "tokenizer.model", valid_fraction=0.2, n_workers=2)
    assert len(meta["languages"]["en"]["train"]) > 3
    for split in ("train", "valid"):
        assert all_tokens(tmp_path / "out", split) == all_tokens(data_dir, split)
    a, b = TokenData(tmp_path / "out", 16), TokenData(data_dir, 16)
    assert all((a.row(i) == b.row(i)).all() for i in range(300))  # rows lie across the edges of shards


def test_parts_of_several_machines_are_the_same_data(text_dir, data_dir, tmp_path, capsys):
    """However many parts, made in any order, in one folder or copied into one: the same rows as of one machine."""
    for language in ("de", "en", "hi"):  # files to share out, one of them far larger than the others
        text = (text_dir / f"{language}.txt").read_text("utf-8").split("\n\n")
        for number, documents in enumerate((text[:1], text[1:2], text[2:])):
            (tmp_path / "text" / language).mkdir(parents=True, exist_ok=True)
            (tmp_path / "text" / language / f"{number}.txt").write_text("\n\n".join(documents), "utf-8")
    whole = TokenData(data_dir, 16)
    for n in (2, 3, 20):
        (out := tmp_path / f"out{n}").mkdir()
        (out / "tokenizer.model.0.tmp").touch()  # that another part is just writing
        for i in reversed(range(1, n + 1)):
            part = prepare(tmp_path / "text", out, 0, data_dir / "tokenizer.model", 0.2, part=(i, n))
            data.print_table(part)
            if i > 1:
                with pytest.raises(InputError, match=rf"no meta\.1of{n}\.json"):
                    TokenData(out, 16)
        with pytest.raises(InputError, match=rf"\.2of{n}\..*: there already; remove \*\.2of{n}\.\* to"):
            prepare(tmp_path / "text", out, 0, data_dir / "tokenizer.model", 0.2, part=(2, n))
        split = TokenData(out, 16)
        assert all((whole.row(i) == split.row(i)).all() for i in range(300))
        assert all((whole.valid_row(x, 0) == split.valid_row(x, 0)).all() for x in whole.languages)
        assert whole.fingerprint == split.fingerprint
        for x in whole.languages:
            assert all(
                whole.meta["languages"][x][key] == split.meta["languages"][x][key] for key in ("documents", "words")
            )
    entries = [json.loads((tmp_path / "out3" / f"meta.{i}of3.json").read_text())["languages"] for i in (1, 2, 3)]
    n_bytes = [sum(entry["bytes"] for entry in part.values()) for part in entries]
    assert min(n_bytes) > 0 and max(n_bytes) < 2 * sum(n_bytes) / 3
    prepare(tmp_path / "text", tmp_path / "other", 0, data_dir / "tokenizer.model", 0.4, part=(1, 3))
    shutil.copy(tmp_path / "other" / "meta.1of3.json", tmp_path / "out3")
    with pytest.raises(InputError, match=r"meta\.2of3\.json: its part has .*0\.2.*, others not"):
        TokenData(tmp_path / "out3", 16)
    (tmp_path / "another.model").write_bytes(data.train_tokenizer(find_text(text_dir), 900, seed=0))
    with pytest.raises(InputError, match="other/tokenizer.model: another part's, not that of --tokenizer"):
        prepare(tmp_path / "text", tmp_path / "other", 0, tmp_path / "another.model", 0.4, part=(2, 3))
    assert (tmp_path / "other" / "tokenizer.model").read_bytes() == (data_dir / "tokenizer.model").read_bytes()


def test_the_split_follows_the_text_not_its_place(text_dir, data_dir, tmp_path):
    """Each document twice, in files of other names: both copies are on the same side."""
    for name in ("en/a.txt", "en/b.txt"):
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(text_dir / "en.txt", tmp_path / "text" / name)
    prepare(tmp_path / "text", tmp_path / "out", 0, data_dir / "tokenizer.model", valid_fraction=0.2)
    for split in ("train", "valid"):
        assert all_tokens(tmp_path / "out", split)["en"] == 2 * all_tokens(data_dir, split)["en"]


def test_a_document_without_text_is_none(data_dir, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "en.jsonl").write_text('{"text": "a river"}\n{"text": ""}\n{"text": "a house"}\n')
    meta = prepare(tmp_path / "text", tmp_path / "out", 0, data_dir / "tokenizer.model", valid_fraction=0)
    assert meta["languages"]["en"]["documents"] == 2


def test_the_table(data_dir, capsys):
    meta = json.loads((data_dir / "meta.json").read_text())
    data.print_table(meta)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["language", "de", "en", "hi"]
    assert lines[2].split()[1] == "15" and 99 < sum(float(line.split()[-1][:-1]) for line in lines[1:]) < 101


def test_unigram_entropy(data_dir):
    tokens = Counter(all_tokens(data_dir, "train")["en"])
    p = np.array(list(tokens.values())) / sum(tokens.values())
    assert TokenData(data_dir, 16).unigram_entropy("en") == pytest.approx(-(p * np.log(p)).sum())


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda f: (f / "meta.json").unlink(), "no meta.json in it, data.py did not finish; remove it"),
        (
            lambda f: [path.unlink() for path in f.iterdir() if path.suffix != ".bin"],
            "no meta.json in it; `python data.py .*copy DATA` makes",
        ),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json: damaged"),
        (lambda f: (f / "meta.json").write_text("{}"), "meta.json: damaged"),
        (lambda f: (f / "meta.json").rename(f / "meta.1of2.json"), r"no meta\.2of2\.json: run that part"),
        (lambda f: shutil.copy(f / "meta.json", f / "meta.1of2.json"), r"no meta\.2of2\.json: run that part"),
        (lambda f: shutil.copy(f / "meta.json", f / "meta.old.json"), r"meta\.old\.json is not of the same parts"),
        (lambda f: (f / "tokenizer.model").unlink(), r"tokenizer\.model: cannot be read"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"x"), "not a SentencePiece model"),
        (lambda f: (f / "en.train.000.bin").unlink(), r"en\.train\.000\.bin: cannot be read"),
        (lambda f: (f / "en.train.000.bin").write_bytes(b""), r"en\.train\.000\.bin: not a shard"),
        (lambda f: (f / "en.train.000.bin").write_bytes((f / "en.train.000.bin").read_bytes()[:-2]), "bytes, not the"),
        (
            lambda f: (f / "en.valid.000.bin").write_bytes((f / "en.valid.000.bin").read_bytes() + b"xx"),
            "bytes, not the",
        ),
        (lambda f: (f / "en.train.000.bin").write_bytes(b"tokens01" + bytes(5000)), "not a shard of this folder's tok"),
    ],
)
def test_a_damaged_data_folder_is_refused(data_dir, tmp_path, damage, complaint):
    shutil.copytree(data_dir, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(InputError, match=complaint):
        TokenData(tmp_path / "copy", 16)


def test_too_little_for_a_row_is_refused(data_dir):
    with pytest.raises(InputError, match=r"'de' has \d+ tokens to train on, a row takes 100000"):
        TokenData(data_dir, 100_000)
    held_out = len(TokenData(data_dir, 16).valid["en"])
    assert TokenData(data_dir, held_out).n_valid_rows("en") == 1
    with pytest.raises(InputError, match=r"'en' has \d+ tokens held out, .*--valid-fraction"):
        TokenData(data_dir, held_out + 1).n_valid_rows("en")


# The stream --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(n, key):
    order = [permuted(i, n, key) for i in range(n)]
    assert sorted(order) == list(range(n))


def test_permutations_differ_and_mix():
    orders = {tuple(permuted(i, 50, key) for i in range(50)) for key in range(200)}
    assert len(orders) == 200
    means = np.mean([[permuted(i, 1000, key) for i in range(3)] for key in range(2000)], axis=0)
    assert abs(means - 499.5).max() < 5 * 289 / 2000**0.5


def test_languages_come_in_exact_proportion(data_dir):
    stream = TokenData(data_dir, 16, seed=3, alpha=0.5)
    share = data.shares({x: len(t) for x, t in stream.train.items()}, 0.5)
    weights = {x: len(t) ** 0.5 for x, t in stream.train.items()}
    assert share == {x: w / sum(weights.values()) for x, w in weights.items()}
    seen, n = Counter(), 0
    for block in range(10):
        seen.update(stream.locate(i)[0] for i in range(block * 1024, (block + 1) * 1024))
        n += 1024
        assert all(abs(seen[x] - n * share[x]) < 1 for x in stream.languages)
    runs = [stream.locate(i)[0] for i in range(1024)]
    assert 0.2 < np.mean([a == b for a, b in zip(runs, runs[1:])]) < 0.5  # shuffled, not one after the other


def test_every_row_once_before_any_twice(data_dir):
    stream = TokenData(data_dir, 32, seed=5)
    rows = {x: [] for x in stream.languages}
    for i in range(3000):
        language, row = stream.locate(i)
        rows[language].append(row)
    for language, seen in rows.items():
        n = len(stream.train[language]) // 32
        assert len(seen) > 2 * n
        first, second = seen[:n], seen[n : 2 * n]
        assert sorted(first) == sorted(second) == list(range(n)) and first != second


def test_a_row_depends_on_seed_and_index_alone(data_dir):
    forward, again = TokenData(data_dir, 32, seed=1), TokenData(data_dir, 32, seed=1)
    rows = [forward.row(i).tolist() for i in range(200)]
    for i in reversed(range(200)):
        assert again.row(i).tolist() == rows[i] and len(rows[i]) == 32
    other = TokenData(data_dir, 32, seed=2)
    assert sum(other.row(i).tolist() == rows[i] for i in range(200)) < 20
    assert len(again.row(10**15)) == 32  # seeking far costs nothing


# The command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["missing", "out"], "missing: no such folder"),
        (["empty", "out"], "empty: no text in it"),
        (["blank", "out"], "no text"),
        (["text", "full"], "full: exists and is not an empty folder"),
        (["text", "out", "--valid-fraction", "1"], "--valid-fraction 1.0"),
        (["text", "out", "--seed", "-1"], "--seed -1: it must be from 0"),
        (["text", "full/precious/out"], "full/precious/out: cannot be read or made (Not a directory)"),
        (["text", "out", "--tokenizer", "nowhere"], "nowhere: cannot be read (No such file"),
        (["text", "out", "--vocab-size", "lots"], "--vocab-size"),
        (["text", "out", "--part", "3/2"], "--part 3/2: it must be I/N"),
        (["text", "out", "--part", "2"], "--part 2: it must be I/N"),
        (["text", "out", "--part", "1/2"], "--part 1/2: the parts need one tokenizer"),
        (["twice", "out"], "twice/en.txt and en.txt.gz: one file, packed and not; remove either"),
        (["odd", "out"], "'espa\\udcf1ol.txt': a name that is not UTF-8, or not printable; rename it"),
        (["text", "out", "--vocab-size", "900000"], "--vocab-size 900000 does not fit this text"),
    ],
)
def test_bad_commands(script, tmp_path, text_dir, arguments, complaint):
    for folder in ("empty", "blank", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "blank" / "en.txt").write_text("\n \n")
    (tmp_path / "full" / "precious").write_text("data")
    for name in ("twice/en.txt", "twice/en.txt.gz", os.fsdecode(b"odd/espa\xf1ol.txt")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    shutil.copytree(text_dir, tmp_path / "text")
    result = script("data.py", *arguments)
    assert result.returncode == 2 and complaint in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert (tmp_path / "full" / "precious").read_text() == "data" and not (tmp_path / "out" / "meta.json").exists()
