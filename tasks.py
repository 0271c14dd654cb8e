"""The paper's evaluation: fine-tune on one language, score every language. Used by eval.py, which has the commands.

Encoder tasks (nli, pos, ner, slots) put linear heads on the encoder of any checkpoint; generation tasks (parse, summ)
train the whole seq2seq model. The best epoch is chosen on the training language's own dev set: no other language is
looked at before it is scored (zero-shot, Soltan et al. 2023). Data: DIR/<lang>/{train,dev,test}.*, see `READERS` below.
"""

import gzip
import json
import lzma
import math
import re
import statistics
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from tqdm import tqdm

import trainer
from cli import InputError, out_of_memory
from generate import generate
from model import Fusion
from objectives import SpecialIds
from text import refuse_packed_twice

METRICS = {  # the first chooses epoch and learning rate
    "nli": ("accuracy",),
    "pos": ("accuracy", "F1 of XTREME"),
    "ner": ("F1", "precision", "recall"),
    "slots": ("both right", "intent accuracy", "slot F1"),
    "parse": ("exact match", "well-formed"),
    "summ": ("ROUGE-L", "ROUGE-1", "ROUGE-2"),
}
GENERATION = ("parse", "summ")
NLI = ("entailment", "neutral", "contradiction")
MIN_UPDATES = 500  # of a fine-tuning on a small set
SCORED_TOKENS = 8192  # at a time
DEV_TEXTS = 200  # generated to choose an epoch


@dataclass(frozen=True)
class Item:
    """One line or sentence of a task."""

    words: list[str]  # of a tagged sentence; or premise and hypothesis; or the source text alone
    tags: list[str] = field(default_factory=list)  # one a word
    label: str = ""  # intent or class; of a generation task the target


# Reading -----------------------------------------------------------------------------------------------------------


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, also .gz or .xz. Raises InputError with file and line."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n")
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}:{number + 1}: cannot be read ({error}); repair the file") from None


def fields(path: Path, number: int, line: str, n: int) -> list[str]:
    """The tab-separated columns of a line, at least n. Raises InputError."""
    columns = line.split("\t")
    if len(columns) < n or not all(columns[:n]):
        raise InputError(f"{path}:{number}: {n} columns parted by tabs are needed, none of them empty")
    return columns


def read_tagged(path: Path, word: int, tag: int) -> Iterator[Item]:
    """Sentences of a word a line, parted by blank lines: CoNLL-U or BIO, by the columns of word and tag."""
    words, tags = [], []
    for number, line in (*lines(path), (0, "")):
        if not line.strip():
            if words:
                yield Item(words, tags)
            words, tags = [], []
        elif not (word and line.startswith("#")):
            columns = fields(path, number, line, max(word, tag) + 1)
            if not word or columns[0].isdigit():  # not a CoNLL-U range of words or an empty node
                words.append(columns[word])
                tags.append(columns[tag])


def read_slots(path: Path) -> Iterator[Item]:
    """A line each: utterance, BIO tags, intent."""
    for number, line in lines(path):
        utterance, tags, intent = fields(path, number, line, 3)[:3]
        words, labels = utterance.split(" "), tags.split(" ")
        if len(words) != len(labels) or not all(words + labels):
            counts = f"{len(words)} words and {len(labels)} tags"
            raise InputError(f"{path}:{number}: {counts}, parted by single spaces; there must be a tag for each word")
        yield Item(words, labels, intent)


def read_nli(path: Path) -> Iterator[Item]:
    """A line each: premise, hypothesis, class."""
    for number, line in lines(path):
        premise, hypothesis, label = fields(path, number, line, 3)[:3]
        if label not in NLI:
            raise InputError(f"{path}:{number}: {label!r} is none of {', '.join(NLI)}; mend the line")
        yield Item([premise, hypothesis], label=label)


def read_parse(path: Path) -> Iterator[Item]:
    """A line each: utterance and its tree, [IN:INTENT words [SL:SLOT words ] ]."""
    for number, line in lines(path):
        source, target = fields(path, number, line, 2)[:2]
        if not well_formed(target):
            raise InputError(f"{path}:{number}: the brackets of the tree do not match; mend the line")
        yield Item([source], label=target)


