import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import data
from cli import lock_file
from data import InputError, TokenData, find_text, permuted, prepare
from text import read_documents, text_lines
from tokenizer import sample_lines, train_tokenizer

LANGUAGES = ["ar", "de", "en", "es", "fr", "hi", "it", "ja", "mr", "pt", "ta", "te"]


def documents(path) -> list[str]:
    return [document.text() for document in read_documents(path)]


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
    text, _ = find_text(text_dir)
    assert train_tokenizer(text, 1000, seed=0) == train_tokenizer(text, 1000, seed=0)
    sizes = {x: sum(map(len, sample_lines(files, 5000, 0))) for x, files in text.items()}
    assert all(4500 < size <= 5000 for size in sizes.values())


@pytest.mark.parametrize(
    "vocab_size, complaint",
    [(0, "too small"), (399, "smaller than required_chars"), (10**6, "too high"), (10**10, "cannot parse")],
)
def test_an_impossible_vocabulary_is_refused(text_dir, tmp_path, vocab_size, complaint):
    with pytest.raises(InputError, match=f"--vocab-size {vocab_size} does not fit this text: .*{complaint}"):
        prepare(text_dir, tmp_path / "out", vocab_size)
    assert not any((tmp_path / "out").iterdir())


def test_a_file_that_is_no_tokenizer_is_refused(text_dir, tmp_path):
    (tmp_path / "noise.model").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="not a SentencePiece unigram model"):
        prepare(text_dir, tmp_path / "out", 0, tmp_path / "noise.model")


# Shards ------------------------------------------------------------------------------------------------------------


def all_tokens(folder, split) -> dict[str, list[int]]:
    stream = TokenData(folder, 8)
    return {x: t.read(0, len(t)).tolist() for x, t in getattr(stream, split).items()}


def test_shards_hold_the_text(data_dir, text_dir, tokenizer):
    tokens = {split: all_tokens(data_dir, split) for split in ("train", "valid")}
    for language in ("de", "en", "hi"):
        texts = documents(text_dir / f"{language}.txt")
        expected = Counter("\n".join(text_lines(text)).replace("\n", " ") for text in texts)
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
    assert len(meta["en"]["train"]) > 3
    for split in ("train", "valid"):
        assert all_tokens(tmp_path / "out", split) == all_tokens(data_dir, split)
    a, b = TokenData(tmp_path / "out", 16), TokenData(data_dir, 16)
    assert all((a.row(i) == b.row(i)).all() for i in range(300))  # rows lie across the edges of shards


def test_the_split_follows_the_text_not_its_place(text_dir, data_dir, tmp_path):
    """Each document twice, in files of other names and line ends: both copies are on the same side."""
    for name in ("en/a.txt", "en/b.txt"):
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        ends = b"\r\n" if "b" in name else b"\n"
        (tmp_path / "text" / name).write_bytes((text_dir / "en.txt").read_bytes().replace(b"\n", ends))
    prepare(tmp_path / "text", tmp_path / "out", 0, data_dir / "tokenizer.model", valid_fraction=0.2)
    for split in ("train", "valid"):
        assert all_tokens(tmp_path / "out", split)["en"] == 2 * all_tokens(data_dir, split)["en"]


def test_a_document_without_text_is_none(data_dir, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "en.jsonl").write_text('{"text": "a river"}\n{"text": ""}\n{"text": "a house"}\n')
    meta = prepare(tmp_path / "text", tmp_path / "out", 0, data_dir / "tokenizer.model", valid_fraction=0)
    assert meta["en"]["documents"] == 2


def test_the_table_warns_of_too_little_text(data_dir, capsys):
    meta = data.read_meta(data_dir)
    meta["hi"]["valid"] = {"hi.valid.000.bin": 400}
    data.print_table(meta)
    *table, few, held_out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["language", "de", "en", "hi"]
    assert table[2].split()[1] == "15" and 99 < sum(float(line.split()[-1][:-1]) for line in table[1:]) < 101
    assert few.startswith("warning: under 100,000 tokens to train on") and few.endswith(": de, en, hi; add text")
    assert re.search(r"few tokens held out, .*: hi 400; add text, or remove <lang>\.\*", held_out)
    meta = {x: entry | {"train": {"x.bin": 10**6}, "valid": {"y.bin": 10**4}} for x, entry in meta.items()}
    data.print_table(meta)
    assert "warning" not in capsys.readouterr().out


