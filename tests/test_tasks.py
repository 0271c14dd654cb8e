import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import report
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from rouge_score import rouge_scorer
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score

import eval as evaluation
import extract
import tasks
import train_seq2seq
from checkpoint import load_model
from data import InputError
from model import MaskedLM, ModelConfig
from tasks import Item, entities, rouge, scores, windows

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the paper's data sets are not at {SHARED}")
UPOS = [
    "ADJ",
    "ADP",
    "ADV",
    "AUX",
    "CCONJ",
    "DET",
    "INTJ",
    "NOUN",
    "NUM",
    "PART",
    "PRON",
    "PROPN",
    "PUNCT",
    "SCONJ",
    "SYM",
    "VERB",
    "X",
]
BIO = [f"{x}-{y}" for x in "BIES" for y in ("PER", "LOC", "a-b")] + ["O", "O", "I-ORG", "B", "I"]


@pytest.fixture
def folder(tmp_path):
    """A small data set of each task, in English and German."""
    rng = random.Random(0)
    words = {
        "NOUN": ["river", "winter", "house", "garden", "bread"],
        "VERB": ["sleeps", "grows", "falls"],
        "DET": ["the", "a"],
    }
    for task, name in (("pos", "conllu"), ("ner", "bio"), ("slots", "tsv"), ("nli", "tsv"), ("parse", "tsv")):
        for language, split, n in (("en", "train", 60), ("en", "dev", 12), ("en", "test", 12), ("de", "test", 9)):
            out = []
            for _ in range(n):
                tags = ["DET", "NOUN", "VERB"] * rng.randint(1, 2)
                text = [rng.choice(words[tag]) for tag in tags]
                slots = ["B-thing" if tag == "NOUN" else "O" for tag in tags]
                out.append({
                    "pos": "".join(f"{i}\t{w}\t_\t{t}\t_\n" for i, (w, t) in enumerate(zip(text, tags), 1)) + "\n",
                    "ner": "".join(f"{w}\t{s}\n" for w, s in zip(text, slots)) + "\n",
                    "slots": f"{' '.join(text)}\t{' '.join(slots)}\t{text[2]}\n",
                    "nli": f"{' '.join(text)}\t{text[1]}\t{tasks.NLI[len(text) // 3]}\n",
                    "parse": f"{' '.join(text)}\t[IN:{text[2].upper()} [SL:THING {text[1]} ] ]\n",
                }[task])  # fmt: skip
            path = tmp_path / task / language / f"{split}.{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(out))
    for language, split in (("en", "train"), ("en", "dev"), ("en", "test"), ("hi", "test")):
        path = tmp_path / "summ" / language / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"source": f"a b c {i}", "target": f"c {i}"}) + "\n" for i in range(9)))
    return tmp_path


# Metrics against the libraries that others use ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* seems not to be NE tag")
@pytest.mark.parametrize("labels", [BIO, UPOS], ids=["BIO, also broken", "part of speech"])
def test_entities_are_those_of_seqeval(labels):
    rng = random.Random(0)
    for _ in range(100):
        gold, ours = ([[rng.choice(labels) for _ in range(n)] for n in range(1, 51)] for _ in range(2))
        for sentence in gold:
            assert entities(sentence) == {(kind, first, last + 1) for kind, first, last in get_entities(sentence)}
        ours = [[a if rng.random() < 0.7 else b for a, b in zip(x, y)] for x, y in zip(gold, ours)]
        expected = [100 * score(gold, ours) for score in (precision_score, recall_score, f1_score)]
        assert tasks.precision_recall_f1(gold, ours) == pytest.approx(expected)


def test_accuracy_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(100):
        gold, ours = (rng.choice(UPOS, 100).tolist() for _ in range(2))
        assert tasks.percent_equal(gold, ours) == pytest.approx(100 * accuracy_score(gold, ours))


def same_rouge(gold: str, ours: str) -> None:
    their = rouge_scorer.RougeScorer(["rougeL", "rouge1", "rouge2"]).score(gold, ours)
    assert rouge(gold, ours) == pytest.approx([100 * their[x].fmeasure for x in ("rougeL", "rouge1", "rouge2")])


def test_rouge_is_that_of_rouge_score():
    rng = random.Random(0)
    words = ["the", "The", "river", "it's", "x-y", "3.5", "...", "falls", "under_score", "a", "b", "c"]
    for _ in range(10_000):
        gold, ours = (" ".join(rng.choices(words, k=rng.randint(0, 14))) for _ in range(2))
        same_rouge(gold, ours)