def read_summ(path: Path) -> Iterator[Item]:
    """A JSON object a line with "source" and "target"."""
    for number, line in lines(path):
        try:
            row = json.loads(line)
            item = Item([row["source"] + ""], label=row["target"] + "")
            (item.words[0] + item.label).encode()  # JSON can spell half a surrogate pair
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f'{path}:{number}: not an object with texts "source" and "target"') from None
        yield item


READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    "nli": read_nli,
    "pos": lambda path: read_tagged(path, word=1, tag=3),
    "ner": lambda path: read_tagged(path, word=0, tag=1),
    "slots": read_slots,
    "parse": read_parse,
    "summ": read_summ,
}


def read_split(task: str, folder: Path, language: str, split: str) -> list[Item]:
    """All items of DIR/<language>/<split>.*. Raises InputError where there is no such file, or nothing in it."""
    files = sorted(path for path in (folder / language).glob(f"{split}.*") if not path.name.endswith("~"))
    refuse_packed_twice(files)
    if not files:
        raise InputError(f"{folder / language}: no {split} file in it; add one or leave the language out")
    items = [item for path in files for item in READERS[task](path)]
    if not items:
        raise InputError(f"{files[0]}: nothing in it; leave the language out")
    return items


# Scores ------------------------------------------------------------------------------------------------------------


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """(type, first, end) of each stretch of tags that is an entity, as conlleval and seqeval count them.

    Broken BIO is read leniently: I-X behind anything but X opens an entity. A tag without prefix is read as its first
    letter and the rest, so that XTREME's "F1" of part-of-speech tags counts stretches of one tag.
    """
    found, first, before, type_before = set(), 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, type_ = tag[0], tag[1:].split("-", 1)[-1] or "_"
        changed = type_ != type_before
        if before in "ES" or (before in "BI" and prefix in "BSO") or (before not in "O." and changed):
            found.add((type_before, first, i))
        if prefix in "BS" or (before in "ESO" and prefix in "EI") or (prefix not in "O." and changed):
            first = i
        before, type_before = prefix, type_
    return found


def precision_recall_f1(gold: list[list[str]], predicted: list[list[str]]) -> tuple[float, float, float]:
    """Of entities over all sentences, in percent."""
    a, b = (entities([tag for sentence in tags for tag in (*sentence, "O")]) for tags in (gold, predicted))
    precision, recall = (100 * len(a & b) / max(1, len(x)) for x in (b, a))
    return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)


def percent_equal(gold: list, predicted: list) -> float:
    """Share of the predictions that are right, in percent. Raises ValueError for lists of unequal length."""
    return 100 * sum(a == b for a, b in zip(gold, predicted, strict=True)) / len(gold)


def well_formed(tree: str) -> bool:
    """Whether a linearised tree is one tree: brackets match and nothing stands outside."""
    depth, parts = 0, tree.split()
    for i, part in enumerate(parts):
        depth += (part.startswith("[") and len(part) > 1) - (part == "]")
        if depth <= 0 and i < len(parts) - 1:
            return False
    return depth == 0 and len(parts) > 1


WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"


def rouge_words(text: str) -> list[str]:
    """Lower-case runs of letters and digits (with their combining marks: Hindi and Tamil vowels are such).

    In scripts without spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each character is a word.
    """
    kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text.lower())
    return re.sub(f"[{WITHOUT_SPACES}]", r" \g<0> ", "".join(kept)).split()


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
    scores = [200 * n / max(1, size) for n, size in zip(common, sizes)]
    return scores[0], scores[1], scores[2]


def scores(task: str, gold: list[Item], predicted: list[Item]) -> dict[str, float]:
    """The metrics of a task, in percent."""
    tags, labels = ([getattr(x, name) for x in gold] for name in ("tags", "label"))
    our_tags, our_labels = ([getattr(x, name) for x in predicted] for name in ("tags", "label"))
    if METRICS[task] == ("accuracy",):
        found: tuple = (percent_equal(labels, our_labels),)
    elif task == "pos":
        accuracy = percent_equal(*([tag for sentence in x for tag in sentence] for x in (tags, our_tags)))
        found = (accuracy, precision_recall_f1(tags, our_tags)[2])
    elif task == "ner":
        precision, recall, f1 = precision_recall_f1(tags, our_tags)
        found = (f1, precision, recall)
    elif task == "slots":
        both = percent_equal(list(zip(tags, labels)), list(zip(our_tags, our_labels)))
        found = (both, percent_equal(labels, our_labels), precision_recall_f1(tags, our_tags)[2])
    elif task == "parse":
        trees = [[tree.split() for tree in x] for x in (labels, our_labels)]
        found = (percent_equal(*trees), 100 * sum(map(well_formed, our_labels)) / len(gold))
    else:
        found = tuple(np.mean([rouge(a, b) for a, b in zip(labels, our_labels, strict=True)], axis=0).tolist())
    return dict(zip(METRICS[task], found, strict=True))