def test_unigram_entropy(data_dir):
    tokens = Counter(all_tokens(data_dir, "train")["en"])
    p = np.array(list(tokens.values())) / sum(tokens.values())
    assert TokenData(data_dir, 16).unigram_entropy("en") == pytest.approx(-(p * np.log(p)).sum())


def changed(path, offset):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (
            lambda f: (f / "en.json").write_text(""),
            "not finished: en; run data.py again with --tokenizer .*tokenizer.model",
        ),
        (lambda f: [path.unlink() for path in f.glob("*.json")], "not finished: every language; run data.py again"),
        (lambda f: shutil.rmtree(f), "copy: no such folder; name one made by data.py"),
        (lambda f: (f / "tokenizer.model").unlink(), r"no tokenizer.model in it; `python data.py .*copy DATA` makes"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"x"), "not a SentencePiece unigram model"),
        (lambda f: (f / "en.json").write_text('{"documents": 15'), "en.json: not a description of a language"),
        (lambda f: (f / "config.json").write_text('{"d_model": 32}'), "config.json: not a description of a language"),
        (lambda f: (f / "list.json").write_text("[]"), "list.json: not a description of a language"),
        (lambda f: (f / "en.train.000.bin").unlink(), r"en\.train\.000\.bin: missing, or .* remove .*en\.\* and run"),
        (lambda f: os.truncate(f / "en.train.000.bin", 1000), r"en\.train\.000\.bin: missing, or not of \d+ tokens"),
        (lambda f: shutil.copy(f / "de.train.000.bin", f / "en.train.000.bin"), "missing, or not of"),
        (lambda f: changed(f / "en.valid.000.bin", 10), "not a shard of this folder's tokenizer; remove .*en"),
        (lambda f: changed(f / "en.valid.000.bin", 24), "not a shard of this folder's tokenizer"),
    ],
)
def test_a_damaged_data_folder_is_refused(data_dir, tmp_path, damage, complaint):
    shutil.copytree(data_dir, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(InputError, match=complaint):
        TokenData(tmp_path / "copy", 16)


def test_too_little_for_a_row_is_refused(data_dir):
    with pytest.raises(InputError, match=r"'de' has \d+ tokens to train on, but a row needs 100000"):
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


# A folder that grows -----------------------------------------------------------------------------------------------


def some(text_dir, folder, *languages):
    """A folder with the text of some languages."""
    folder.mkdir()
    for language in languages:
        shutil.copy(text_dir / f"{language}.txt", folder)
    return folder


def assert_same_data(folder, other):
    a, b = TokenData(folder, 16), TokenData(other, 16)
    assert a.fingerprint == b.fingerprint
    assert all((a.row(i) == b.row(i)).all() for i in range(300))
    assert all((a.valid_row(x, 0) == b.valid_row(x, 0)).all() for x in a.languages)
    assert data.read_meta(folder) == data.read_meta(other)
    assert not [*folder.glob("*tmp*")]


def test_a_language_is_added_and_the_others_are_kept(text_dir, data_dir, tmp_path, capsys):
    out, model = tmp_path / "out", data_dir / "tokenizer.model"
    assert prepare(some(text_dir, tmp_path / "one", "en"), out, 0, model, 0.2).keys() == {"en"}
    before = (out / "en.train.000.bin").stat()
    assert prepare(text_dir, out, 0, out / "tokenizer.model", 0.2).keys() == {"de", "en", "hi"}
    assert capsys.readouterr().out == "en: already encoded, with --seed 0 --valid-fraction 0.2\n"
    assert (out / "en.train.000.bin").stat() == before
    assert_same_data(out, data_dir)


def test_two_processes_encode_different_languages_into_one_folder(text_dir, data_dir, tmp_path):
    some(text_dir, tmp_path / "a", "de", "hi")
    some(text_dir, tmp_path / "b", "en")
    flags = ["out", "--tokenizer", data_dir / "tokenizer.model", "--valid-fraction", "0.2"]
    lines = [[sys.executable, ROOT / "data.py", name, *flags] for name in "ab"]
    runs = [subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL) for line in lines]
    assert [run.wait(100) for run in runs] == [0, 0]
    assert_same_data(tmp_path / "out", data_dir)


