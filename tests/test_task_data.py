import gzip
import subprocess
import sys

import pytest
from conftest import ROOT
from task_layouts import ITEMS, LAYOUTS, by_line, by_word, items_of, put

import task_data
from cli import InputError
from task_data import Item, find_splits, read_files, read_task

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the paper's data sets are not at {SHARED}")
NO_GZIP = gzip.compress(b"a", mtime=0)[:10] + b"\xff" * 20  # a sound header before what is none of its blocks


def read(path, text, task, language="en"):
    """The items of one file with this text."""
    put(path, text)
    return read_files(task, [path], language)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.task}: {layout.name}")
def test_layouts(layout, tmp_path, capsys):
    if ".parquet" in layout.path:
        pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    layout.make(tmp_path)
    if layout.refused:
        with pytest.raises(InputError) as raised:
            read_task(layout.task, tmp_path, layout.english)
        assert layout.refused in str(raised.value) and str(raised.value).startswith(str(tmp_path))
        return
    train, dev, test = read_task(layout.task, tmp_path, layout.english)
    assert train == dev == ITEMS[layout.task] == test[layout.english]
    assert {language: items_of(layout.task, language) for language in test if language != layout.english} == {
        language: items for language, items in test.items() if language != layout.english
    }
    said = capsys.readouterr().out
    assert all(part in said for part in layout.said) and bool(said) == bool(layout.said)


def test_the_table_of_layouts():
    script = ROOT / "tests" / "task_layouts.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(LAYOUTS) + 1


# Which file is which ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, split, language",
    [
        ("en/train.tsv", "train", "en"), ("en/dev", "dev", "en"), ("a/zh-yue/test.txt.xz", "test", "zh-yue"),
        ("en/valid.bio", "dev", "en"), ("en/validation-00000-of-00001.parquet", "dev", "en"),
        ("en/val.tsv", "dev", "en"), ("en/eval.txt", "dev", "en"), ("en-x/test.part-1.tsv", "test", "en-x"),
        ("train-sw.tsv", "train", "sw"),
        ("es-419/train.ndjson", "train", "es-419"), ("UD-2.9/dev.conllu", "dev", "xx"),
        ("dev-zh-min-nan.tsv", "dev", "zh-min-nan"),
        ("train_DE.tsv", "train", "de"), ("data/x/test_PT.tsv", "test", "pt"),
        ("xSID-0.7/de-ba.valid.conll", "dev", "de-ba"), ("gsw.test.conll", "test", "gsw"),
        ("UD_Upper_Sorbian-UFAL/hsb_ufal-ud-test.conllu", "test", "hsb"), ("en_ewt-ud-dev.conllu.gz", "dev", "en"),
        ("multinli/multinli.train.ar.tsv", "train", "ar"), ("XNLI-1.0/xnli.dev.tsv", "dev", "xx"),
        ("chinese_simplified_val.jsonl", "dev", "chinese_simplified"),
        ("english/english_test.jsonl", "test", "english"),
        ("data/test-00000-of-00003.parquet", "test", "xx"), ("train.jsonl", "train", "xx"),
        ("multinli_1.0/multinli_1.0_dev_matched.txt", "dev", "xx"),
        ("test-es-419.tsv", "test", "es-419"), ("es-419.test.conll", "test", "es-419"),
        ("test-zh-Hans.tsv", "test", "zh-Hans"), ("de-test.tsv", "test", "de"), ("de_test.tsv", "test", "de"),
        ("pt_BR_test.jsonl", "test", "pt_BR"), ("ner-test.tsv", "test", "xx"), ("en/de-test.tsv", "test", "en"),
    ],
)  # fmt: skip
def test_splits_and_languages_by_file_name(tmp_path, name, split, language):
    put(tmp_path / name, "")
    assert find_splits("summ", tmp_path, "xx")[split] == {language: [tmp_path / name]}


@pytest.mark.parametrize(
    "name",
    [
        "en/training.tsv",
        "en/extra",
        "README.md",
        "en/train.tsv~",
        "en/train.zip",
        "en/detest.tsv",
        "en/en.py",
        "en/train.csv",
    ],
)
def test_what_is_no_split_is_named(tmp_path, name, capsys):
    put(tmp_path / name, "")
    assert not any(find_splits("ner", tmp_path, "en").values())
    assert f"not read, no split or unknown format in the name: {name} (formats: .conllu" in capsys.readouterr().out


def test_links_are_followed_and_hidden_files_are_not_read(tmp_path):
    put(tmp_path / "blobs" / "0a1b", "a\tO\n")
    (tmp_path / "set" / "de").mkdir(parents=True)
    (tmp_path / "set" / "de" / "test.bio").symlink_to(tmp_path / "blobs" / "0a1b")
    (tmp_path / "set" / "en").symlink_to(tmp_path / "set" / "de")
    put(tmp_path / "set" / ".cache" / "fr" / "test.bio", "a\tO\n")
    assert sorted(find_splits("ner", tmp_path / "set", "en")["test"]) == ["de", "en"]


