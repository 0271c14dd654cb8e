import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score
from task_layouts import toy_sets

import eval as evaluation
import extract
import metrics
import task_data
import tasks
import train_seq2seq
from checkpoint import load_model
from cli import InputError
from metrics import entities, rouge, scores
from model import MaskedLM, ModelConfig
from task_data import Item, find_splits, read_files
from tasks import Job, Tagger, windows

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the paper's data sets are not at {SHARED}")
UPOS = task_data.UPOS.split("|")
BIO = [f"{x}-{y}" for x in "BIES" for y in ("PER", "LOC", "a-b")] + ["O", "O", "I-ORG", "B", "I"]


@pytest.fixture
def folder(tmp_path):
    """A small data set of each task, in English and German."""
    return toy_sets(tmp_path)


def tagger(items, tokenizer, ids, max_len=32):
    """Of an untrained encoder; the items give the tags and labels."""
    torch.manual_seed(0)
    body = MaskedLM(ModelConfig(ids.vocab_size, 32, 2, 64, 1, max_len=max_len))
    return Tagger(Job("slots", items, items, tokenizer, ids, 1, 8, freeze=False, beams=1, dtype="fp32"), body)


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
        assert metrics.precision_recall_f1(gold, ours) == pytest.approx(expected)


def test_accuracy_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(100):
        gold, ours = (rng.choice(UPOS, 100).tolist() for _ in range(2))
        assert metrics.percent_equal(gold, ours) == pytest.approx(100 * accuracy_score(gold, ours))


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
    assert metrics.rouge_words(gold) == ["हिन्दी", "में", "मौसम", "कैसा", "है"]

    class Words:
        def tokenize(self, text):
            return metrics.rouge_words(text)

    their = rouge_scorer.RougeScorer(["rougeL", "rouge1", "rouge2"], tokenizer=Words()).score(gold, ours)
    assert rouge(gold, ours) == pytest.approx([100 * their[x].fmeasure for x in ("rougeL", "rouge1", "rouge2")])
    assert rouge(gold, ours)[0] == pytest.approx(75)
    assert rouge("今日は天気がいいです。", "今日は天気が悪いです")[1] == pytest.approx(90)  # 9 of 10 characters


def real_sets(task):
    """(split, items) of all sets of a task."""
    for split, languages in find_splits(task, SHARED / task.replace("pos", "udpos"), "en").items():
        for language, files in languages.items():
            yield split, read_files(task, files, language)


@needs_shared
@pytest.mark.filterwarnings("ignore:.* seems not to be NE tag")
@pytest.mark.parametrize("task", ["pos", "ner", "slots"])
@pytest.mark.slow
def test_metrics_on_all_real_labels(task):
    rng = random.Random(0)
    for _, items in real_sets(task):
        gold = [item.tags for item in items]
        flat = [tag for tags in gold for tag in tags]
        ours = [[t if rng.random() < 0.8 else rng.choice(flat) for t in tags] for tags in gold]
        expected = [100 * score(gold, ours) for score in (precision_score, recall_score, f1_score)]
        assert metrics.precision_recall_f1(gold, ours) == pytest.approx(expected)
        accuracy = 100 * accuracy_score(flat, [t for tags in ours for t in tags])
        assert metrics.percent_equal(flat, [t for tags in ours for t in tags]) == pytest.approx(accuracy)


@needs_shared
def test_real_summaries_and_trees():
    for split, items in real_sets("summ"):
        for item in items[:100] if split == "test" else []:
            gold, ours = (text.encode("ascii", "ignore").decode() for text in (item.label, item.words[0][:300]))
            same_rouge(gold, ours)
    for _, items in real_sets("parse"):  # every gold tree is well-formed
        assert scores("parse", items, items) == {"exact match": 100, "well-formed": 100}


@pytest.mark.parametrize("task", metrics.METRICS)
def test_gold_labels_score_100(folder, task):
    items = task_data.read_task(task, folder / task, "en")[2]["en"]
    assert set(scores(task, items, items).values()) == {100.0} or task == "summ"
    if task == "summ":
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
    labels = [Item(["go"], ["O"], str(i)) for i in range(200)]
    item = Item(["go", "to", "http://" + "x/y" * 60], ["O", "O", "O"], "0")  # its last word begins in the first window
    model = tagger(labels, tokenizer, ids, max_len=16)
    model.model.eval()
    rows = model.encode([item])
    assert len(rows) > 2 and rows[-1].words == []
    alone = [model.logits([row])[1].argmax().item() for row in rows]
    assert len(set(alone)) > 1
    assert model.predict([item], "")[0].label == model.labels[alone[0]]


