"""How good predictions are: accuracy, F1 of entities, exact match, ROUGE; and a baseline without a model."""

import re
import statistics
import unicodedata
from collections import Counter

import numpy as np

from task_data import Item, well_formed

METRICS = {  # the first chooses epoch and learning rate
    "nli": ("accuracy",),
    "pos": ("accuracy", "F1 of XTREME"),
    "ner": ("F1", "precision", "recall"),
    "slots": ("both right", "intent accuracy", "slot F1"),
    "parse": ("exact match", "well-formed"),
    "summ": ("ROUGE-L", "ROUGE-1", "ROUGE-2"),
}
GENERATION = ("parse", "summ")


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """(type, first, end) of each stretch of tags that is an entity, as conlleval and seqeval count them.

    Broken BIO is read leniently: I-X after anything but X opens an entity. A tag without prefix is read as its first
    letter and the rest, so that XTREME's "F1" of part-of-speech tags counts stretches of one tag.
    """
    found, first, last_prefix, last_type = set(), 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, type_ = tag[0], tag[1:].split("-", 1)[-1] or "_"
        changed = type_ != last_type
        if last_prefix in "ES" or (last_prefix in "BI" and prefix in "BSO") or (last_prefix not in "O." and changed):
            found.add((last_type, first, i))
        if prefix in "BS" or (last_prefix in "ESO" and prefix in "EI") or (prefix not in "O." and changed):
            first = i
        last_prefix, last_type = prefix, type_
    return found


def precision_recall_f1(gold: list[list[str]], predicted: list[list[str]]) -> tuple[float, float, float]:
    """Precision, recall and F1 of the entities in all sentences, in percent."""
    a, b = (entities([tag for sentence in tags for tag in (*sentence, "O")]) for tags in (gold, predicted))
    precision, recall = (100 * len(a & b) / max(1, len(x)) for x in (b, a))
    return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)


def percent_equal(gold: list, predicted: list) -> float:
    """Share of the predictions that are right, in percent. Raises ValueError for lists of unequal length."""
    return 100 * sum(a == b for a, b in zip(gold, predicted, strict=True)) / len(gold)


def rouge_words(text: str) -> list[str]:
    """Lower-case runs of letters, digits and combining marks, such as Hindi and Tamil vowels.

    In scripts without spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each character is a word.
    """
    kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text.lower())
    without_spaces = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
    return re.sub(without_spaces, r" \g<0> ", "".join(kept)).split()


def rouge(gold: str, predicted: str) -> tuple[float, float, float]:
    """F1 of longest common subsequence, words and pairs of words (Lin 2004), in percent, without stemming."""
    a, b = rouge_words(gold), rouge_words(predicted)
    longest = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(longest[j] + 1 if word == other else max(row[-1], longest[j + 1]))
        longest = row
    pairs = [Counter(zip(x, x[1:])) for x in (a, b)]
    common = [longest[-1], (Counter(a) & Counter(b)).total(), (pairs[0] & pairs[1]).total()]
    sizes = [len(a) + len(b), len(a) + len(b), pairs[0].total() + pairs[1].total()]
    return tuple(200 * n / max(1, size) for n, size in zip(common, sizes))


def scores(task: str, gold: list[Item], predicted: list[Item]) -> dict[str, float]:
    """The metrics of a task, in percent."""
    tags, labels = ([[getattr(x, name) for x in items] for items in (gold, predicted)] for name in ("tags", "label"))
    precision, recall, f1 = precision_recall_f1(*tags)
    if METRICS[task] == ("accuracy",):
        found = [percent_equal(*labels)]
    elif task == "pos":
        found = [percent_equal(*([tag for sentence in x for tag in sentence] for x in tags)), f1]
    elif task == "ner":
        found = [f1, precision, recall]
    elif task == "slots":
        found = [percent_equal(*(list(zip(*x)) for x in zip(tags, labels))), percent_equal(*labels), f1]
    elif task == "parse":
        exact = percent_equal(*([tree.split() for tree in trees] for trees in labels))
        found = [exact, 100 * sum(map(well_formed, labels[1])) / len(gold)]
    else:
        found = np.mean([rouge(*x) for x in zip(*labels, strict=True)], axis=0).tolist()
    return dict(zip(METRICS[task], found, strict=True))


def majority(task: str, train: list[Item], items: list[Item]) -> list[Item]:
    """A baseline without a model: the training set's most frequent tag and label; for summ, the text's first words."""
    if task == "summ":
        n = round(statistics.mean(len(rouge_words(item.label)) for item in train))
        return [Item(item.words, label=" ".join(rouge_words(item.words[0])[:n])) for item in items]
    tags = Counter(tag for item in train for tag in item.tags).most_common(1)
    label = Counter(item.label for item in train).most_common(1)[0][0]
    return [Item(item.words, [tags[0][0]] * len(item.words) if tags else [], label) for item in items]


def mean_sd(values: list[float], digits: int = 2) -> str:
    """The mean over runs and, if there is more than one, their standard deviation; "-" if there is none."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