def test_two_treebanks_of_one_language(tmp_path, capsys):
    for name in ("UD_English-A/en_a-ud-train.conllu", "UD_English-B/en_b-ud-train.conllu", "en_a-ud-dev.conllu"):
        put(tmp_path / name, by_word("{n}\t{w}\t_\t{t}")(ITEMS["pos"], "en"))
    put(tmp_path / "en_a-ud-test.conllu", "1\tx\t_\tX\n")
    train, dev, test = read_task("pos", tmp_path, "en")
    assert train == 2 * ITEMS["pos"] and dev == ITEMS["pos"] and test == {"en": [Item(["x"], ["X"])]}
    assert "en_a-ud-train.conllu and 1 more are read as one set" in capsys.readouterr().out


@pytest.mark.parametrize(
    "train_language, chosen, complaint",
    [
        ("fr", None, "no train file of fr, but of en; see --train-lang"),
        ("en", ["hi"], "no test file of hi, but of de en; see"),
        ("de", None, "no train file of de, but of en"),
    ],
)
def test_languages_that_are_not_there(tmp_path, train_language, chosen, complaint):
    next(layout for layout in LAYOUTS if layout.task == "ner").make(tmp_path)
    with pytest.raises(InputError, match=complaint):
        read_task("ner", tmp_path, train_language, chosen)