def test_rows_hold_every_word_once(tokenizer, ids):
    rng = random.Random(0)
    words = ["river", "Donaudampfschifffahrt", "🐫", "", "\u200b", "x", "नदी"]
    items = []
    for _ in range(200):
        chosen = rng.choices(words, k=rng.randint(1, 40))
        items.append(Item(chosen, [rng.choice(["A", "B"]) for _ in chosen], "i"))
    rows = tagger([Item(["x"], ["A"], "i")], tokenizer, ids).encode(items)
    seen = {(row.item, w): (row, k) for row in rows for k, w in enumerate(row.words)}
    assert len(seen) == sum(len(row.words) for row in rows) == sum(len(item.words) for item in items)
    for (i, w), (row, k) in seen.items():
        first = (tokenizer.encode(items[i].words[w]) or [ids.unk])[0]
        assert row.src[row.positions[k]] == first
    assert max(len(row.src) for row in rows) <= 32 and all(row.src[-1] == ids.eos for row in rows)
    for i, item in enumerate(items):
        n = sum(len(tokenizer.encode(word) or [0]) for word in item.words)
        assert (sum(row.item == i for row in rows) == 1) == (n <= 31)


@pytest.mark.parametrize("longer", [0, 1])
def test_a_pair_of_texts_is_cut_at_the_longer_one(tokenizer, ids, longer):
    texts = ["river " * 50, "a house"] if longer == 0 else ["a house", "river " * 50]
    (row,) = tagger([Item(texts, label="x")], tokenizer, ids).rows
    pieces = [tokenizer.encode(text) for text in texts]
    pieces[longer] = pieces[longer][: 30 - len(pieces[1 - longer])]
    assert row.src == [*pieces[0], ids.eos, *pieces[1], ids.eos]


def test_a_batch_of_windows_without_words_has_a_loss_of_zero(tokenizer, ids):
    model = tagger([Item(["x" * 300], ["A"])], tokenizer, ids, max_len=16)
    loss = model.loss([len(model.rows) - 1])
    loss.backward()
    assert model.rows[-1].words == [] and loss.item() == 0


def test_batches_hold_every_row_once_and_like_lengths():
    lengths = np.random.default_rng(0).integers(1, 100, 3000).tolist()
    found = tasks.batches(lengths, 16, np.random.default_rng(1))
    assert sorted(i for batch in found for i in batch) == list(range(3000))
    padding = sum(max(lengths[i] for i in batch) * len(batch) for batch in found) / sum(lengths)
    assert padding < 1.1 and found != tasks.batches(lengths, 16, np.random.default_rng(2))


# Fine-tuning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["nli", "pos", "ner", "slots"])
@pytest.mark.slow
def test_encoder_tasks_are_learned(command, checkpoints, folder, capsys, task):
    """From a checkpoint of either kind; the toy sets follow a rule that a linear head over words can find."""
    extracted = ["seq2seq.pt"] if task == "pos" else ["enc.pt"]
    command(evaluation, *extracted, "--task", task, "--data", folder / task, "--lr", 0.01, 0.003, "--out", "r.jsonl")
    out = capsys.readouterr().out
    results = [json.loads(line) for line in (checkpoints / "r.jsonl").read_text().splitlines()]
    assert [r["language"] for r in results] == ["de", "en"] and results[0]["lr"] in (0.01, 0.003)
    assert results[1]["scores"][metrics.METRICS[task][0]] > 90 and "lr 0.01: dev" in out
    assert results[1]["history"][0]["stage"] == "encoder" and results[1]["items"] == 12
    table = [line.split() for line in out.splitlines()]
    assert [line[0] for line in table if line[0] in ("de", "en")] == ["de", "en"] and "all but en" in out


def test_a_frozen_encoder_stays_and_its_heads_read_all_layers(checkpoints, folder, tokenizer, ids):
    body = load_model(checkpoints / "enc.pt")[0]
    before = {name: x.clone() for name, x in body.state_dict().items()}
    train = task_data.read_task("pos", folder / "pos", "en")[0]
    job = Job("pos", train, train[:9], tokenizer, ids, 2, 8, freeze=True, beams=1, dtype="fp32")
    after = tasks.finetune(job, body, 0.01, 0)[1].model.state_dict()
    assert all(torch.equal(x, before[name]) for name, x in after.items() if name in before)
    assert after["fusion.query"].abs().sum() > 0
    assert all(torch.equal(x, before[name]) for name, x in body.state_dict().items())