def test_rouge_of_other_scripts():
    """rouge-score drops all but a to z; with our words it gives our scores. Hindi vowels do not part words."""
    gold, ours = "हिन्दी में मौसम, कैसा है", "मौसम कैसा है?"
    assert tasks.rouge_words(gold) == ["हिन्दी", "में", "मौसम", "कैसा", "है"]

    class Words:
        def tokenize(self, text):
            return tasks.rouge_words(text)

    their = rouge_scorer.RougeScorer(["rougeL", "rouge1", "rouge2"], tokenizer=Words()).score(gold, ours)
    assert rouge(gold, ours) == pytest.approx([100 * their[x].fmeasure for x in ("rougeL", "rouge1", "rouge2")])
    assert rouge(gold, ours)[0] == pytest.approx(75)
    assert rouge("今日は天気がいいです。", "今日は天気が悪いです")[1] == pytest.approx(90)  # 9 of 10 characters


@needs_shared
@pytest.mark.filterwarnings("ignore:.* seems not to be NE tag")
@pytest.mark.parametrize("task", ["pos", "ner", "slots"])
def test_metrics_on_all_real_labels(task):
    rng, folder = random.Random(0), SHARED / ("udpos" if task == "pos" else task)
    for language in sorted(path.name for path in folder.iterdir()):
        for path in sorted((folder / language).glob("*")):
            gold = [item.tags for item in tasks.read_split(task, folder, language, path.name.split(".")[0])]
            flat = [tag for tags in gold for tag in tags]
            ours = [[t if rng.random() < 0.8 else rng.choice(flat) for t in tags] for tags in gold]
            expected = [100 * score(gold, ours) for score in (precision_score, recall_score, f1_score)]
            assert tasks.precision_recall_f1(gold, ours) == pytest.approx(expected)
            assert tasks.percent_equal(flat, [t for tags in ours for t in tags]) == pytest.approx(
                100 * accuracy_score(flat, [t for tags in ours for t in tags])
            )


@needs_shared
def test_real_summaries_and_trees():
    for language in ("en", "en-digitalgov"):
        items = tasks.read_split("summ", SHARED / "summ", language, "test")
        for item in items[:100]:
            gold, ours = (text.encode("ascii", "ignore").decode() for text in (item.label, item.words[0][:300]))
            same_rouge(gold, ours)
    for language in ("de", "en", "fr", "hi"):
        items = tasks.read_split("parse", SHARED / "parse", language, "test")  # every gold tree is well-formed
        assert scores("parse", items, items) == {"exact match": 100, "well-formed": 100}


@pytest.mark.parametrize(
    "tree, sound",
    [
        ("[IN:A b ]", True), ("[IN:A [SL:B c ] d ]", True), ("[IN:A b", False), ("[IN:A b ] ]", False), ("", False),
        ("a [IN:A b ]", False), ("[IN:A b ] c", False), ("[IN:A ] [IN:B ]", False), ("]", False), ("[IN:A", False),
    ],
)  # fmt: skip
def test_well_formed_trees(tree, sound):
    assert tasks.well_formed(tree) == sound


@pytest.mark.parametrize("task", tasks.METRICS)
def test_gold_labels_score_100(folder, task):
    items = tasks.read_split(task, folder / task, "en", "test")
    assert set(scores(task, items, items).values()) == {100.0} or task == "summ"
    if task == "summ":  # "c 3" is of one pair of words and no more
        assert scores(task, items, items) == pytest.approx({"ROUGE-L": 100, "ROUGE-1": 100, "ROUGE-2": 100})


def test_the_scores_of_slots():
    gold = [Item(["a", "b"], ["B-x", "O"], "i"), Item(["c"], ["O"], "j"), Item(["d"], ["B-x"], "i")]
    ours = [Item(["a", "b"], ["B-x", "O"], "i"), Item(["c"], ["O"], "i"), Item(["d"], ["O"], "i")]
    assert scores("slots", gold, ours) == pytest.approx(
        {"both right": 100 / 3, "intent accuracy": 200 / 3, "slot F1": 200 / 3}
    )


