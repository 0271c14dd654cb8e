"""Every layout in which people have the tasks' data, with text of our own: what task_data.py makes of it.

    python tests/task_layouts.py

prints a table of the layouts: languages, items and labels as read, or the refusal; and what was said. Each of them is
also a test in test_task_data.py.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import task_data
from cli import InputError
from task_data import Item

ITEMS = {
    "nli": [
        Item(["The ferry leaves at seven.", 'A "new" ferry leaves.'], label="neutral"),
        Item(['"Sold out", said the baker.', "Nothing was left."], label="entailment"),
        Item(["The bridge is closed.", "The bridge is open."], label="contradiction"),
    ],
    "pos": [
        Item(["Do", "n't", "wake", "the", "baker"], ["AUX", "PART", "VERB", "DET", "NOUN"]),
        Item(["#", "7 30", "_"], ["SYM", "NUM", "PUNCT"]),
    ],
    "ner": [
        Item(["Anna", "Berg", "Kiel", "sleeps", ":"], ["B-PER", "I-PER", "B-LOC", "O", "O"]),
        Item(["Kiel", "Bonn", "2-1"], ["B-LOC", "B-LOC", "O"]),
    ],
    "slots": [
        Item(["wake", "me", "at", "six"], ["O", "O", "B-time", "I-time"], "alarm/set"),
        Item(["rain", "?"], ["B-weather", "O"], "weather/find"),
    ],
    "parse": [
        Item(["Wake me at six"], label="[IN:CREATE_ALARM Wake me [SL:DATE_TIME at six ] ]"),
        Item(["How cold is it"], label="[IN:GET_WEATHER How cold is it ]"),
    ],
    "summ": [
        Item(["The ferry was late.\nPeople waited."], label="A late ferry."),
        Item(["A baker gave away bread."], label="Free bread."),
    ],
}
SETS = [("en", "train"), ("en", "dev"), ("en", "test"), ("de", "test")]
BIO_CLASSES = ["O", "B-PER", "I-PER", "B-LOC"]


def items_of(task: str, language: str) -> list[Item]:
    """English and German sets hold the same items, in another order."""
    return ITEMS[task] if language == "en" else ITEMS[task][::-1]


# Writers: (items, language) -> the text of a file, or the rows of a parquet file and the names of its classes --------


def by_word(line: str) -> Callable[[list[Item], str], str]:
    """A word a line; `line` is of a word, its tag, its number, the language and the label."""

    def write(items: list[Item], language: str) -> str:
        sentences = []
        for item in items:
            words = zip(item.words, item.tags)
            rows = [line.format(w=w, t=t, n=n, lang=language, label=item.label) for n, (w, t) in enumerate(words, 1)]
            sentences.append("\n".join(rows) + "\n\n")
        return "".join(sentences)

    return write


def by_line(line: str, header: str = "", end: str = "\n", quote: bool = False) -> Callable[[list[Item], str], str]:
    """An item a line; `quote` as csv writers do."""

    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if quote and '"' in text else text

    def write(items: list[Item], language: str) -> str:
        rows = []
        for n, item in enumerate(items):
            a, b = [quoted(text) for text in [*item.words, "", ""]][:2]
            words, tags = " ".join(item.words), " ".join(item.tags)
            rows.append(line.format(a=a, b=b, words=words, tags=tags, label=item.label, n=n, lang=language))
        return "".join(row + end for row in [header] * bool(header) + rows)

    return write


def jsonl(source: str, target: str) -> Callable[[list[Item], str], str]:
    return lambda items, language: "".join(
        json.dumps({"id": 0, source: item.words[0], target: item.label}) + "\n" for item in items
    )


def parquet(row: Callable[[Item], dict], **classes: list[str]) -> Callable:
    return lambda items, language: ([row(item) for item in items], classes)


def conllu(items: list[Item], language: str) -> str:
    """With a comment, a range and an empty node, and a sentence whose text was removed."""
    text = by_word("{n}\t{w}\tlemma\t{t}\tX\t_\t_\t_\t_\tSpaceAfter=No")(items, language)
    start = "# text = ours\n1-2\tDon't" + 8 * "\t_" + "\n0.1\tplease" + 8 * "\t_" + "\n"
    return start + text + "1\t_\t_\tNOUN" + 6 * "\t_" + "\n\n"


def all_languages(line: str, header: str) -> Callable[[list[Item], str], str]:
    """A file of two languages, with a column that says which."""
    write = by_line(line)
    return lambda items, language: header + "\n" + "".join(write(items_of("nli", x), x) for x in ("de", "en"))


XNLI_HEADER = "language\tgold_label\tsentence1_parse\tsentence1\tsentence2\tmatch"
XNLI = all_languages("{lang}\t{label}\t\t{a}\t{b}\tTrue", XNLI_HEADER)
MULTINLI_HEADER = "gold_label\tsentence1_parse\tsentence1\tsentence2\tgenre\tlabel1\tlabel2"
MULTINLI = by_line("{label}\t(ROOT a)\t{a}\t{b}\tslate\t{label}", MULTINLI_HEADER)
MOVED = "{lang}/{split}.tsv"
PARQUET = "{lang}/{split}-00000-of-00001.parquet"


def contradictory(items: list[Item], language: str) -> str:
    text = by_line("{a}\t{b}\t{label}", "premise\thypo\tlabel")(items, language)
    return text.replace("contradiction", "contradictory")


def undecided(items: list[Item], language: str) -> str:
    return MULTINLI(items, language) + "-\t(ROOT a)\tA.\tB.\tslate\t\n"


def iob1(items: list[Item], language: str) -> str:
    tags = {"B-PER": "I-PER", "B-LOC": "I-LOC"}
    text = []
    for item in items:
        last = "O"
        for word, tag in zip(item.words, item.tags):
            text.append(f"{word}\t{tag if tag[2:] == last[2:] else tags.get(tag, tag)}\n")
            last = tag
        text.append("\n")
    return "".join(text)


def number(names: list[str]) -> Callable[[Item], dict]:
    return lambda item: {"tokens": item.words, "ner_tags": [names.index(tag) for tag in item.tags]}


def pair(item: Item) -> dict:
    return {"premise": item.words[0], "hypothesis": item.words[1], "label": task_data.NLI.index(item.label)}


@dataclass(frozen=True)
class Layout:
    """A way to lay out a task's files, and what becomes of it."""

    name: str
    task: str
    path: str  # of a set
    write: Callable
    dev: str = "dev"
    said: tuple[str, ...] = ()  # parts of what is printed
    refused: str = ""  # or a part of the message
    english: str = "en"  # what the language is called
    sets: tuple = tuple(SETS)
    more: tuple[tuple[str, str], ...] = ()  # other files

    def make(self, folder: Path) -> None:
        for language, split in self.sets:
            name = self.english if language == "en" else language
            split = self.dev if split == "dev" else split
            path = folder / self.path.format(lang=name, LANG=name.upper(), split=split)
            put(path, self.write(items_of(self.task, language), language))
        for path, text in self.more:
            put(folder / path, text)