@pytest.mark.parametrize("seed", range(3))
def test_the_best_epoch_is_kept(checkpoints, folder, tokenizer, ids, seed):
    """Also when later ones are worse, at a rate that is far too high."""
    body = load_model(checkpoints / "enc.pt")[0]
    train, dev, _ = task_data.read_task("pos", folder / "pos", "en")
    job = Job("pos", train, dev, tokenizer, ids, 5, 8, freeze=False, beams=1, dtype="fp32")
    best, learner = tasks.finetune(job, body, 0.3, seed)
    assert scores("pos", dev, learner.predict(dev, "x"))["accuracy"] == best


def test_scores_do_not_depend_on_the_batch(tokenizer, ids, monkeypatch):
    train = [Item([tag], [tag], label) for tag, label in zip("ABCD", "ijkk")]
    model = tagger(train, tokenizer, ids)
    for p in model.model.parameters():  # large enough weights that predictions differ from each other
        p.data += 0.2 * torch.randn_like(p)
    items = [Item(w := ["river", "x", "नदी"] * k, ["A"] * len(w), "i") for k in (1, 2, 7, 30, 3)] * 4
    assert len(model.encode(items)) > len(items)
    found = []
    for budget in (1, 100, 10_000):
        monkeypatch.setattr(tasks, "SCORED_TOKENS", budget)
        found.append(model.predict(items, "x"))
    assert found[0] == found[1] == found[2] and len({tag for item in found[0] for tag in item.tags}) > 1


@pytest.mark.parametrize("task", ["parse", "summ"])
@pytest.mark.slow
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
    job = Job(task, items, items, tokenizer, ids, 160, 10, freeze=False, beams=4, dtype="fp32")
    best, writer = tasks.finetune(job, body, 3e-3, 0)
    assert [item.label for item in writer.predict(items, "x")] == [item.label for item in items]
    assert best == 100


def test_generation_does_not_depend_on_the_batch(checkpoints, tokenizer, ids, monkeypatch):
    items = [Item(["river " * k], label="x") for k in range(1, 41)]
    model = load_model(checkpoints / "seq2seq.pt")[0]
    writer = tasks.Writer(Job("summ", items, items, tokenizer, ids, 1, 8, freeze=False, beams=2, dtype="fp32"), model)
    whole = writer.predict(items, "x")
    monkeypatch.setattr(tasks, "GENERATED_TOKENS", 2 * model.cfg.max_len * 7)  # seven at a time
    assert writer.predict(items, "x") == whole and len({item.label for item in whole}) > 1