# Rows ---------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(1, 60))
def test_windows_answer_for_every_token_once(n, size):
    found = windows(n, size)
    assert [t for _, _, first, end in found for t in range(first, end)] == list(range(n))
    assert all(start <= first <= end <= stop <= start + size for start, stop, first, end in found)
    assert len(found) == 1 if n <= size else len(found) > 1
    if size >= 8:  # tokens on either side, but at the ends of the sentence
        assert all(first - start >= size // 4 or start == 0 for start, _, first, _ in found)


def test_the_first_window_speaks_for_the_sentence(tokenizer, ids):
    torch.manual_seed(0)
    body = MaskedLM(ModelConfig(ids.vocab_size, 32, 2, 64, 1, max_len=16))
    labels = [str(i) for i in range(200)]
    model = tasks.Heads(body, 2, len(labels), False)
    item = Item(["go", "to", "http://" + "x/y" * 60], ["O", "O", "O"], "0")  # its last word begins in the first window
    rows = tasks.rows_of([item], tokenizer, ids, 16, ["O", "P"], labels)
    assert len(rows) > 2 and rows[-1].words == []
    alone = [tasks.run_heads(model.eval(), [row], ids.pad)[1].argmax().item() for row in rows]
    assert len(set(alone)) > 1
    (ours,) = tasks.predict_heads(model, [item], rows, ["O", "P"], labels, ids.pad, "")
    assert ours.label == labels[alone[0]]


def test_rows_hold_every_word_once(tokenizer, ids):
    rng = random.Random(0)
    words = ["river", "Donaudampfschifffahrt", "🐫", "", "\u200b", "x", "नदी"]
    items = []
    for _ in range(200):
        chosen = rng.choices(words, k=rng.randint(1, 40))
        items.append(Item(chosen, [rng.choice(["A", "B"]) for _ in chosen], "i"))
    rows = tasks.rows_of(items, tokenizer, ids, 32, ["A"], ["i"])
    seen = {(row.item, w): (row, k) for row in rows for k, w in enumerate(row.words)}
    assert len(seen) == sum(len(row.words) for row in rows) == sum(len(item.words) for item in items)
    for (i, w), (row, k) in seen.items():
        first = (tokenizer.encode(items[i].words[w]) or [ids.unk])[0]
        assert row.src[row.at[k]] == first and row.tags[k] == (0 if items[i].tags[w] == "A" else -1)
    assert max(len(row.src) for row in rows) <= 32 and all(row.src[-1] == ids.eos for row in rows)
    for i, item in enumerate(items):
        n = sum(len(tokenizer.encode(word) or [0]) for word in item.words)
        assert (sum(row.item == i for row in rows) == 1) == (n <= 31)


def test_a_pair_of_texts_is_cut_at_the_longer_one(tokenizer, ids):
    row = tasks.rows_of([Item(["river " * 50, "a house"], label="x")], tokenizer, ids, 32, [], ["x"])[0]
    premise, hypothesis = (tokenizer.encode(text) for text in ("river " * 50, "a house"))
    assert row.src == [*premise[: 30 - len(hypothesis)], ids.eos, *hypothesis, ids.eos] and row.label == 0


def test_batches_hold_every_row_once_and_like_lengths():
    lengths = np.random.default_rng(0).integers(1, 100, 3000).tolist()
    found = tasks.batches(lengths, 16, np.random.default_rng(1))
    assert sorted(i for batch in found for i in batch) == list(range(3000))
    padding = sum(max(lengths[i] for i in batch) * len(batch) for batch in found) / sum(lengths)
    assert padding < 1.1 and found != tasks.batches(lengths, 16, np.random.default_rng(2))


# Fine-tuning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["nli", "pos", "ner", "slots"])
def test_encoder_tasks_are_learned(command, checkpoints, folder, capsys, task):
    """From a checkpoint of either kind; the toy sets follow a rule that a linear head over words can find."""
    extracted = ["seq2seq.pt"] if task == "pos" else ["enc.pt"]
    command(evaluation, *extracted, "--task", task, "--data", folder / task, "--lr", 0.01, 0.003, "--out", "r.jsonl")
    out = capsys.readouterr().out
    results = [json.loads(line) for line in (checkpoints / "r.jsonl").read_text().splitlines()]
    assert [r["language"] for r in results] == ["de", "en"] and results[0]["lr"] in (0.01, 0.003)
    assert results[1]["scores"][tasks.METRICS[task][0]] > 90 and "lr 0.01: dev" in out
    assert results[1]["history"][0]["stage"] == "encoder" and results[1]["items"] == 12
    table = [line.split() for line in out.splitlines()]
    assert [line[0] for line in table if line[0] in ("de", "en")] == ["de", "en"] and "all but en" in out


def test_a_frozen_encoder_stays_and_its_heads_read_all_layers(checkpoints, folder, tokenizer, ids):
    body = load_model(checkpoints / "enc.pt")[0]
    before = {name: x.clone() for name, x in body.state_dict().items()}
    train = tasks.read_split("pos", folder / "pos", "en", "train")
    job = tasks.Job("pos", train, train[:9], tokenizer, ids, 2, 8, freeze=True, beams=1, dtype="fp32")
    seen = []
    original = tasks.Heads.__init__

    def noted(self, *args):
        original(self, *args)
        seen.append(self)

    tasks.Heads.__init__ = noted
    try:
        tasks.finetuned(job, body, 0.01, 0)
    finally:
        tasks.Heads.__init__ = original
    after = seen[0].state_dict()
    assert all(torch.equal(x, before[name]) for name, x in after.items() if name in before)
    assert after["fusion.query"].abs().sum() > 0
    assert all(torch.equal(x, before[name]) for name, x in body.state_dict().items())


def test_scores_do_not_depend_on_the_batch(checkpoints, folder, tokenizer, ids, monkeypatch):
    body = load_model(checkpoints / "enc.pt")[0]
    torch.manual_seed(0)
    model = tasks.Heads(body, 4, 3, False)
    for p in model.parameters():  # large enough weights that predictions differ from each other
        p.data += 0.2 * torch.randn_like(p)
    items = [Item(w := ["river", "x", "नदी"] * k, ["A"] * len(w), "i") for k in (1, 2, 7, 30, 3)] * 4
    tags, labels = list("ABCD"), list("ijk")
    rows = tasks.rows_of(items, tokenizer, ids, 32, tags, labels)
    assert len(rows) > len(items)
    found = []
    for budget in (1, 100, 10_000):
        monkeypatch.setattr(tasks, "SCORED_TOKENS", budget)
        found.append(tasks.predict_heads(model, items, rows, tags, labels, ids.pad, "x"))
    assert found[0] == found[1] == found[2] and len({tag for item in found[0] for tag in item.tags}) > 1


@pytest.mark.parametrize("task", ["parse", "summ"])
def test_50_pairs_are_learned_by_heart(data_dir, tmp_path, command, task, tokenizer, ids):
    """And given back exactly by beam search with the cache, in batches of unequal lengths."""
    command(train_seq2seq, "--data", data_dir, "--d-model", 64, "--n-heads", 2, "--encoder-layers", 1,
            "--decoder-layers", 1, "--seq-len", 64, "--batch-size", 4, "--dtype", "fp32", "--steps", 0)  # fmt: skip
    rng, items = random.Random(1), []
    words = ["river", "winter", "house", "garden", "bread", "milk", "road", "stone", "cloud", "night"]
    for _ in range(50):
        text = rng.sample(words, rng.randint(2, 6))
        tree = f"[IN:{text[0].upper()} [SL:{text[-1].upper()} {text[-1]} ] ]"
        items.append(Item([" ".join(text)], label=tree if task == "parse" else " ".join(text[::-1])))
    body = load_model(tmp_path / "seq2seq.pt")[0]
    job = tasks.Job(task, items, items, tokenizer, ids, 160, 10, freeze=False, beams=4, dtype="fp32")
    best, predict = tasks.finetuned(job, body, 3e-3, 0)
    assert [item.label for item in predict(items, "x")] == [item.label for item in items]
    assert best == 100


def test_a_batch_too_large_for_memory_is_halved(checkpoints, tokenizer, ids, monkeypatch):
    model, sizes = load_model(checkpoints / "seq2seq.pt")[0], []
    generate = tasks.generate

    def limited(model, src, *args, **options):
        sizes.append(len(src))
        if len(src) > 16:
            raise RuntimeError("CUDA out of memory")
        return generate(model, src, *args, **options)

    items = [Item(["river " * k], label="x") for k in range(1, 41)]
    whole = tasks.predict_texts(model, items, tokenizer, ids, 1, 5, "x")
    monkeypatch.setattr(tasks, "generate", limited)
    assert tasks.predict_texts(model, items, tokenizer, ids, 1, 5, "x") == whole
    assert sizes == [40, 32, 16, 16, 8]


def test_the_same_numbers_twice_and_on_two_processes(checkpoints, folder):
    """Two seeds differ; the same command prints the same; torchrun's second process adds nothing."""
    line = [str(ROOT / "eval.py"), "enc.pt", "--task", "slots", "--data", str(folder / "slots"), "--seeds", "2"]
    starts = [
        [sys.executable],
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    runs = [
        subprocess.run([*start, *line, "--epochs", "2", "--out", f"{i}.jsonl"], cwd=checkpoints, env=environment,
                       capture_output=True, text=True)
        for i, start in enumerate(starts)
    ]  # fmt: skip
    assert [run.returncode for run in runs] == [0, 0, 0], runs[2].stderr
    assert runs[0].stdout == runs[1].stdout == runs[2].stdout and " ± " in runs[0].stdout
    texts = [(checkpoints / f"{i}.jsonl").read_text() for i in range(3)]
    assert texts[0] == texts[1] == texts[2] and len(texts[0].splitlines()) == 4
    seeds = [json.loads(line) for line in texts[0].splitlines()]
    assert seeds[0]["dev"] != seeds[2]["dev"] or seeds[0]["scores"] != seeds[2]["scores"]


def test_labels_that_training_never_saw(command, checkpoints, folder, capsys):
    path = folder / "ner" / "de" / "test.bio"
    path.write_text(path.read_text().replace("B-thing", "B-other", 2))
    command(evaluation, "enc.pt", "--task", "ner", "--data", folder / "ner", "--epochs", 1, "--langs", "de")
    assert "de: 2 labels that training never saw, scored as wrong" in capsys.readouterr().out


def test_languages_without_a_test_set_are_named_unless_others_were_asked_for(folder, capsys):
    (folder / "ner" / "pt").mkdir()
    assert tasks.languages_of(folder / "ner", "en", None) == ["de", "en"]
    assert capsys.readouterr().out == "no test file, not scored: pt\n"
    assert tasks.languages_of(folder / "ner", "en", ["de"]) == ["de"] and not capsys.readouterr().out


def test_a_run_that_learned_nothing_is_told(command, checkpoints, folder, capsys):
    command(evaluation, "enc.pt", "--task", "nli", "--data", folder / "nli", "--epochs", 1, "--lr", 1e-9)
    assert "warning: seed 0 collapsed to chance: dev" in capsys.readouterr().out


NO_GZIP = gzip.compress(b"a", mtime=0)[:10] + b"\xff" * 20  # a sound header before what is none of its blocks


@pytest.mark.parametrize(
    "arguments, damage, complaint",
    [
        (["--task", "pos"], None, "--task pos needs --data DIR"),
        (["--task", "pos", "--data", "nowhere"], None, "nowhere: no such folder"),
        (["--task", "pos", "--data", "pos", "--train-lang", "fr"], None, "pos: no fr in it to train on"),
        (["--task", "pos", "--data", "pos", "--langs", "hi"], None, "pos/hi: no test file; choose --langs among de en"),
        (["--task", "pos", "--data", "pos"], ("pos/en/dev.conllu", None), "pos/en: no dev file in it"),
        (["--task", "pos", "--data", "pos"], ("pos/de/test.conllu", ""), "pos/de/test.conllu: nothing in it"),
        (["--task", "pos", "--data", "pos"], ("pos/de/test.conllu", "1\tx\t_\n"), "pos/de/test.conllu:1: 4 columns"),
        (["--task", "ner", "--data", "ner"], ("ner/de/test.bio", "a\tO\nb\n"), "ner/de/test.bio:2: 2 columns"),
        (["--task", "slots", "--data", "slots"], ("slots/de/test.tsv", "a b\tO\ti\n"), "tsv:1: 2 words and 1 tags"),
        (["--task", "slots", "--data", "slots"], ("slots/de/test.tsv", "a  b\tO  O\ti\n"), "tsv:1: 3 words and 3 tags"),
        (["--task", "pos", "--data", "pos"], ("pos/de/test.gz", NO_GZIP), "test.gz:1: cannot be read"),
        (["--task", "nli", "--data", "nli"], ("nli/de/test.tsv", "a\tb\tmaybe\n"), "test.tsv:1: 'maybe' is none of"),
        (["--task", "nli", "--data", "nli"], ("nli/de/test.tsv", b"a\tb\xff\tc\n"), "test.tsv:1: cannot be read"),
        (["--task", "parse", "--data", "parse"], None, "enc.pt: a checkpoint of kind 'encoder', not seq2seq"),
        (["--task", "nli", "--data", "nli", "--n-train", "-1"], None, "--n-train -1: it must be at least 0"),
        (["--task", "nli", "--data", "nli", "--seeds", "0"], None, "--seeds 0: it must be at least 1"),
        (["--task", "nli", "--data", "nli", "--lr", "-1"], None, "--lr -1.0: it must be over 0"),
        (["--task", "nli", "--data", "nli", "--lr", "1", "nan"], None, "--lr nan: it must be over 0, and finite"),
        (["--task", "pos", "--data", "pos", "--train-lang", "de"], None, "no de in it to train on; choose --train"),
        (["--task", "nli", "--data", "nli"], ("nli/de/test.tsv.xz", ""), "test.tsv and test.tsv.xz: one file, packed"),
        (["--task", "nli", "--data", "nli", "--out", "no/r.jsonl"], None, "no/r.jsonl: cannot be written"),
    ],
)  # fmt: skip
def test_bad_input(command, checkpoints, folder, arguments, damage, complaint):
    if damage:
        path, content = folder / damage[0], damage[1]
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as raised:
        command(evaluation, "enc.pt", *arguments)
    assert complaint in str(raised.value)


def test_a_byte_order_mark_and_an_editors_copy_are_no_data(tmp_path):
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "test.bio").write_text("John\tB-PER\n", encoding="utf-8-sig")
    (tmp_path / "en" / "test.bio~").write_text("John\tB-PER\n")
    (item,) = tasks.read_split("ner", tmp_path, "en", "test")
    assert item.words == ["John"]


def test_half_a_surrogate_pair_in_a_summary(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n{"source": "a", "target": "\\ud800"}\n')
    with pytest.raises(InputError, match=r"test\.jsonl:2: not an object with texts"):
        list(tasks.READERS["summ"](path))


@pytest.mark.parametrize("tree", ["[IN:A b", "b ]", "[IN:A ] ]"])
def test_a_gold_tree_with_unbalanced_brackets(tmp_path, tree):
    path = tmp_path / "test.tsv"
    path.write_text(f"a\t[IN:A b ]\nb\t{tree}\n")
    with pytest.raises(InputError, match=r"test\.tsv:2: the brackets of the tree do not match"):
        list(tasks.read_parse(path))


def test_the_majority_needs_no_model(folder):
    train = tasks.read_split("pos", folder / "pos", "en", "train")
    assert {tag for item in tasks.majority("pos", train, train) for tag in item.tags} <= {"DET", "NOUN", "VERB"}
    lead = tasks.majority("summ", [Item(["x"], label="two words")], [Item(["one two three"])])
    assert lead == [Item(["one two three"], label="one two")]


# Reports ------------------------------------------------------------------------------------------------------------


def test_report(command, checkpoints, folder, capsys):
    (checkpoints / "seq2seq.pt").rename(checkpoints / "bart-12e12d.pt")
    (checkpoints / "enc.pt").rename(checkpoints / "roberta-12e.pt")
    (checkpoints / "enc.run").rename(checkpoints / "roberta-12e.run")
    common = ["--epochs", 1, "--seeds", 2, "--n-train", 50, "--out", "r.jsonl"]
    for name, task in (("bart-12e12d", "pos"), ("roberta-12e", "pos"), ("bart-12e12d", "summ"), ("roberta-12e", "nli")):
        command(evaluation, f"{name}.pt", "--task", task, "--data", folder / task, *common)
    for name in ("bart-12e12d", "roberta-12e"):
        command(evaluation, f"{name}.pt", "--task", "loss", "--out", "losses.jsonl")
    command(report, "r.jsonl", "losses.jsonl", "--out", "OUT")
    text = (checkpoints / "OUT" / "tables.md").read_text()
    of_tasks = re.sub(r"Held-out losses:\n\n(\|.*\n)+", "", text)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in of_tasks.splitlines() if line.startswith("|")]
    assert [line[0] for line in table] == ["model", "---", "roberta-12e", "bart-12e12d", "model", "---", "bart-12e12d"]
    assert table[0][:4] == ["model", "FLOPs", "pair saved", "held-out loss, nats"]
    assert table[0][4:] == ["nli, accuracy: others", "nli: trained", "pos, accuracy: others", "pos: trained"]
    results = [json.loads(line) for line in (checkpoints / "r.jsonl").read_text().splitlines()]
    english = [r["scores"]["accuracy"] for r in results if r["task"] == "pos" and r["language"] == "en"]
    assert table[3][7] == tasks.mean_sd(english[:2]) and table[3][4] == "-" and " ± " in table[3][7]
    assert all(r["n_train"] == (9 if r["task"] == "summ" else 50) for r in results)
    losses = [json.loads(line) for line in (checkpoints / "losses.jsonl").read_text().splitlines()]
    entropy = {r["language"]: f"{r['unigram_entropy']:.2f}" for r in losses}
    assert f"| unigram entropy | {entropy['de']} | {entropy['en']} | {entropy['hi']} |" in text
    of_bart = [r["loss"] for r in losses if r["kind"] == "seq2seq"]
    assert table[3][3] == "-" and table[6][3] == f"{sum(of_bart) / 3:.3f}"  # an encoder's loss is of another objective
    assert float(table[2][1]) < float(table[3][1])  # the second stage adds to the first
    assert (checkpoints / "OUT" / "loss-curves.png").stat().st_size > 5000
    assert (checkpoints / "OUT" / "score-against-compute.png").stat().st_size > 5000
    (checkpoints / "bad.jsonl").write_text("{}\n[1]\n")
    with pytest.raises(InputError, match=r"bad\.jsonl:1: not a result"):
        command(report, "bad.jsonl", "--out", "OUT")
    poor = {name: value for name, value in results[0].items() if name != "train_lang"}
    (checkpoints / "bad.jsonl").write_text(json.dumps(poor) + "\n")
    with pytest.raises(InputError, match=r"bad\.jsonl:1: not a result"):
        command(report, "bad.jsonl", "--out", "OUT")
    with open(checkpoints / "roberta-12e.run" / "metrics.jsonl", "a") as log:
        log.write('{"step": 2, "held_out": {"en": 1.5}')  # as a run that is killed leaves it
    (checkpoints / "strange.jsonl").write_text(
        json.dumps(losses[0] | {"checkpoint": "unfreeze-at-x.pt", "history": []})
    )
    command(report, "losses.jsonl", "strange.jsonl", "--out", "OUT")
    (checkpoints / "file").touch()
    for blocked in ("file", "file/OUT"):
        with pytest.raises(OSError, match=blocked):  # one line by run_command
            command(report, "losses.jsonl", "--out", blocked)


def test_a_curve_for_every_run_of_one_name(command, tmp_path):
    result = {"checkpoint": "a.pt", "kind": "encoder", "history": [], "task": "loss", "language": "en", "loss": 1.0}
    paths = []
    for seed, folder in enumerate(("one", "two")):
        (tmp_path / folder / "a.run").mkdir(parents=True)
        lines = [{"step": step, "held_out": {"en": step + seed}, "mean": step + seed} for step in (1, 2)]
        (tmp_path / folder / "a.run" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (tmp_path / folder / "r.jsonl").write_text(json.dumps(result) + "\n")
        paths.append(tmp_path / folder / "r.jsonl")
    again = result | {"checkpoint": "../two/a.pt"}  # the second run by another name: no third curve
    paths[0].write_text(paths[0].read_text() + json.dumps(again) + "\n")
    curves = report.curves(report.read_results(paths))
    assert {name: [x["mean"] for x in rows] for name, rows in curves["encoder"].items()} == {
        "a": [1, 2],
        "two/a": [2, 3],
    }


def result(row, unfreeze_at=0.0, pretrained=0, **more):
    """A line of results.jsonl of a second stage, or of bart-12e12d."""
    flops, settings = 1e9 * (2 - unfreeze_at), {"unfreeze_at": unfreeze_at, "seed": pretrained}
    history = [{"stage": "seq2seq", "flops": flops, "settings": settings}]
    history = [{"stage": "encoder", "flops": 1e9}] * (row != "bart-12e12d") + history
    return {"checkpoint": f"{row}.pt", "kind": "seq2seq", "history": history, "task": "loss", "language": "en"} | more


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(name)


@pytest.fixture
def losses():
    """Of the model from scratch and of three points of a sweep, one of them from a second seed too."""
    found = [result("bart-12e12d", language=x, loss=y) for x, y in (("en", 1.0), ("de", 3.0))]
    found += [result("2stage-bart-12e12d-unfrz", 0.5, loss=9.0)]  # made again below
    found += [result("2stage-bart-12e12d-unfrz", 0.5, loss=2.0), result("2stage-bart-12e12d", 1.0, loss=4.0)]
    found += [result("unfreeze-at-0", 0.0, loss=1.5)]
    return found + [result("2stage-bart-12e12d-unfrz", 0.5, 1, loss=7.0, checkpoint="1/2stage-bart-12e12d-unfrz.pt")]


def curve(text):
    """The lines of a report's table of the sweep."""
    return text[text.index("# When to unfreeze") :].splitlines()[2:]


def test_a_report_does_not_mix_ways_of_fine_tuning(command, checkpoints):
    one = result("bart-12e12d", task="summ", scores={"ROUGE-L": 1.0}, train_lang="en", n_train=10, seed=0)
    path = write("a.jsonl", [one, {**one, "n_train": 2000}])
    with pytest.raises(InputError, match=r"a\.jsonl:2: bart-12e12d in summ with n_train 2000, not 10 as before; keep"):
        command(report, path, "--out", "OUT")


def test_a_checkpoint_is_one_whatever_the_way_to_it(command, checkpoints, losses):
    again = [{**row, "checkpoint": str(Path(row["checkpoint"]).resolve())} for row in losses[:2]]
    command(report, write("a.jsonl", losses + again), "--out", "OUT")
    assert "| bart-12e12d | 2.00e+09 | - | 2.000 |" in Path("OUT/tables.md").read_text()


def test_report_of_runs_from_other_seeds_and_the_sweep(command, checkpoints, losses):
    encoder = result("roberta-12e", loss=1.0, kind="encoder", history=[{"stage": "encoder", "flops": 1e9}])
    again = [result("bart-12e12d", language=x, loss=y) for x, y in (("en", 1.2), ("de", 3.2))]
    command(report, write("a.jsonl", losses), write("b.jsonl", [encoder, *again]), "--out", "OUT")
    text = Path("OUT/tables.md").read_text()
    assert "| bart-12e12d | 2.00e+09 | - | 2.100 ± 0.141 |" in text
    assert "| nats | de | en | mean |\n|---|---|---|---|\n| bart-12e12d | 3.10 ± 0.14 | 1.10 ± 0.14 | 2.10" in text
    assert "| 2stage-bart-12e12d | - | 4.00 | 4.00 |" in text
    assert curve(text)[2:] == [
        "| 0 | 1.500 | 3.00e+09 | 0.0% |",
        "| 0.5 | 2.000 | 2.50e+09 | 16.7% |",
        "| 1 | 4.000 | 2.00e+09 | 33.3% |",
    ]  # seed 1 has one point of them: no part of the curve
    assert "| 2stage-bart-12e12d-unfrz | 2.50e+09 | 16.7% | 4.500 ± 3.536 |" in text
    assert Path("OUT/unfreeze-at.png").stat().st_size > 5000


def test_generation_scores_of_the_sweep(command, checkpoints, losses):
    parse = dict(train_lang="en", task="parse")
    rows = [("2stage-bart-12e12d-unfrz", 0.5, 20.0), ("2stage-bart-12e12d-unfrz", 0.5, 22.0), ("bart-12e12d", 0.0, 9.0)]
    rows += [("unfreeze-at-0.25", 0.25, 1.0)]  # without a loss: no point
    scores = [result(row, at, **parse, seed=i, scores={"exact match": x}) for i, (row, at, x) in enumerate(rows)]
    command(report, write("a.jsonl", losses), write("c.jsonl", scores), "--out", "OUT")
    lines = curve(Path("OUT/tables.md").read_text())
    assert lines[0] == "| `--unfreeze-at` | held-out loss, nats | parse, exact match | FLOPs | pair saved |"
    assert lines[2:4] == ["| 0 | 1.500 | - | 3.00e+09 | - |", "| 0.5 | 2.000 | 21.00 ± 1.41 | 2.50e+09 | - |"]
    assert lines[4:] == ["| 1 | 4.000 | - | 2.00e+09 | - |"]


def test_the_figure_of_the_sweep_has_the_numbers_of_the_table(command, monkeypatch, losses):
    drawn, draw = [], Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda self, *xy, **how: drawn.append(xy) or draw(self, *xy, **how))
    scores = [(0, 20.0), (1, 99.0), (1, 22.0)]  # the second was made again
    parse = dict(train_lang="en", task="parse")
    rows = [result("2stage-bart-12e12d-unfrz", 0.5, **parse, seed=i, scores={"exact match": x}) for i, x in scores]
    report.plot_sweep(report.read_results([write("a.jsonl", [*losses, *rows])]), Path("."))
    assert drawn == [([0, 0.5, 1], (1.5, 2, 4), (0, 0, 0)), ([0.5], (21,), (pytest.approx(2**0.5),))]


def test_what_a_sweep_is_compared_with(command, checkpoints, losses):
    strange = [result("bart-12e12d", loss=9.0, kind="encoder"), result("bart-12e12d", pretrained=1, loss=9.0)]
    strange += [result("bart-12e12d", loss=9.0, history=[{"stage": "seq2seq", "flops": 1e9}])]  # without settings
    results = report.read_results([write("a.jsonl", [*losses, *strange])])
    assert [r["loss"] for r in report.from_scratch(results, report.sweep(results), "loss")] == [1.0, 3.0]


def test_report_of_models_that_cost_nothing(command, checkpoints, losses):
    for row in losses:
        for stage in row["history"]:
            stage["flops"] = 0.0
    encoder = result("roberta-12e", loss=1.0, kind="encoder", history=[{"stage": "encoder", "flops": 0.0}])
    command(report, write("a.jsonl", [*losses, encoder]), "--out", "OUT")
    assert "| 2stage-bart-12e12d | 0.00e+00 | - | 4.000 |" in Path("OUT/tables.md").read_text()


def test_report_without_matplotlib(command, checkpoints, folder, capsys, monkeypatch):
    command(evaluation, "enc.pt", "--task", "nli", "--data", folder / "nli", "--epochs", 1, "--out", "r.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command(report, "r.jsonl", "--out", "OUT")
    assert "for figures: pip install matplotlib" in capsys.readouterr().out
    assert [path.name for path in Path("OUT").iterdir()] == ["tables.md"]


def test_an_extracted_encoder(command, checkpoints, folder):
    command(extract, "seq2seq.pt", "--out", "e.pt")
    command(evaluation, "e.pt", "--task", "ner", "--data", folder / "ner", "--epochs", 1, "--freeze-encoder")


# The embedded set ----------------------------------------------------------------------------------------------------


def test_the_embedded_utterances():
    folder = ROOT / "sample" / "slots"
    train, dev = (tasks.read_split("slots", folder, "en", split) for split in ("train", "dev"))
    test = {x: tasks.read_split("slots", folder, x, "test") for x in tasks.languages_of(folder, "en", None)}
    assert len(train) == 100 and len(test) == 12 and all(len(items) == 30 for items in test.values())
    known = [{x for item in train for x in xs(item)} for xs in (lambda item: item.tags, lambda item: [item.label])]
    for language, items in test.items():
        assert {tag for item in items for tag in item.tags} <= known[0], language
        assert [item.label for item in items] == [item.label for item in test["en"]]
    texts = [" ".join(item.words) for items in (train, dev, *test.values()) for item in items]
    assert len(set(texts)) == len(texts)