def test_missing_folders_and_splits(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        read_task("ner", tmp_path / "nowhere", "en")
    put(tmp_path / "en" / "train.bio", "a\tO\n")
    with pytest.raises(InputError, match="no dev file of en, but of none"):
        read_task("ner", tmp_path, "en")
    put(tmp_path / "en" / "dev.bio", "a\tO\n")
    with pytest.raises(InputError, match="no test file of en, but of none"):
        read_task("ner", tmp_path, "en")


def test_languages_without_a_test_set_are_named_unless_others_were_asked_for(tmp_path, capsys):
    next(layout for layout in LAYOUTS if layout.task == "ner").make(tmp_path)
    put(tmp_path / "pt" / "dev.bio", "a\tO\n")
    assert list(read_task("ner", tmp_path, "en")[2]) == ["de", "en"]
    assert capsys.readouterr().out == "no test file, not scored: pt\n"
    assert list(read_task("ner", tmp_path, "en", ["de"])[2]) == ["de"] and not capsys.readouterr().out


def test_a_file_packed_and_not(tmp_path):
    for name in ("test.tsv", "test.tsv.xz"):
        put(tmp_path / name, "")
    with pytest.raises(InputError, match=r"test\.tsv and test\.tsv\.xz: the same file, packed"):
        read_files("nli", [tmp_path / "test.tsv", tmp_path / "test.tsv.xz"], "en")


# What is in a file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, name, text, complaint",
    [
        ("pos", "a.conllu", "", "a.conllu: nothing in it; fill it or leave the language out"),
        ("pos", "a.conllu", "1\tx\t_\n", "a.conllu:1: not number, word, lemma or intent, tag"),
        ("pos", "a.conllu", "1\tx\t_\tX\n\n# a\nx\tX\t_\tX\n", "a.conllu:4: not number, word"),
        ("pos", "a.conllu", "1\tx\t_\t_\n", "a.conllu: nothing in it"),
        ("ner", "a.bio", "a\tO\nb\n", "a.bio:2: not word, tag"),
        ("ner", "a.bio", "a\tO\nb\tO\tO\n", "a.bio:2: not word, tag"),
        ("ner", "a.bio", "a\tO\n\nb\tO\nc\tPER\n", "a.bio:3: the tag 'PER' in this sentence is not BIO"),
        ("ner", "a.jsonl", '{"tokens": ["a"], "ner_tags": [0]}\n', "a.jsonl:1: the tag 0 in this"),
        ("ner", "a.jsonl", '{"tokens": [1], "ner_tags": ["O"]}\n', "a.jsonl:1: words and tags must be lists, words"),
        ("ner", "a.jsonl", '{"tokens": ["a"], "ner_tags": 0}\n', "a.jsonl:1: words and tags must be lists"),
        ("slots", "a.jsonl", '{"utterance": "a", "slot_labels": "O", "intent": 0}\n', "a.jsonl:1: words and tags must"),
        ("slots", "a.tsv", "a b\tO\ti\n", "a.tsv:1: 2 words and 1 tags; give every word a tag"),
        ("slots", "a.tsv", "a b\tO O\n", "a.tsv:1: not all of utterance, slot_labels, intent"),
        ("slots", "a.tsv", "a\tO\ti\tj\n", "a.tsv:1: 4 columns, not 3"),
        ("nli", "a.tsv", "a\tb\t\n", "a.tsv: nothing in it"),
        ("nli", "a.tsv", "premise\thypothesis\tlabel\na\tb\tneutral\tc\n", "a.tsv:2: 4 columns, not 3"),
        ("nli", "a.jsonl", '{"premise": "a"}\n', "a.jsonl:1: not all of premise or sentence1"),
        ("nli", "a.jsonl", "[1]\n", "a.jsonl:1: not a JSON object; write one per line"),
        ("nli", "a.jsonl", '{"a": \n', "a.jsonl:1: not a JSON object"),
        ("parse", "a.tsv", "a\t[IN:A b ]\nb\t[IN:A b\n", "a.tsv:2: the brackets of the tree do not match"),
        ("parse", "a.tsv", "a\t[IN:A b ]\nb\tb ]\n", "a.tsv:2: the brackets"),
        ("parse", "a.tsv", "a\t[IN:A ] ]\n", "a.tsv:1: the brackets"),
        ("summ", "a.jsonl", '{"source": ["a"], "target": "b"}\n', "a.jsonl:1: source, target must be texts"),
        ("summ", "a.tsv", "a\n", "a.tsv:1: not all of source or document or text, target or summary"),
    ],
)  # fmt: skip
def test_what_cannot_be_right(tmp_path, task, name, text, complaint):
    with pytest.raises(InputError) as raised:
        read(tmp_path / name, text, task)
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.gz", NO_GZIP, r"a\.gz:1: cannot be read"),
        ("a.tsv", b"a\tb\tneutral\na\tb\xff\tc\n", r"a\.tsv:2: not UTF-8"),
        ("a.tsv.bz2", b"x", r"a\.tsv\.bz2:1: cannot be read"),
    ],
)
def test_damaged_files(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        read_files("nli", [tmp_path / name], "en")


def test_damaged_parquet_files(tmp_path):
    pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    (tmp_path / "test.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"test\.parquet: cannot be read"):
        read_files("nli", [tmp_path / "test.parquet"], "en")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "test.parquet").touch()
    with pytest.raises(InputError, match=r"test\.parquet: to read parquet files, pip install pyarrow"):
        read_files("nli", [tmp_path / "test.parquet"], "en")


def test_a_class_that_the_schema_has_not(tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    rows, names = [{"premise": "a", "hypothesis": "b", "label": k} for k in (-1, 0)], {"label": list(task_data.NLI)}
    assert len(read(tmp_path / "dev.parquet", (rows, names), "nli")) == 1  # -1: no class, as "-"
    assert "dev.parquet: 1 items without a class" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"test\.parquet: nothing in it"):
        read(tmp_path / "test.parquet", (rows[:1], names), "nli")


def test_quotes_of_csv_writers_and_other_quotes(tmp_path):
    text = '"He said ""no""."\tHe said "no".\tneutral\n"All in quotes."\t"A" and "B"\tneutral\n'
    items = read(tmp_path / "a.tsv", text, "nli")
    assert [item.words for item in items] == [['He said "no".', 'He said "no".'], ['"All in quotes."', '"A" and "B"']]


def test_columns_by_their_names(tmp_path):
    text = "gold_label\tsentence2\tsentence1\tlabel1\nneutral\tb\ta\n"  # fewer columns in the line, as in MultiNLI
    assert read(tmp_path / "a.txt", text, "nli") == [Item(["a", "b"], label="neutral")]


def test_what_is_dropped_is_counted(tmp_path, capsys):
    items = read(tmp_path / "a.tsv", "a\tb\tneutral\n\n \tb\tneutral\na\tb\t-\n", "nli")
    assert items == [Item(["a", "b"], label="neutral")]
    assert "a.tsv: 2 items without a class (-) or with an empty field dropped\n" in capsys.readouterr().out
    rows = '{"source": "a", "target": "b"}\n{"source": null, "target": "b"}\n'
    assert read(tmp_path / "a.jsonl", rows, "summ") == [Item(["a"], label="b")]
    assert "a.jsonl: 1 items without" in capsys.readouterr().out


def test_a_byte_order_mark_carriage_returns_and_line_separators(tmp_path):
    text = "\ufeffJohn\tB-PER\r\nKiel\u2028\tB-LOC\r\n\r\na\tO"
    assert read(tmp_path / "a.bio", text, "ner") == [
        Item(["John", "Kiel\u2028"], ["B-PER", "B-LOC"]),
        Item(["a"], ["O"]),
    ]


def test_sentences_with_a_word_without_tag(tmp_path, capsys):
    text = "1\ta\t_\tX\n2\tb\t_\t_\n\n1\t_\t_\tPUNCT\n2\tb\t_\tX\n"  # the word _ is one
    assert read(tmp_path / "a.conllu", text, "pos") == [Item(["_", "b"], ["PUNCT", "X"])]
    assert "1 sentences without text or tags (_) dropped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tags, expected, said",
    [
        ("I-A I-A O I-A B-A", "B-A I-A O B-A B-A", "2 entities converted from IOB1 to BIO"),
        ("I-A I-B O", "B-A B-B O", "2 entities converted"),
        ("B-A I-A O I-B", "B-A I-A O I-B", "1 entities that begin with I-, left unchanged"),
        ("B-A B-A I-A O", "B-A B-A I-A O", ""),
        ("O O", "O O", ""),
    ],
)
def test_iob1(tmp_path, tags, expected, said, capsys):
    (item,) = read(tmp_path / "a.bio", "".join(f"w\t{tag}\n" for tag in tags.split()), "ner")
    assert " ".join(item.tags) == expected
    out = capsys.readouterr().out
    assert said in out and bool(said) == bool(out)


