"""Reads the tasks' data as released: which file is which split of which language, and the items in it.

Files are recognised by name: <lang>/train.*, <lang>/dev, <lang>/test-00000-of-00001.parquet (ours, mTOP, PAN-X, the
hub), train-<lang>.tsv, train_<LANG>.tsv (XTREME, MultiATIS++), <lang>.train.conll (xSID), <language>_train.jsonl
(XL-Sum), <lang>_<treebank>-ud-train.conllu; dev may be valid, validation, val or eval. If no name has a language, a
column has it (XNLI), or there is only one (XSum). What is dropped, converted or guessed is printed.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from glob import glob
from itertools import accumulate, groupby
from pathlib import Path

from cli import InputError
from text import refuse_packed_twice, unpack, unpacked

NLI = ("entailment", "neutral", "contradiction")
UPOS = "ADJ|ADP|ADV|AUX|CCONJ|DET|INTJ|NOUN|NUM|PART|PRON|PROPN|PUNCT|SCONJ|SYM|VERB|X"
FIELDS = {  # task -> field -> its names in the releases; the columns of a file without a header
    "nli": {"premise": ("premise", "sentence1"), "hypothesis": ("hypothesis", "hypo", "sentence2"),
            "label": ("label", "gold_label")},
    "pos": {"words": ("tokens",), "tags": ("upos", "pos_tags")},
    "ner": {"words": ("tokens",), "tags": ("ner_tags",)},
    "slots": {"words": ("utterance",), "tags": ("slot_labels",), "label": ("intent",)},
    "parse": {"source": ("utterance",), "target": ("tree",)},
    "summ": {"source": ("source", "document", "text"), "target": ("target", "summary")},
}  # fmt: skip
MTOP = ["id", "intent", "slots", "utterance", "domain", "locale", "tree", "tokens"]  # its columns
CONLL = (".conllu", ".conll")  # columns: number, word, lemma or intent, tag
NO_WORD = re.compile(r"#|\d+[-.]\d+\t")  # of CoNLL-U: a comment, a range of words (1-2), an empty node (5.1)
IN_CSV = re.compile(r'"([^"]|"")*""([^"]|"")*"')  # a field with quotes in it, as csv writers quote it
# If two files share a name, the first of these is read.
FORMATS = (*CONLL, ".bio", ".parquet", ".jsonl", ".ndjson", ".json", ".tsv", ".txt", "")
NEEDED = "columns must be separated by tabs and have labels (XTREME's test files have none); use another file"
MORE = r"(?:[-_](?:[A-Za-z]{2,}|[1-9]\d\d))*"  # of a code: zh-Hans, es-419; not -000 of a part
CODE = "[A-Za-z]{2,3}" + MORE  # of a language: en, EN, gsw, zh-classical
NAME = re.compile(
    rf"((?P<ud>[a-z]+)_\w+-ud-|(?P<first>{CODE})\.|(?P<before>[a-z]{{2}}{MORE}|[a-z_]+(?=_[a-z]+\.jsonl))[-_]|.*[-_.])?"
    rf"(?P<split>train|dev|valid|validation|val|eval|test)([-_.](?P<last>{CODE})\.\w+|[-_.].*)?"
)


# Files -------------------------------------------------------------------------------------------------------------


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, packed or not. Raises InputError with file and line."""
    number = 0
    try:
        with open(path, "rb") as packed, unpack(packed) as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check its name") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file") from None
    except ImportError:
        raise InputError(f"{path}: to read it, pip install backports.zstd") from None
    except Exception as error:  # each package raises its own for damage
        raise InputError(f"{path}:{number + 1}: cannot be read ({error}); fetch the file again") from None


def parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Numbered rows of a parquet file; classes, stored as numbers, become their names in the schema."""
    try:
        from pyarrow.parquet import read_table

        table = read_table(path)
    except ImportError:
        raise InputError(f"{path}: to read parquet files, pip install pyarrow") from None
    except Exception as error:  # pyarrow has many kinds for damage
        raise InputError(f"{path}: cannot be read ({error}); fetch the file again") from None
    info = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    features = {column: x.get("feature") or x for column, x in info.get("features", {}).items() if isinstance(x, dict)}
    classes = {column: dict(enumerate(x["names"])) for column, x in features.items() if x.get("_type") == "ClassLabel"}
    for number, row in enumerate(table.to_pylist(), 1):
        for column, names in classes.items():
            value = row[column]
            row[column] = [*map(names.get, value)] if isinstance(value, list) else names.get(value)
        yield number, row


def rows(path: Path) -> Iterator[tuple[int, dict | list[str]]]:
    """Numbered rows: named fields of a parquet or JSON file, else tab-separated columns.

    Raises InputError with file and line.
    """
    if path.suffix == ".parquet":
        yield from parquet_rows(path)
        return
    is_json = unpacked(path).suffix in (".json", ".jsonl", ".ndjson")
    for number, line in lines(path):
        if line.strip() and is_json:
            try:
                yield number, dict(json.loads(line))
            except (ValueError, TypeError):
                raise InputError(f"{path}:{number}: not a JSON object; write one per line") from None
        elif line.strip():
            yield number, [x[1:-1].replace('""', '"') if IN_CSV.fullmatch(x) else x for x in line.split("\t")]


# Items -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One sentence, pair or document of a task."""

    words: list[str]  # of a tagged sentence; or premise and hypothesis; or the source text alone
    tags: list[str] = field(default_factory=list)  # one per word
    label: str = ""  # intent or class; for a generation task, the target


def records(task: str, path: Path) -> Iterator[tuple[int, dict]]:
    """Numbered rows as the fields of the task, and "language" if there is one. Raises InputError with file and line."""
    fields, header = FIELDS[task], None
    for number, row in rows(path):
        if isinstance(row, list):
            if header is None and all(set(names) & set(row) for names in fields.values()):
                header = row
                continue
            header = header or (MTOP if task == "parse" and len(row) == 8 else [names[0] for names in fields.values()])
            if len(row) > len(header):
                raise InputError(f"{path}:{number}: {len(row)} columns, not {len(header)}; fix the line")
            row = dict(zip(header, row))
        row = {name: "" if value is None else value for name, value in row.items()}  # null is no text
        record = {x: next((row[name] for name in names if name in row), None) for x, names in fields.items()}
        if None in record.values():
            needed = ", ".join(" or ".join(names) for names in fields.values())
            raise InputError(f"{path}:{number}: not all of {needed}; {NEEDED}")
        yield number, record | {x: row[x] for x in ("language",) if x in row}


def sentences(task: str, path: Path) -> Iterator[tuple[int, dict]]:
    """Numbered sentences of a file with one word per line: columns as in CONLL, or the word first and its tag last."""
    conll, width = unpacked(path).suffix in CONLL, 0
    needed = "number, word, lemma or intent, tag (name files of word and tag .bio)" if conll else "word, tag"
    for blank, group in groupby(lines(path), lambda numbered: not numbered[1].strip()):
        block = [(number, line.split("\t")) for number, line in group if not (conll and NO_WORD.match(line))]
        if blank or not block:
            continue
        for number, row in block:
            if not width and not conll and len(row) > 2:
                print(f"{path}: tags taken from the last of {len(row)} columns")
            width = width or len(row)
            if len(row) != width or width < 2 + 2 * conll or (conll and not row[0].isdigit()):
                raise InputError(f"{path}:{number}: not {needed}; {NEEDED}")
        words, tags = ([row[i] for _, row in block] for i in ((1, 3) if conll else (0, -1)))
        number, row = block[0]
        yield number, {"words": words, "tags": tags, "label": row[2] if task == "slots" else ""}


def well_formed(tree: str) -> bool:
    """Whether a linearised tree is one tree: brackets match and nothing stands outside."""
    depths = [*accumulate((part[0] == "[" and len(part) > 1) - (part == "]") for part in tree.split())]
    return len(depths) > 1 and depths[-1] == 0 and min(depths[:-1]) > 0


