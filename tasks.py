"""The paper's evaluation: fine-tune on one language, score every language. eval.py has the command.

Encoder tasks put linear heads on the encoder of any checkpoint; parse and summ train the whole seq2seq model. The best
epoch is chosen on the training language's dev set; no other language is looked at before it is scored (zero-shot).
"""

import statistics
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import trainer
from cli import InputError
from generate import generate
from metrics import GENERATION, METRICS, majority, mean_sd, scores
from model import Fusion
from task_data import Item
from tokenizer import SpecialIds

MIN_UPDATES = 500  # when fine-tuning on a small set
SCORED_TOKENS = 8192  # at a time
GENERATED_TOKENS = 1 << 17  # positions of a batch
SOURCES = {"cpu": 64, "cuda": 512}  # of a batch at most: a GPU takes as long for a few
DEV_TEXTS = 200  # generated to choose an epoch


@dataclass(frozen=True)
class Job:
    """What to fine-tune, and how."""

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
    cut: bool = False  # whether to cut targets that are too long for the model


class Heads(nn.Module):
    """Linear heads on an encoder: a tag for each word, at its first piece; a label from the mean over all tokens.

    If the encoder is frozen, or its model has attention fusion, they read a fusion of its layers (Cao et al. 2022).
    """

    def __init__(self, body: nn.Module, n_tags: int, n_labels: int, freeze: bool):
        super().__init__()
        self.embed, self.encoder = body.embed, body.encoder
        self.fusion = getattr(body, "fusion", None) or (Fusion(body.cfg) if freeze else None)
        self.tag, self.label = (nn.Linear(body.cfg.d_model, n) if n else None for n in (n_tags, n_labels))

    def forward(self, src: Tensor, src_mask: Tensor, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits of tags [W, tags] at W positions of the flattened batch [B * S], and of labels [B, labels]."""
        hidden = self.encoder(self.embed(src), src_mask, self.fusion)  # [B, S, D]
        mean = (hidden * src_mask[..., None]).sum(1) / src_mask.sum(1, keepdim=True)  # [B, D]
        return self.tag and self.tag(hidden.flatten(0, 1)[positions]), self.label and self.label(mean)


def windows(n: int, size: int) -> list[tuple[int, int, int, int]]:
    """Overlapping windows of at most `size` of n tokens: (start, stop, first, end); first to end are its own tokens.

    A token belongs to the window in whose middle it lies, so every token has about size / 4 of context on either side.
    """
    starts = [*range(0, n - size, max(1, size // 2)), max(0, n - size)]
    stops = [min(n, start + size) for start in starts]
    edges = [0, *((start + stop) // 2 for start, stop in zip(starts[1:], stops)), n]
    return list(zip(starts, stops, edges, edges[1:]))


@dataclass(frozen=True)
class Row:
    """One window of an item as the model reads it."""

    item: int
    src: list[int]  # tokens, closed by </s>
    words: list[int]  # those tagged in this window
    positions: list[int]  # of their first pieces in src


class Tagger:
    """Heads for nli, pos, ner or slots, and the rows that train them."""

    def __init__(self, job: Job, body: nn.Module):
        self.job, self.max_len = job, body.cfg.max_len
        self.tags = sorted({tag for item in job.train for tag in item.tags})
        self.labels = sorted({item.label for item in job.train} - {""})
        self.tag_ids, self.label_ids = ({x: i for i, x in enumerate(names)} for names in (self.tags, self.labels))
        self.model = Heads(body, len(self.tags), len(self.labels), job.freeze)
        self.rows = self.encode(job.train)
        self.lengths = [len(row.src) for row in self.rows]

    def encode(self, items: list[Item]) -> list[Row]:
        """Items as rows, long sentences as several. A pair's longer text is cut; a word without pieces is <unk>."""
        ids, rows = self.job.ids, []
        for k, item in enumerate(items):
            pieces = [p or [ids.unk] for p in self.job.tokenizer.encode(item.words)]
            if not item.tags:
                while sum(map(len, pieces)) > self.max_len - len(pieces):
                    max(pieces, key=len).pop()
                rows.append(Row(k, [token for p in pieces for token in (*p, ids.eos)], [], []))
                continue
            tokens, starts = [token for p in pieces for token in p], [0, *accumulate(map(len, pieces[:-1]))]
            for start, stop, first, end in windows(len(tokens), self.max_len - 1):
                words = [w for w, position in enumerate(starts) if first <= position < end]
                rows.append(Row(k, [*tokens[start:stop], ids.eos], words, [starts[w] - start for w in words]))
        return rows

    def logits(self, rows: list[Row]) -> tuple[Tensor | None, Tensor | None]:
        """Logits of the tags of W words [W, tags] and of labels [B, labels]; pads rows to the longest."""
        batch = trainer.collate([{"src": np.array(row.src)} for row in rows], self.job.ids.pad)
        src = batch["src"]  # [B, S]
        mask = batch.get("src_mask", torch.ones_like(src, dtype=torch.bool))
        positions = [b * src.shape[1] + position for b, row in enumerate(rows) for position in row.positions]
        return self.model(src, mask, torch.tensor(positions, dtype=torch.long, device=src.device))

    def loss(self, batch: list[int]) -> Tensor:
        """Mean cross-entropy over the words of these rows, plus that over the rows."""
        rows = [self.rows[i] for i in batch]
        tags = [self.tag_ids[self.job.train[row.item].tags[w]] for row in rows for w in row.words]
        labels = [self.label_ids[self.job.train[row.item].label] for row in rows if self.labels]
        heads = zip(self.logits(rows), (tags, labels))
        parts = [(x, torch.tensor(y, device=x.device)) for x, y in heads if x is not None]
        return sum(nn.functional.cross_entropy(x.float(), y) if len(y) else x.sum() for x, y in parts)  # no words: 0

    @torch.no_grad()
    def predict(self, items: list[Item], bar: str) -> list[Item]:
        """The items with the model's tags and labels, in fp32; rows of similar length share a batch."""
        self.model.eval()
        tags, labels = [[""] * len(item.tags) for item in items], [""] * len(items)
        order = sorted(self.encode(items), key=lambda row: len(row.src), reverse=True)
        with tqdm(total=len(order), desc=bar, leave=False, disable=None) as progress:
            while order:
                n = max(1, SCORED_TOKENS // len(order[0].src))
                batch, order = order[:n], order[n:]
                best = [[] if x is None else x.argmax(-1).tolist() for x in self.logits(batch)]
                for (k, w), tag in zip([(row.item, w) for row in batch for w in row.words], best[0]):
                    tags[k][w] = self.tags[tag]
                for row, label in zip(batch, best[1]):
                    if 0 in row.words or not items[row.item].tags:  # the first window decides for the sentence
                        labels[row.item] = self.labels[label]
                progress.update(len(batch))
        return [Item(*x) for x in zip([item.words for item in items], tags, labels)]


class Writer:
    """A seq2seq model for parse or summ, and the examples that train it."""

    def __init__(self, job: Job, model: nn.Module):
        self.job, self.model = job, model
        self.examples = [self.encode(item) for item in job.train]
        self.lengths = [len(x["src"]) + len(x["tgt_out"]) for x in self.examples]
        max_new = max(len(x["tgt_out"]) for x in self.examples) + 10
        self.generate = partial(generate, model, max_new=max_new)

    def encode(self, item: Item) -> trainer.Example:
        """Source and target as the model reads them, both closed by </s> and cut to its positions."""
        n, ids = self.model.cfg.max_len - 1, self.job.ids
        src, tgt = ([*self.job.tokenizer.encode(text)[:n], ids.eos] for text in (item.words[0], item.label))
        return {"src": np.array(src), "tgt_in": np.array([ids.bos, *tgt[:-1]]), "tgt_out": np.array(tgt)}

    def loss(self, batch: list[int]) -> Tensor:
        """Mean cross-entropy over the target tokens of these examples."""
        chosen = [self.examples[i] for i in batch]
        return self.model(**trainer.collate(chosen, self.job.ids.pad)) / trainer.n_targets(chosen)

    @torch.no_grad()
    def predict(self, items: list[Item], bar: str, beams: int = 0) -> list[Item]:
        """The items with what the model writes (beams: by default job.beams); sources of like length share a batch."""
        self.model.eval()
        beams, ids = beams or self.job.beams, self.job.ids
        sources = [{"src": self.encode(item)["src"]} for item in items]
        order = sorted(range(len(items)), key=lambda k: len(sources[k]["src"]), reverse=True)
        most = min(SOURCES[trainer.device().type], GENERATED_TOKENS // (beams * self.model.cfg.max_len))
        texts, n = [""] * len(items), max(1, most)
        with tqdm(total=len(items), desc=bar, leave=False, disable=None) as progress:
            for chosen in (order[i : i + n] for i in range(0, len(order), n)):
                out = self.generate(**trainer.collate([sources[k] for k in chosen], ids.pad), beams=beams).tolist()
                for k, tokens in zip(chosen, out):
                    texts[k] = self.job.tokenizer.decode([t for t in tokens if t >= ids.ordinary])
                progress.update(len(chosen))
        return [Item(item.words, label=text) for item, text in zip(items, texts)]


def batches(lengths: list[int], size: int, rng: np.random.Generator) -> list[list[int]]:
    """All indices in batches of rows of similar length, in random order."""
    order, near = rng.permutation(len(lengths)).tolist(), 50 * size
    order = [i for k in range(0, len(order), near) for i in sorted(order[k : k + near], key=lambda i: lengths[i])]
    groups = [order[k : k + size] for k in range(0, len(order), size)]
    return [groups[k] for k in rng.permutation(len(groups))]


def finetune(job: Job, body: nn.Module, lr: float, seed: int) -> tuple[float, Tagger | Writer]:
    """Trains a copy of the body by AdamW (10 % warm-up, linear decay). Returns the best dev score and its model."""
    torch.manual_seed(seed)
    learner = (Writer if job.task in GENERATION else Tagger)(job, deepcopy(body))
    model = learner.model.to(trainer.device()).requires_grad_(True)
    dev, greedy = (job.dev[:DEV_TEXTS], {"beams": 1}) if job.task in GENERATION else (job.dev, {})
    rng, updates = np.random.default_rng(seed), -(-len(learner.lengths) // job.batch_size)
    epochs = job.epochs or max(3, -(-MIN_UPDATES // updates))
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98), weight_decay=0.01, fused=True)
    total, rise = epochs * updates, max(1, epochs * updates // 10)
    schedule = LambdaLR(optimizer, lambda i: min((i + 1) / rise, (total - i) / max(1, total - rise)))
    best, kept = float("-inf"), {}
    with tqdm(total=total, desc=f"{job.task}, seed {seed}, lr {lr:g}", leave=False, disable=None) as progress:
        for _ in range(epochs):
            model.train()
            trainer.freeze_encoder(model, job.freeze)
            for batch in batches(learner.lengths, job.batch_size, rng):
                with trainer.autocast(job.dtype):
                    loss = learner.loss(batch)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                progress.update()
            if (score := scores(job.task, dev, learner.predict(dev, "dev", **greedy))[METRICS[job.task][0]]) > best:
                best, kept = score, deepcopy(model.state_dict())
            progress.set_postfix_str(f"loss {loss.item():.3f}, dev {best:.2f}")
    model.load_state_dict(kept)
    return best, learner


def count_cut(job: Job, max_len: int, test: dict[str, list[Item]]) -> None:
    """Prints how many texts are longer than the model reads or writes. Raises InputError for targets unless job.cut."""

    def lengths(texts: list[list[str]]) -> list[int]:
        return [sum(len(pieces) + 1 for pieces in job.tokenizer.encode(text)) for text in texts]

    most = min(max(lengths([[item.label] for item in job.train])) + 10, max_len)  # tokens that a Writer generates
    for name, items in [("train", job.train), ("dev", job.dev), *((f"{x} test", items) for x, items in test.items())]:
        sources = lengths([item.words for item in items if not item.tags])  # a tagged sentence is read in windows
        if long := sum(n > max_len for n in sources):
            what = "pairs" if job.task == "nli" else "sources"
            print(f"{name}: {long:,} of {len(items):,} {what} are longer than the model's {max_len} positions, and cut")
        targets = lengths([[item.label] for item in items if job.task in GENERATION])
        if (long := sum(n > max_len for n in targets)) and not job.cut:
            what = f"{long:,} of {len(items):,} targets are longer than the model's {max_len} positions"
            raise InputError(f"{name}: {what}; pre-train with --seq-len {max(targets)} or more, or pass --cut")
        if long := sum(n > most for n in targets):
            print(f"{name}: {long:,} of {len(items):,} targets are longer than the {most} tokens generated at most")


def evaluate(job: Job, body: nn.Module, lrs: list[float], n_seeds: int, test: dict[str, list[Item]]) -> Iterator[dict]:
    """Fine-tunes with each seed and scores every language, one result each. Seed 0's dev score picks the rate."""
    count_cut(job, body.cfg.max_len, test)
    known = {x for item in job.train for x in (*item.tags, item.label)}
    base = scores(job.task, job.dev, majority(job.task, job.train, job.dev))[METRICS[job.task][0]]
    runs: dict = {}
    for lr in lrs:
        runs[lr] = finetune(job, body, lr, 0)
        if len(lrs) > 1:
            print(f"lr {lr:g}: dev {METRICS[job.task][0]} {runs[lr][0]:.2f}")
    lr = max(runs, key=lambda x: runs[x][0])
    for seed in range(n_seeds):
        dev, learner = finetune(job, body, lr, seed) if seed else runs[lr]
        if dev <= base and job.task not in GENERATION:
            print(f"warning: seed {seed} does not beat the majority: dev {dev:.2f}, not {base:.2f}; try another --lr")
        for language, items in test.items():
            unseen = sum(x not in known for item in items for x in (*item.tags, item.label))
            yield dict(language=language, seed=seed, lr=lr, dev=dev) | {
                "scores": scores(job.task, items, learner.predict(items, language)),
                "majority": scores(job.task, items, majority(job.task, job.train, items)),
                "items": len(items),
                "labels unseen in training": 0 if job.task in GENERATION else unseen,
            }


def print_scores(task: str, results: list[dict], train_language: str) -> None:
    """Prints a line per language: mean and standard deviation over the seeds, with the baseline in the last column."""
    names, languages = METRICS[task], list(dict.fromkeys(result["language"] for result in results))
    print("language  items  " + "  ".join(f"{name:>15}" for name in names) + f"  majority: {names[0]}")
    others = [language for language in languages if language != train_language]
    for title, group in [(x, [x]) for x in languages] + ([(f"all but {train_language}", others)] if others else []):
        shown = [result for result in results if result["language"] in group]
        by_seed = [[r for r in shown if r["seed"] == seed] for seed in sorted({r["seed"] for r in shown})]
        columns = [mean_sd([statistics.mean(r["scores"][name] for r in run) for run in by_seed]) for name in names]
        n, base = sum(r["items"] for r in by_seed[0]), statistics.mean(r["majority"][names[0]] for r in shown)
        print(f"{title:10}{n:5}  " + "  ".join(f"{x:>15}" for x in columns) + f"  {base:.2f}")
    for result in results:
        if result["seed"] == 0 and (unseen := result["labels unseen in training"]):
            print(f"{result['language']}: {unseen} labels that training never saw, scored as wrong")