def test_a_language_before_some_words_is_part_of_them(tmp_path, capsys):
    (item,) = read(tmp_path / "a.bio", "en:a\tO\nb\tO\n", "ner")
    assert item.words == ["en:a", "b"] and not capsys.readouterr().out


def test_spaces_around_words_and_tags_of_an_utterance(tmp_path):
    (item,) = read(tmp_path / "a.tsv", "a  b \tO O\ti\n", "slots")
    assert item == Item(["a", "b"], ["O", "O"], "i")


@pytest.mark.parametrize(
    "tree, sound",
    [
        ("[IN:A b ]", True), ("[IN:A [SL:B c ] d ]", True), ("[IN:A b", False), ("[IN:A b ] ]", False), ("", False),
        ("a [IN:A b ]", False), ("[IN:A b ] c", False), ("[IN:A ] [IN:B ]", False), ("]", False), ("[IN:A", False),
    ],
)  # fmt: skip
def test_well_formed_trees(tree, sound):
    assert task_data.well_formed(tree) == sound


# Sets that are there ------------------------------------------------------------------------------------------------


def test_the_embedded_utterances():
    train, dev, test = read_task("slots", ROOT / "sample" / "slots", "en")
    assert len(train) == 100 and len(test) == 12 and all(len(items) == 30 for items in test.values())
    tags, intents = {tag for item in train for tag in item.tags}, {item.label for item in train}
    for language, items in test.items():
        assert {tag for item in items for tag in item.tags} <= tags, language
        assert [item.label for item in items] == [item.label for item in test["en"]]
    assert {item.label for item in test["en"]} <= intents
    texts = [" ".join(item.words) for items in (train, dev, *test.values()) for item in items]
    assert len(set(texts)) == len(texts)


@needs_shared
@pytest.mark.parametrize("task, layout", [("ner", "{lang}:{w}\t{t}"), ("pos", "{w}\t{t}"), ("parse", ""), ("nli", "")])
@pytest.mark.slow
def test_real_sets_as_released(tmp_path, task, layout):
    """Laid out as PAN-X, XTREME's UDPOS, mTOP and XTREME's XNLI, they are read as they were."""
    writers = {
        "parse": by_line('{n}\tIN:X\t\t{a}\talarm\t{lang}_XX\t{label}\t{{"tokens": []}}'),
        "nli": by_line("{a}\t{b}\t{label}", end="\r\n", quote=True),
    }
    names = {"ner": "{}/{}", "pos": "{1}-{0}.tsv", "parse": "mtop/{}/{}.txt", "nli": "{1}-{0}.tsv"}
    splits = find_splits(task, SHARED / task.replace("pos", "udpos"), "en")
    for split, languages in splits.items():
        for language, files in languages.items():
            items = read_files(task, files, language)
            name = names[task].format(language, "eval" if (task, split) == ("parse", "dev") else split)
            put(tmp_path / name, writers.get(task, by_word(layout))(items, language))
            assert read_files(task, find_splits(task, tmp_path, "en")[split][language], language) == items


def test_lines_of_a_file_packed_with_zstd(tmp_path):
    zstd = pytest.importorskip("backports.zstd", reason="pip install backports.zstd")
    packed = zstd.compress(b"a\tb\tneutral\n" * 2)
    (tmp_path / "test.tsv.zst").write_bytes(packed)
    assert [*task_data.lines(tmp_path / "test.tsv.zst")] == [(1, "a\tb\tneutral"), (2, "a\tb\tneutral")]
    (tmp_path / "cut.tsv.zst").write_bytes(packed[:-4])
    with pytest.raises(InputError, match=r"cut\.tsv\.zst:\d: cannot be read"):
        list(task_data.lines(tmp_path / "cut.tsv.zst"))