def majority(task: str, train: list[Item], items: list[Item]) -> list[Item]:
    """What needs no model: the most frequent tag and label of the training set; of summ the text's first words."""
    if task == "summ":
        n = round(statistics.mean(len(item.label.split()) for item in train))
        return [Item(item.words, label=" ".join(item.words[0].split()[:n])) for item in items]
    tags = Counter(tag for item in train for tag in item.tags).most_common(1)
    label = Counter(item.label for item in train).most_common(1)[0][0]
    return [Item(item.words, [tags[0][0]] * len(item.words) if tags else [], label) for item in items]


# Encoder tasks -----------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Linear heads on an encoder: a tag for each word, at its first piece; a label from the mean over all tokens.

    With a frozen encoder, and of a seq2seq model that has one, the heads read an attention fusion of all its layers
    (Cao, Satya Prakash, Hamza 2022).
    """

    def __init__(self, body: nn.Module, n_tags: int, n_labels: int, freeze: bool):
        super().__init__()
        self.embed, self.encoder = body.embed, body.encoder
        self.fusion = getattr(body, "fusion", None) or (Fusion(body.cfg) if freeze else None)
        self.tag, self.label = (nn.Linear(body.cfg.d_model, n) if n else None for n in (n_tags, n_labels))

    def forward(self, src: Tensor, src_mask: Tensor, at: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits of tags [N, tags] at positions `at` [N] of the flattened batch [B, S], and of labels [B, labels]."""
        hidden = self.encoder(self.embed(src), src_mask, self.fusion)  # [B, S, D]
        mean = (hidden * src_mask[..., None]).sum(1) / src_mask.sum(1, keepdim=True)  # [B, D]
        return self.tag and self.tag(hidden.flatten(0, 1)[at]), self.label and self.label(mean)