def read_texts(task: str, path: Path, language: str, notes: Counter) -> Iterator[Item]:
    """Items of nli, parse and summ. Raises InputError with file and line."""
    for number, record in records(task, path):
        if record.pop("language", language) != language:
            notes["items of other languages left out"] += 1
            continue
        *texts, label = record.values()
        if not all(isinstance(x, str) for x in record.values()):
            raise InputError(f"{path}:{number}: {', '.join(record)} must be texts; convert numbers or lists")
        if label == "contradictory":
            label = "contradiction"
            notes["labels contradictory read as contradiction"] += 1
        if label == "-" or not all(x.strip() for x in record.values()):
            notes["items without a class (-) or with an empty field dropped"] += 1
        elif task == "nli" and label not in NLI:
            raise InputError(f"{path}:{number}: {label!r} is none of {', '.join(NLI)}; fix the line")
        elif task == "parse" and not well_formed(label):
            raise InputError(f"{path}:{number}: the brackets of the tree do not match; fix the line")
        else:
            yield Item(texts, label=label)


def from_iob1(tags: list[list[str]], notes: Counter) -> list[list[str]]:
    """Converts IOB1 tags, with B- only between two entities of one type, to BIO, where every entity begins with B-."""
    opens = [[tag[2:] not in ("", last[2:]) for last, tag in zip(["O", *row], row)] for row in tags]
    letters = Counter(tag[0] for row, xs in zip(tags, opens) for tag, x in zip(row, xs) if x)
    if letters["B"] or not letters["I"]:
        notes["entities that begin with I-, left unchanged"] += letters["I"]
        return tags
    notes["entities converted from IOB1 to BIO"] += letters["I"]
    return [["B" + tag[1:] if x else tag for tag, x in zip(row, xs)] for row, xs in zip(tags, opens)]


def read_tagged(task: str, path: Path, language: str, notes: Counter) -> list[Item]:
    """Items of pos, ner and slots. Raises InputError with file and line."""
    valid, kind = (f"{UPOS}|_", "UPOS (ADJ to X)") if task == "pos" else ("O|[BI]-.+", "BIO (O, B-x, I-x)")
    by_word, items = CONLL if task == "slots" else (*CONLL, ".bio", ".tsv", ".txt", ""), []
    for number, record in (sentences if unpacked(path).suffix in by_word else records)(task, path):
        words, tags = (re.findall("[^ ]+", x) if isinstance(x, str) else x for x in (record["words"], record["tags"]))
        texts = [*words, record.get("label", "")] if isinstance(words, list) and isinstance(tags, list) else [words]
        if not all(isinstance(x, str) for x in texts):
            raise InputError(f"{path}:{number}: words and tags must be lists, words and intents texts; convert numbers")
        if len(words) != len(tags):
            raise InputError(f"{path}:{number}: {len(words)} words and {len(tags)} tags; give every word a tag")
        if odd := [tag for tag in tags if not re.fullmatch(valid, str(tag))]:
            raise InputError(f"{path}:{number}: the tag {odd[0]!r} in this sentence is not {kind}; convert the tags")
        if task == "slots" and not record["label"]:
            raise InputError(f"{path}:{number}: no intent; give the sentence one, or remove it")
        items.append(Item(words, tags, record.get("label", "")))
    if items and all(word.isdigit() for item in items for word in item.words):
        raise InputError(f"{path}:1: its words are numbers; name CoNLL-U files .conllu, or use the column of words")
    whole = [item for item in items if not set(item.words) <= {"_"} and "_" not in item.tags]
    notes["sentences without text or tags (_) dropped"] += len(items) - len(whole)
    if task == "ner" and whole and all(re.match("[a-z-]+:", word) for item in whole for word in item.words):
        notes["sentences: the language before every word (en:) removed"] += len(whole)
        whole = [replace(item, words=[word.split(":", 1)[1] for word in item.words]) for item in whole]
    if task == "pos":
        return whole
    return [replace(item, tags=tags) for item, tags in zip(whole, from_iob1([item.tags for item in whole], notes))]