@pytest.mark.slow
def test_the_same_numbers_twice_and_on_two_processes(checkpoints, folder):
    """Two seeds differ; the same command prints the same; torchrun's second process adds nothing."""
    line = [str(ROOT / "eval.py"), "enc.pt", "--task", "slots", "--data", str(folder / "slots"), "--seeds", "2"]
    line += ["--epochs", "2", "--lr", "0.01"]
    starts = [
        [sys.executable],
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    runs = [
        subprocess.run([*start, *line, "--out", f"{i}.jsonl"], cwd=checkpoints, env=environment,
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


def test_a_run_that_learned_nothing_is_told(command, checkpoints, folder, capsys):
    lines = (folder / "nli" / "en" / "train.tsv").read_text().splitlines(keepends=True)
    neutral = [line for line in lines if line.endswith("neutral\n")]
    for split, kept in (("train", [*lines, *neutral]), ("dev", neutral)):  # the majority is right for every pair
        (folder / "nli" / "en" / f"{split}.tsv").write_text("".join(kept))
    command(evaluation, "enc.pt", "--task", "nli", "--data", folder / "nli", "--epochs", 1, "--lr", 1e-9)
    assert "warning: seed 0 does not beat the majority: dev" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--task", "pos"], "--task pos needs --data DIR"),
        (["--task", "pos", "--data", "nowhere"], "nowhere: no such folder"),
        (["--task", "pos", "--data", "pos", "--langs", "hi"], "pos: no test file of hi, but of de en; see"),
        (["--task", "parse", "--data", "parse"], "enc.pt: a checkpoint of kind 'encoder', not seq2seq"),
        (["--task", "nli", "--data", "nli", "--n-train", "-1"], "--n-train -1: it must be at least 0"),
        (["--task", "nli", "--data", "nli", "--seeds", "0"], "--seeds 0: it must be at least 1"),
        (["--task", "nli", "--data", "nli", "--lr", "-1"], "--lr -1.0: it must be"),
        (["--task", "nli", "--data", "nli", "--lr", "1", "nan"], "--lr nan: it must be"),
        (["--task", "nli", "--data", "nli", "--cut"], "--cut does nothing with --task nli; leave it out"),
    ],
)
def test_bad_input(command, checkpoints, folder, arguments, complaint):
    with pytest.raises(InputError) as raised:
        command(evaluation, "enc.pt", *arguments)
    assert complaint in str(raised.value)


# What is cut --------------------------------------------------------------------------------------------------------


def test_targets_that_do_not_fit_are_an_error_or_cut(command, checkpoints, folder, capsys):
    """The model has 32 positions."""
    path = folder / "parse" / "en" / "train.tsv"
    path.write_text(path.read_text().replace("[SL:THING river", "[SL:THING" + 30 * " river"))
    line = ["seq2seq.pt", "--task", "parse", "--data", folder / "parse", "--epochs", 1, "--out", "r.jsonl"]
    with pytest.raises(InputError) as raised:
        command(evaluation, *line)
    found = re.fullmatch(
        r"train: (\d+) of 60 targets are longer than the model's 32 positions; "
        r"pre-train with --seq-len (\d+) or more, or pass --cut", str(raised.value)
    )  # fmt: skip
    assert int(found[1]) > 0 and int(found[2]) > 32
    command(evaluation, *line, "--cut")
    assert f"train: {found[1]} of 60 targets are longer than the 32 tokens generated at most" in capsys.readouterr().out
    assert json.loads((checkpoints / "r.jsonl").read_text().splitlines()[0])["cut"]


@pytest.mark.parametrize(
    "task, items, said",
    [
        ("nli", [Item(["a", "b"], label="x")], ""),
        (
            "nli",
            [Item(["a", "b " * 40], label="x")] * 2 + [Item(["a", "b"], label="x")],
            "2 of 3 pairs are longer than",
        ),
        ("slots", [Item(["a"] * 99, ["O"] * 99, "x")], ""),  # windows
        ("summ", [Item(["a " * 40], label="b")], "1 of 1 sources are longer than the model's 32 positions, and cut"),
    ],
)
def test_what_is_cut_is_counted(tokenizer, ids, task, items, said, capsys):
    job = Job(task, items, [items[0]], tokenizer, ids, 1, 8, freeze=False, beams=1, dtype="fp32")
    tasks.count_cut(job, 32, {})
    out = capsys.readouterr().out
    assert said in out and bool(said) == bool(out)


def test_the_longest_text_that_fits(tokenizer, ids, capsys):
    """A source and a target of max_len tokens, their </s> among them, are whole; of one more they are not."""
    pieces = tokenizer.encode("river " * 40)
    fits, not_ = (tokenizer.decode(pieces[:n]) for n in (31, 32))
    assert [len(tokenizer.encode(text)) for text in (fits, not_)] == [31, 32]
    for text, cut in ((fits, False), (not_, True)):
        job = Job("summ", [Item([text], label=text)], [], tokenizer, ids, 1, 8, False, 1, "fp32", cut=True)
        tasks.count_cut(job, 32, {})
        assert (", and cut" in capsys.readouterr().out) == cut
    job = Job("summ", [Item(["a"], label=fits)], [], tokenizer, ids, 1, 8, False, 1, "fp32", cut=True)
    tasks.count_cut(job, 32, {"de": [Item(["a"], label=not_)]})
    assert capsys.readouterr().out == "de test: 1 of 1 targets are longer than the 32 tokens generated at most\n"


@pytest.mark.parametrize("max_len", [64, 32])
def test_test_targets_longer_than_what_is_generated_are_counted(tokenizer, ids, max_len, capsys):
    short, long = Item(["a"], label="a"), Item(["a"], label="a " * 40)
    job = Job("summ", [short], [short], tokenizer, ids, 1, 8, freeze=False, beams=1, dtype="fp32", cut=True)
    tasks.count_cut(job, max_len, {"de": [long, long, short]})
    n = len(tokenizer.encode("a")) + 1 + 10
    assert capsys.readouterr().out == f"de test: 2 of 3 targets are longer than the {n} tokens generated at most\n"


# Baselines ----------------------------------------------------------------------------------------------------------


def test_the_majority_needs_no_model(folder):
    train = task_data.read_task("pos", folder / "pos", "en")[0]
    assert {tag for item in metrics.majority("pos", train, train) for tag in item.tags} <= {"DET", "NOUN", "VERB"}
    lead = metrics.majority("summ", [Item(["x"], label="Two words.")], [Item(["one two three"]), Item(["一二三"])])
    assert [item.label for item in lead] == ["one two", "一 二"]


def test_an_extracted_encoder(command, checkpoints, folder):
    command(extract, "seq2seq.pt", "--out", "e.pt")
    command(evaluation, "e.pt", "--task", "ner", "--data", folder / "ner", "--epochs", 1, "--freeze-encoder")