def windows(n: int, size: int) -> list[tuple[int, int, int, int]]:
    """Overlapping windows of at most `size` of n tokens: (start, stop, and the tokens first to end it answers for).

    A token belongs to the window in whose middle it lies, so every token has about size / 4 of context on either side.
    A sentence that fits has one window.
    """
    starts = [*range(0, n - size, max(1, size // 2)), max(0, n - size)]
    stops = [min(n, start + size) for start in starts]
    edges = [0, *((start + stop) // 2 for start, stop in zip(starts[1:], stops)), n]
    return list(zip(starts, stops, edges, edges[1:]))


@dataclass(frozen=True)
class Row:
    """One window of an item as the model reads it."""

    item: int
    src: list[int]
    at: list[int]  # positions in src of words' first pieces
    words: list[int]  # which words they are
    tags: list[int]  # their tags, -1 for one that training never saw
    label: int


def rows_of(
    items: list[Item],
    tokenizer: SentencePieceProcessor,
    ids: SpecialIds,
    max_len: int,
    tags: list[str],
    labels: list[str],
) -> list[Row]:
    """Items as rows of tokens closed by </s>, long sentences in several.

    A word that the tokenizer maps to nothing becomes <unk>. Of a pair of texts the longer one is cut until it fits.
    """
    tag_ids, label_ids = ({x: i for i, x in enumerate(names)} for names in (tags, labels))
    rows = []
    for k, item in enumerate(items):
        label = label_ids.get(item.label, -1)
        pieces = [p or [ids.unk] for p in tokenizer.encode(item.words)]
        if not item.tags:
            while sum(map(len, pieces)) > max_len - len(pieces):
                max(pieces, key=len).pop()
            rows.append(Row(k, [token for p in pieces for token in (*p, ids.eos)], [], [], [], label))
            continue
        tokens = [token for p in pieces for token in p]
        first = np.cumsum([0, *map(len, pieces[:-1])])
        for start, stop, own, end in windows(len(tokens), max_len - 1):
            words = [w for w, at in enumerate(first.tolist()) if own <= at < end]
            at = [int(first[w]) - start for w in words]
            word_tags = [tag_ids.get(item.tags[w], -1) for w in words]
            rows.append(Row(k, [*tokens[start:stop], ids.eos], at, words, word_tags, label))
    seen = Counter((row.item, w) for row in rows for w in row.words)
    if len(seen) != sum(len(item.tags) for item in items) or set(seen.values()) - {1}:
        raise RuntimeError("a word is not in exactly one window")
    return rows


def run_heads(model: Heads, rows: list[Row], pad: int) -> tuple[Tensor | None, Tensor | None]:
    """Logits of tags [N, tags] and of labels [B, labels] for a batch of rows, padded to the longest of them."""
    length = max(len(row.src) for row in rows)
    src = torch.full((len(rows), length), pad)  # [B, S]
    for b, row in enumerate(rows):
        src[b, : len(row.src)] = torch.tensor(row.src)
    mask = torch.arange(length) < torch.tensor([len(row.src) for row in rows])[:, None]  # [B, S]
    at = torch.tensor([b * length + a for b, row in enumerate(rows) for a in row.at], dtype=torch.long)
    to = trainer.device()
    return model(src.to(to), mask.to(to), at.to(to))


def heads_loss(model: Heads, rows: list[Row], pad: int) -> Tensor:
    """Mean cross-entropy over the words, plus that over the sentences."""
    tags, labels = run_heads(model, rows, pad)
    gold = [
        torch.tensor(x, device=trainer.device()) for x in ([t for r in rows for t in r.tags], [r.label for r in rows])
    ]
    parts = [F.cross_entropy(x.float(), y) for x, y in zip((tags, labels), gold) if x is not None and len(y)]
    return sum(parts, torch.zeros((), device=trainer.device()))


@torch.no_grad()
def predict_heads(
    model: Heads, items: list[Item], rows: list[Row], tags: list[str], labels: list[str], pad: int, bar: str
) -> list[Item]:
    """The items with the model's tags and labels; long rows apart from short ones, in fp32."""
    model.eval()
    our_tags = [[""] * len(item.tags) for item in items]
    our_labels = [""] * len(items)
    order = sorted(rows, key=lambda row: len(row.src), reverse=True)
    with tqdm(total=len(rows), desc=bar, leave=False, disable=None) as progress:
        while order:
            n = max(1, SCORED_TOKENS // len(order[0].src))
            batch, order = order[:n], order[n:]
            tag_logits, label_logits = run_heads(model, batch, pad)
            if tag_logits is not None:
                best = iter(tag_logits.argmax(-1).tolist())
                for row in batch:
                    for w in row.words:
                        our_tags[row.item][w] = tags[next(best)]
            if label_logits is not None:
                for row, i in zip(batch, label_logits.argmax(-1).tolist()):
                    if 0 in row.words or not items[row.item].tags:  # the first window speaks for the sentence
                        our_labels[row.item] = labels[i]
            progress.update(len(batch))
    return [Item(item.words, t, label) for item, t, label in zip(items, our_tags, our_labels)]


# Generation tasks --------------------------------------------------------------------------------------------------


def example_of(item: Item, tokenizer: SentencePieceProcessor, ids: SpecialIds, max_len: int) -> trainer.Example:
    """Source and target as the seq2seq model reads them, both closed by </s> and cut to its positions."""
    src, target = ([*tokenizer.encode(text)[: max_len - 1], ids.eos] for text in (item.words[0], item.label))
    return {"src": np.array(src), "tgt_in": np.array([ids.bos, *target[:-1]]), "tgt_out": np.array(target)}


@torch.no_grad()
def predict_texts(
    model: nn.Module,
    items: list[Item],
    tokenizer: SentencePieceProcessor,
    ids: SpecialIds,
    beams: int,
    max_new: int,
    bar: str,
) -> list[Item]:
    """The items with what the model generates. Batches are halved when memory runs out."""
    model.eval()
    examples = [example_of(item, tokenizer, ids, model.cfg.max_len) for item in items]
    order = sorted(range(len(items)), key=lambda k: len(examples[k]["src"]), reverse=True)
    texts, n = [""] * len(items), 64
    with tqdm(total=len(items), desc=bar, leave=False, disable=None) as progress:
        while order:
            batch = trainer.collate([examples[k] for k in order[:n]], ids.pad)
            try:
                out = generate(
                    model,
                    batch["src"],
                    batch.get("src_mask"),
                    bos=ids.bos,
                    eos=ids.eos,
                    pad=ids.pad,
                    max_new=max_new,
                    beams=beams,
                ).tolist()
            except (MemoryError, RuntimeError) as error:
                if n == 1 or not out_of_memory(error):
                    raise
                n //= 2
                continue
            for k, tokens in zip(order, out):
                texts[k] = tokenizer.decode([t for t in tokens if t >= ids.ordinary])
            progress.update(len(out))
            order = order[n:]
    return [Item(item.words, label=text) for item, text in zip(items, texts)]


# Fine-tuning -------------------------------------------------------------------------------------------------------


def batches(lengths: list[int], size: int, rng: np.random.Generator) -> list[list[int]]:
    """All indices in batches of rows of like length, in random order."""
    order = rng.permutation(len(lengths)).tolist()
    near = 50 * size
    order = [i for at in range(0, len(order), near) for i in sorted(order[at : at + near], key=lambda i: lengths[i])]
    groups = [order[at : at + size] for at in range(0, len(order), size)]
    return [groups[i] for i in rng.permutation(len(groups))]


def finetune(
    model: nn.Module,
    loss: Callable[[list[int]], Tensor],
    lengths: list[int],
    dev_score: Callable[[], float],
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    dtype: str,
    freeze: bool,
    bar: str,
) -> float:
    """Trains by AdamW (10 % warm-up, linear decay) and leaves the model as it was after the best epoch; its dev score.

    loss: mean loss over the training rows with these indices, whose lengths in tokens are given.
    """
    rng, updates = np.random.default_rng(seed), -(-len(lengths) // batch_size)
    epochs = epochs or max(3, -(-MIN_UPDATES // updates))
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98), weight_decay=0.01, fused=True)
    rise = max(1, epochs * updates // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / rise, (epochs * updates - i) / max(1, epochs * updates - rise))
    )
    best, kept = -math.inf, {}
    with tqdm(total=epochs * updates, desc=bar, leave=False, disable=None) as progress:
        for _ in range(epochs):
            model.train()
            if freeze:
                trainer.freeze_encoder(model, True)
            for batch in batches(lengths, batch_size, rng):
                with trainer.autocast(dtype):
                    value = loss(batch)
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                progress.update()
            progress.set_postfix_str(f"loss {value.item():.3f}, dev {best:.2f}")
            if (score := dev_score()) > best:
                best, kept = score, deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return best


@dataclass(frozen=True)
class Job:
    """What is fine-tuned and how."""

    task: str
    train: list[Item]
    dev: list[Item]
    tokenizer: SentencePieceProcessor
    ids: SpecialIds
    epochs: int
    batch_size: int
    freeze: bool
    beams: int
    dtype: str


Predictor = Callable[[list[Item], str], list[Item]]


def finetuned(job: Job, body: nn.Module, lr: float, seed: int) -> tuple[float, Predictor]:
    """The dev score of one fine-tuning, and what predicts with its model: (items, name of the bar) -> items."""
    body = deepcopy(body)
    torch.manual_seed(seed)
    max_len, pad, bar = body.cfg.max_len, job.ids.pad, f"{job.task}, seed {seed}, lr {lr:g}"
    if job.task in GENERATION:
        model = body
        examples = [example_of(item, job.tokenizer, job.ids, max_len) for item in job.train]
        lengths = [len(example["src"]) + len(example["tgt_out"]) for example in examples]
        max_new = max(len(example["tgt_out"]) for example in examples) + 10

        def loss(batch: list[int]) -> Tensor:
            chosen = [examples[i] for i in batch]
            tensors = trainer.collate(chosen, pad)
            return model(**tensors) / trainer.n_targets(chosen)

        def predict(items: list[Item], name: str, beams: int = job.beams) -> list[Item]:
            return predict_texts(model, items, job.tokenizer, job.ids, beams, max_new, name)

        def dev_score() -> float:
            dev = job.dev[:DEV_TEXTS]
            return scores(job.task, dev, predict(dev, "dev", beams=1))[METRICS[job.task][0]]

    else:
        tags = sorted({tag for item in job.train for tag in item.tags})
        labels = sorted({item.label for item in job.train} - {""})
        model = Heads(body, len(tags), len(labels), job.freeze)
        rows = rows_of(job.train, job.tokenizer, job.ids, max_len, tags, labels)
        lengths = [len(row.src) for row in rows]

        def loss(batch: list[int]) -> Tensor:
            return heads_loss(model, [rows[i] for i in batch], pad)

        def predict(items: list[Item], name: str) -> list[Item]:
            rows = rows_of(items, job.tokenizer, job.ids, max_len, tags, labels)
            return predict_heads(model, items, rows, tags, labels, pad, name)

        def dev_score() -> float:
            return scores(job.task, job.dev, predict(job.dev, "dev"))[METRICS[job.task][0]]

    model.to(trainer.device()).requires_grad_(True)
    score = finetune(model, loss, lengths, dev_score, job.epochs, job.batch_size, lr, seed, job.dtype, job.freeze, bar)
    return score, predict


# The command -------------------------------------------------------------------------------------------------------


def languages_of(folder: Path, train_language: str, chosen: list[str] | None) -> list[str]:
    """Languages to score: those chosen, or all that have a test file. Raises InputError for one that has none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --data names one that holds <lang>/train.*, dev.*, test.*")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    tested = [language for language in found if any((folder / language).glob("test.*"))]
    for language in chosen or []:
        if language not in tested:
            raise InputError(f"{folder / language}: no test file; choose --langs among {' '.join(tested)}")
    trained = [language for language in found if any((folder / language).glob("train.*"))]
    if train_language not in trained:
        raise InputError(
            f"{folder}: no {train_language} in it to train on; choose --train-lang among {' '.join(trained)}"
        )
    if chosen:
        return chosen
    if skipped := [language for language in found if language not in tested]:
        print(f"no test file, not scored: {' '.join(skipped)}")
    return tested


def evaluate(job: Job, body: nn.Module, lrs: list[float], n_seeds: int, test: dict[str, list[Item]]) -> Iterator[dict]:
    """Fine-tunes with each seed and scores every language: a result for each. Seed 0's dev score picks the rate."""
    known = {x for item in job.train for x in (*item.tags, item.label)}
    base_dev = scores(job.task, job.dev, majority(job.task, job.train, job.dev))[METRICS[job.task][0]]
    runs: dict = {}
    for lr in lrs:
        runs[lr] = finetuned(job, body, lr, 0)
        if len(lrs) > 1:
            print(f"lr {lr:g}: dev {METRICS[job.task][0]} {runs[lr][0]:.2f}")
    lr = max(runs, key=lambda x: runs[x][0])
    for seed in range(n_seeds):
        dev, predict = finetuned(job, body, lr, seed) if seed else runs[lr]
        if dev <= base_dev and job.task not in GENERATION:
            print(f"warning: seed {seed} collapsed to chance: dev {dev:.2f}, majority {base_dev:.2f}; try another --lr")
        for language, items in test.items():
            unseen = sum(x not in known for item in items for x in (*item.tags, item.label))
            yield {
                "language": language,
                "seed": seed,
                "lr": lr,
                "dev": dev,
                "scores": scores(job.task, items, predict(items, language)),
                "majority": scores(job.task, items, majority(job.task, job.train, items)),
                "items": len(items),
                "labels unseen in training": 0 if job.task in GENERATION else unseen,
            }


def mean_sd(values: list[float], digits: int = 2) -> str:
    """The mean of some runs and, of more than one, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def print_scores(task: str, results: list[dict], train_language: str) -> None:
    """The table: a line a language, mean and standard deviation over the seeds, the baseline in the last column."""
    names, languages = METRICS[task], list(dict.fromkeys(result["language"] for result in results))
    print("language  items  " + "  ".join(f"{name:>15}" for name in names) + f"  majority: {names[0]}")
    others = [language for language in languages if language != train_language]
    for title, group in [(x, [x]) for x in languages] + ([(f"all but {train_language}", others)] if others else []):
        mine = [result for result in results if result["language"] in group]
        seeds = sorted({result["seed"] for result in mine})
        columns = []
        for name in names:
            over = [statistics.mean(r["scores"][name] for r in mine if r["seed"] == seed) for seed in seeds]
            columns.append(f"{mean_sd(over):>15}")
        n = sum(r["items"] for r in mine if r["seed"] == seeds[0])
        base = statistics.mean(r["majority"][names[0]] for r in mine)
        print(f"{title:10}{n:5}  " + "  ".join(columns) + f"  {base:.2f}")
    for language in languages:
        unseen = next(r["labels unseen in training"] for r in results if r["language"] == language)
        if unseen:
            print(f"{language}: {unseen} labels that training never saw, scored as wrong")