READERS: dict[str, Callable[[Path, str, Counter], Iterable[Item]]] = {  # (file, language, what to print) -> items
    task: partial(read_tagged if "words" in fields else read_texts, task) for task, fields in FIELDS.items()
}


def find_splits(task: str, folder: Path, train_language: str) -> dict[str, dict[str, list[Path]]]:
    """split -> language -> files. Prints what is not read, and which languages are guesses."""
    splits: dict[str, dict[str, list[Path]]] = {"train": {}, "dev": {}, "test": {}}
    others = []
    for path in map(folder.joinpath, sorted(glob("**", root_dir=folder, recursive=True))):
        match, parent = NAME.fullmatch(unpacked(path).name), path.parent.name
        if path.is_dir():
            continue
        if not match or unpacked(path).suffix not in FORMATS or parent == "all_languages":  # in XNLI on the hub
            others.append(str(path.relative_to(folder)))
            continue
        code = match["ud"] or match["first"] or match["last"] or ""
        code = code.lower() if code.isupper() else code
        no_language = path.parent == folder or re.fullmatch(r"data|(?![a-z]{2,3}-\d{3}$).*\d.*", parent)
        languages = {code or ("" if no_language else parent) or match["before"] or ""} - {""}
        if not languages and task == "nli":
            languages = {record.get("language") for _, record in records(task, path)} - {None}
        if not languages:
            print(f"{path}: no language in its name; taken as {train_language}")
        for language in languages or {train_language}:
            splits.get(match["split"], splits["dev"]).setdefault(language, []).append(path)
    if others:
        named = f"{' '.join(others[:9])}{' ...' * (len(others) > 9)} (formats: {' '.join(filter(None, FORMATS))})"
        print(f"{folder}: not read, no split or unknown format in the name: {named}")
    return splits


def read_files(task: str, files: list[Path], language: str) -> list[Item]:
    """The items in the files of a split. Raises InputError if there are none, or if one cannot be right."""
    refuse_packed_twice(files)
    first: dict[Path, Path] = {}
    for path in sorted(files, key=lambda path: FORMATS.index(unpacked(path).suffix)):
        if (other := first.setdefault(unpacked(path).with_suffix(""), path)) is not path:
            print(f"{path}: not read; {other.name} has the same name")
    items, chosen = [], [path for path in files if path in first.values()]
    if len(chosen) > 1:
        print(f"{chosen[0]} and {len(chosen) - 1} more are read as one set")
    for path in chosen:
        notes: Counter = Counter()
        items += READERS[task](path, language, notes)
        for what, n in (+notes).items():
            print(f"{path}: {n:,} {what}")
    if not items:
        raise InputError(f"{files[0]}: nothing in it; fill it or leave the language out")
    return items


def read_task(
    task: str, folder: Path, train_language: str, chosen: list[str] | None = None
) -> tuple[list[Item], list[Item], dict[str, list[Item]]]:
    """Training and dev set of one language, test sets of those chosen or all. Raises InputError if one is missing."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --data names one that holds <lang>/train.*, dev.*, test.*")
    splits = find_splits(task, folder, train_language)
    languages = chosen or sorted(splits["test"]) or [train_language]
    wanted = [("train", train_language), ("dev", train_language), *(("test", language) for language in languages)]
    for split, language in wanted:
        if language not in splits[split]:
            there = " ".join(sorted(splits[split])) or "none"
            raise InputError(f"{folder}: no {split} file of {language}, but of {there}; see --train-lang and --langs")
    if skipped := sorted((splits["train"] | splits["dev"]).keys() - languages) if not chosen else []:
        print(f"no test file, not scored: {' '.join(skipped)}")
    train, dev, *test = (read_files(task, splits[split][language], language) for split, language in wanted)
    return train, dev, dict(zip(languages, test))