def test_a_language_that_another_process_encodes_is_refused(text_dir, data_dir, tmp_path):
    """The files of that process stay."""
    work = tmp_path / "out" / "en.abc.tmp"
    work.mkdir(parents=True)
    shutil.copy(data_dir / "tokenizer.model", tmp_path / "out")
    arguments = some(text_dir, tmp_path / "text", "en"), tmp_path / "out", 0, data_dir / "tokenizer.model", 0.2
    refused = pytest.raises(InputError, match="out: another data.py is encoding 'en'; wait for it, or give each other")
    with lock_file(tmp_path / "out" / "en.json", "locked"), refused:
        prepare(*arguments)
    assert work.exists()
    prepare(*arguments)
    assert not work.exists()


def test_a_killed_run_is_continued_by_the_same_command(text_dir, data_dir, script, tmp_path):
    some(text_dir, tmp_path / "text", "de", "en", "hi")
    for language in ("en", "hi"):  # long enough to be killed in
        (tmp_path / "text" / f"{language}.txt").write_bytes((text_dir / f"{language}.txt").read_bytes() * 300)
    flags = ["text", "out", "--tokenizer", data_dir / "tokenizer.model", "--valid-fraction", "0.2"]
    run = subprocess.Popen([sys.executable, ROOT / "data.py", *flags], cwd=tmp_path, stdout=subprocess.PIPE)
    while not [*(tmp_path / "out").glob("en.*.tmp/en.train.*.bin")]:
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.communicate(timeout=30)  # until the workers, which have the pipe too, have ended
    with pytest.raises(InputError, match="out: not finished: en, hi; run data.py again with .*out/tokenizer.model"):
        TokenData(tmp_path / "out", 16)
    done = script("data.py", *flags)
    assert done.returncode == 0 and "\nde: already encoded" in done.stdout
    assert script("data.py", "text", "whole", *flags[2:]).returncode == 0
    assert_same_data(tmp_path / "out", tmp_path / "whole")


def test_a_language_from_other_files_is_refused(text_dir, data_dir, tmp_path):
    text, flags = some(text_dir, tmp_path / "text", "de", "en"), (0, data_dir / "tokenizer.model", 0.2)
    prepare(text, tmp_path / "out", *flags)
    (text / "en").mkdir()
    (text / "en" / "more.txt").write_text("a river\n")
    with pytest.raises(InputError, match=r"'en' was made from other files \(en/more\.txt is .*; remove .*out/en\.\*"):
        prepare(text, tmp_path / "out", *flags)
    shutil.rmtree(text / "en")
    (text / "en.txt").write_bytes((text / "en.txt").read_bytes() + b"\na river\n")
    with pytest.raises(InputError, match=r"\(en\.txt is new, gone or of another size\)"):
        prepare(text, tmp_path / "out", *flags)
    for path in (tmp_path / "out").glob("en.*"):
        path.unlink()
    assert prepare(text, tmp_path / "out", *flags)["en"]["documents"] == 16


def test_another_runs_unfinished_language_is_told_of(text_dir, data_dir, tmp_path, capsys):
    out, model = tmp_path / "out", data_dir / "tokenizer.model"
    prepare(some(text_dir, tmp_path / "a", "de"), out, 0, model, 0.2)
    (out / "hi.json").touch()
    assert prepare(some(text_dir, tmp_path / "b", "en"), out, 0, model, 0.2).keys() == {"de", "en"}
    assert capsys.readouterr().out.startswith(f"{out}: not finished: hi; another data.py")