def put(path: Path, content: str | tuple) -> None:
    """Writes a text, packed if its name says so, or a parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        opener = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(path.suffix, open)
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            file.write(content)
        return
    import pyarrow
    import pyarrow.parquet

    rows, classes = content
    features = {column: {"names": names, "_type": "ClassLabel"} for column, names in classes.items()}
    if "ner_tags" in features:
        features["ner_tags"] = {"feature": features["ner_tags"], "_type": "List"}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows).replace_schema_metadata(about), path)


ENGLISH = tuple((language, split) for language, split in SETS if language == "en")
TWO = by_word("{w}\t{t}")
FOUR = by_word("{w}\tNNP\tB-NP\t{t}")
OTHER_ORDER = by_word("{w}\t{t}\tNNP\tNN")
SLOTS = "{words}\t{tags}\t{label}"
ATIS = by_line("{n}\t" + SLOTS, "id\tutterance\tslot_labels\tintent")
MTOP = by_line('{n}\tIN:X\t10:16:SL:Y\t{a}\talarm\t{lang}_XX\t{label}\t{{"tokens": []}}')
XTREME = by_line("{a}\t{b}\t{label}", end="\r\n", quote=True)
SUMMARY = parquet(lambda item: {"document": item.words[0], "summary": item.label, "id": "0"})
LAYOUTS = [
    Layout("ours", "nli", MOVED, by_line("{a}\t{b}\t{label}")),
    Layout("XNLI, original", "nli", "XNLI-1.0/xnli.{split}.tsv", XNLI, sets=(("en", "dev"), ("en", "test")),
           more=(("XNLI-MT-1.0/multinli/multinli.train.en.tsv", contradictory(ITEMS["nli"], "en")),
                 ("XNLI-1.0/xnli.test.jsonl.gz", "".join(json.dumps({
                     "language": x, "gold_label": item.label, "sentence1": item.words[0], "sentence2": item.words[1]
                  }) + "\n" for x in ("en", "de") for item in items_of("nli", x)))),
           said=("xnli.test.tsv: not read; xnli.test.jsonl.gz has", "3 items of other languages left out",
                 "1 labels contradictory read as contradiction")),
    Layout("XNLI, original, moved", "nli", MOVED, XNLI, said=("en/dev.tsv: 3 items of other languages left out",)),
    Layout("XNLI, hub", "nli", PARQUET, parquet(pair, label=list(task_data.NLI)), "validation",
           more=(("all_languages/test.jsonl", '{"premise": {}}\n'),), said=("in the name: all_languages/test.jsonl",)),
    Layout("XNLI, hub, classes without names", "nli", PARQUET, parquet(pair), "validation",
           refused="en/train-00000-of-00001.parquet:1: premise, hypothesis, label must be texts"),
    Layout("XNLI, XTREME with labels", "nli", "{split}-{lang}.tsv", XTREME),
    Layout("XNLI, XTREME", "nli", "{split}-{lang}.tsv", XTREME, sets=ENGLISH[:2], more=(("test-de.tsv", "A.\tB.\r\n"),),
           refused="test-de.tsv:1: not all of premise or sentence1"),
    Layout("MultiNLI, moved", "nli", "{lang}/{split}.txt", undecided,
           said=("1 items without a class (-) or with an empty field dropped",)),
    Layout("another class", "nli", MOVED, by_line("{a}\t{b}\tmaybe"), refused="en/train.tsv:1: 'maybe' is none of"),
    Layout("an unknown header", "nli", MOVED, by_line("{a}\t{b}\t{label}", "text_a\ttext_b\tclass"),
           refused="en/train.tsv:1: 'class' is none of"),
    Layout("ours", "pos", "{lang}/{split}.conllu", conllu, said=("1 sentences without text or tags (_) dropped",)),
    Layout("Universal Dependencies", "pos", "UD_{lang}-Ours/{lang}_ours-ud-{split}.conllu", conllu,
           more=(("UD_en-Ours/en_ours-ud-train.txt", "Text."), ("UD_en-Ours/README.md", "")),
           said=("en_ours-ud-train.txt: not read; en_ours-ud-train.conllu", "in the name: UD_en-Ours/README.md",
                 "1 sentences without text or tags (_) dropped")),
    Layout("UDPOS, XTREME with tags", "pos", "{split}-{lang}.tsv", TWO),
    Layout("UDPOS, XTREME", "pos", "{split}-{lang}.tsv", TWO, sets=ENGLISH[:2], more=(("test-de.tsv", "Wort\n"),),
           refused="test-de.tsv:1: not word, tag; columns must be separated by tabs and have labels"),
    Layout("CoNLL-U by another name", "pos", MOVED, by_word("{n}\t{w}\t_\t{t}\t_"),
           refused="en/train.tsv:1: its words are numbers"),
    Layout("numbers and tags", "pos", MOVED, by_word("{n}\t{t}"), refused="en/train.tsv:1: its words are numbers"),
    Layout("tags of the Penn treebank", "pos", MOVED, by_word("{w}\tVBD"), refused="the tag 'VBD' in this sentence is"),
    Layout("ours", "ner", "{lang}/{split}.bio", TWO),
    Layout("PAN-X", "ner", "{lang}/{split}", by_word("{lang}:{w}\t{t}"), more=(("en/extra", "en:a\tO\n"),),
           said=("2 sentences: the language before every word (en:) removed",
                 "no split or unknown format in the name: en/extra")),
    Layout("PAN-X, XTREME with tags", "ner", "{split}-{lang}.tsv", TWO),
    Layout("WikiANN, hub", "ner", PARQUET, parquet(number(BIO_CLASSES), ner_tags=BIO_CLASSES), "validation"),
    Layout("WikiANN, hub, classes without names", "ner", PARQUET, parquet(number(BIO_CLASSES)), "validation",
           refused="en/train-00000-of-00001.parquet:1: the tag 1 in this sentence is not BIO"),
    Layout("CoNLL of 4 columns", "ner", MOVED, FOUR, said=("tags taken from the last of 4 columns",)),
    Layout("CoNLL of 4 columns, tags second", "ner", MOVED, OTHER_ORDER, refused="the tag 'NN' in this sentence is"),
    Layout("CoNLL with spaces", "ner", MOVED, by_word("{w} {t}"), refused="en/train.tsv:1: not word, tag; columns"),
    Layout("IOB1", "ner", MOVED, iob1, said=("3 entities converted from IOB1 to BIO",)),
    Layout("BIOES", "ner", MOVED, by_word("{w}\tS-X"), refused="the tag 'S-X' in this sentence is not BIO"),
    Layout("ours", "slots", MOVED, by_line(SLOTS)),
    Layout("MultiATIS++", "slots", "data/train_dev_test/{split}_{LANG}.tsv", ATIS),
    Layout("xSID", "slots", "xSID-0.7/{lang}.{split}.conll", by_word("{n}\t{w}\t{label}\t{t}"), "valid",
           more=(("xSID-0.7/de.projectedTrain.conll", ""),), said=("in the name: xSID-0.7/de.projectedTrain.conll",)),
    Layout("an unknown header", "slots", MOVED, by_line(SLOTS, "text\tslots\tclass"),
           refused="en/train.tsv:1: the tag 'slots' in this sentence is not BIO"),
    Layout("no intent", "slots", MOVED, by_line("{words}\t{tags}\t"), refused="en/train.tsv:1: no intent"),
    Layout("ours", "parse", MOVED, by_line("{a}\t{label}")),
    Layout("mTOP", "parse", "mtop/{lang}/{split}.txt", MTOP, "eval", more=(("mtop/README.txt", "text"),),
           said=("no split or unknown format in the name: mtop/README.txt",)),
    Layout("another form of tree", "parse", MOVED, by_line("{a}\t{n}"), refused="en/train.tsv:1: the brackets"),
    Layout("ours", "summ", "{lang}/{split}.jsonl", jsonl("source", "target")),
    Layout("XSum, hub", "summ", "data/{split}-00000-of-00001.parquet", SUMMARY, "validation", sets=ENGLISH,
           said=("test-00000-of-00001.parquet: no language in its name; taken as en",)),
    Layout("XL-Sum", "summ", "{lang}/{lang}_{split}.jsonl", jsonl("text", "summary"), "val", english="english"),
    Layout("XL-Sum in one folder", "summ", "{lang}_{split}.jsonl", jsonl("text", "summary"), "val", english="english"),
]  # fmt: skip
for packed in ("gz", "xz", "bz2"):
    LAYOUTS += [replace(x, name=f"ours, .{packed}", path=f"{x.path}.{packed}") for x in LAYOUTS if x.name == "ours"]


def toy_sets(folder: Path) -> Path:
    """A small data set of each task in our formats, whose labels follow from the words."""
    rng = random.Random(0)
    words = {
        "NOUN": ["river", "winter", "house", "garden", "bread"],
        "VERB": ["sleeps", "grows", "falls"],
        "DET": ["the", "a"],
    }
    writers = {layout.task: layout for layout in LAYOUTS if layout.name == "ours"}
    for task, layout in writers.items():
        for language, split, n in (("en", "train", 60), ("en", "dev", 12), ("en", "test", 12), ("de", "test", 9)):
            items = []
            for _ in range(n):
                tags = ["DET", "NOUN", "VERB"] * rng.randint(1, 2)
                text = [rng.choice(words[tag]) for tag in tags]
                slots = ["B-thing" if tag == "NOUN" else "O" for tag in tags]
                items.append({
                    "nli": Item([" ".join(text), text[1]], label=task_data.NLI[len(text) // 3]),
                    "pos": Item(text, tags),
                    "ner": Item(text, slots),
                    "slots": Item(text, slots, text[2]),
                    "parse": Item([" ".join(text)], label=f"[IN:{text[2].upper()} [SL:THING {text[1]} ] ]"),
                    "summ": Item([" ".join(text)], label=" ".join(text[:2])),
                }[task])  # fmt: skip
            put(folder / task / layout.path.format(lang=language, split=split), layout.write(items, language))
    return folder


def main() -> None:
    print(f"{'task':6} {'layout':36} {'read as':52} said")
    for layout in LAYOUTS:
        said = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
            layout.make(Path(folder))
            try:
                train, _, test = task_data.read_task(layout.task, Path(folder), layout.english)
                labels = sorted({x for item in train for x in item.tags or [item.label]})
                counts = ", ".join(f"{len(items)} {language}" for language, items in test.items())
                found = f"{len(train)} to train, {counts}; {' '.join(x.split()[0] for x in labels)}"
            except InputError as error:
                found = f"refused: {str(error).replace(folder + '/', '')}"
        lines = said.getvalue().replace(folder + "/", "").splitlines()
        print(f"{layout.task:6} {layout.name:36} {found:52} {' | '.join(lines)}")


if __name__ == "__main__":
    main()