def test_a_language_with_nothing_held_out_is_refused_and_the_others_are_encoded(text_dir, data_dir, tmp_path):
    text, out, model = some(text_dir, tmp_path / "text", "de", "hi"), tmp_path / "out", data_dir / "tokenizer.model"
    (text / "en.txt").write_text("a river\n")
    with pytest.raises(InputError, match="en: no document to train on, or none held out .*--valid-fraction, then run"):
        prepare(text, out, 0, model, 0.2)
    assert {x: bool(entry) for x, entry in data.read_meta(out).items()} == dict(de=1, en=0, hi=1)
    assert prepare(text, out, 0, model, 0)["en"]["valid"] == {}


@pytest.mark.parametrize("n_bytes", [100, 5000], ids=["tokenizer", "shard"])
def test_a_full_disk_is_one_line_and_nothing_is_half_there(text_dir, data_dir, script, tmp_path, n_bytes):
    some(text_dir, tmp_path / "text", "de", "en", "hi")
    if n_bytes > 1000:  # the tokenizer is there
        prepare(some(text_dir, tmp_path / "one", "hi"), tmp_path / "out", 0, data_dir / "tokenizer.model", 0.2)
    line = ["data.py", "text", "out", "--tokenizer", data_dir / "tokenizer.model", "--valid-fraction", "0.2"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))  # what a file may hold
    full = script(*line, preexec_fn=limit)
    assert full.returncode == 2 and len(full.stderr.splitlines()) == 1 and "make room" in full.stderr
    assert not [*(tmp_path / "out").glob("*tmp*")]
    assert [path.name for path in (tmp_path / "out").glob("*.json") if path.read_bytes()] in ([], ["hi.json"])
    with pytest.raises(InputError):
        TokenData(tmp_path / "out", 16)
    assert script(*line).returncode == 0
    assert_same_data(tmp_path / "out", data_dir)


def test_another_tokenizer_than_the_folders_is_refused(text_dir, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "out")
    (tmp_path / "new.model").write_bytes(train_tokenizer(find_text(text_dir)[0], 900, seed=0))
    with pytest.raises(InputError, match=r"new\.model: not that of .*out; give --tokenizer .*out/tokenizer\.model"):
        prepare(text_dir, tmp_path / "out", 0, tmp_path / "new.model", 0.2)
    assert_same_data(tmp_path / "out", data_dir)


# The command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["missing", "out"], "missing: no such folder"),
        (["empty", "out"], "empty: no text in it"),
        (["blank", "out"], "no text"),
        (["text", "full"], "full: not empty; name another"),
        (["text", "full", "--tokenizer", "data/tokenizer.model"], "full: not empty; name another"),
        (["text", "data"], "data: not empty; to continue it or add languages, give --tokenizer data/tokenizer.model"),
        (["text", "text/data"], "text/data: inside text, where it would be taken for text; name another folder"),
        (["text", "out", "--valid-fraction", "1"], "--valid-fraction must be at least 0 and below 1"),
        (["text", "out", "--seed", "-1"], "--seed from 0 to 2**64 - 1"),
        (["text", "full/precious/out"], "full/precious/out: not a directory; "),
        (["text", "out", "--tokenizer", "nowhere"], "nowhere: no such file or directory"),
        (["text", "out", "--vocab-size", "lots"], "--vocab-size"),
        (["text", "data", "--tokenizer", "data/tokenizer.model", "--vocab-size", "9"], "--vocab-size does nothing"),
        (["twice", "out"], "twice/en.txt and en.txt.gz: the same file, packed and unpacked; remove one"),
        (["text", "out", "--vocab-size", "900000"], "--vocab-size 900000 does not fit this text"),
    ],
)
def test_bad_commands(script, tmp_path, text_dir, data_dir, arguments, complaint):
    for folder in ("empty", "blank", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "blank" / "en.txt").write_text("\n \n")
    (tmp_path / "full" / "precious").write_text("data")
    for name in ("twice/en.txt", "twice/en.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    shutil.copytree(text_dir, tmp_path / "text")
    shutil.copytree(data_dir, tmp_path / "data")
    result = script("data.py", *arguments)
    assert result.returncode == 2 and complaint in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]
    assert not [*tmp_path.glob("out/*")] and not (tmp_path / "text" / "data").exists()
