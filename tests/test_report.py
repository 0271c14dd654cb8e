import json
import re
import sys
from pathlib import Path

import pytest
import report
from matplotlib.axes import Axes
from task_layouts import toy_sets

import eval as evaluation
import metrics
from cli import InputError


@pytest.fixture
def folder(tmp_path):
    return toy_sets(tmp_path)


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
    assert text.index("# Claims") < text.index("# Encoder tasks")
    of_tasks = re.sub(r"Held-out losses:\n\n(\|.*\n)+", "", text[text.index("# Encoder tasks") :])
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in of_tasks.splitlines() if line.startswith("|")]
    assert [line[0] for line in table] == ["model", "---", "roberta-12e", "bart-12e12d", "model", "---", "bart-12e12d"]
    assert table[0][:4] == ["model", "FLOPs", "pair saved", "held-out loss, nats"]
    assert table[0][4:] == ["nli, accuracy: others", "nli: trained", "pos, accuracy: others", "pos: trained"]
    results = [json.loads(line) for line in (checkpoints / "r.jsonl").read_text().splitlines()]
    english = [r["scores"]["accuracy"] for r in results if r["task"] == "pos" and r["language"] == "en"]
    assert table[3][7] == metrics.mean_sd(english[:2]) and table[3][4] == "-" and " ± " in table[3][7]
    assert all(r["n_train"] == 50 for r in results)
    losses = [json.loads(line) for line in (checkpoints / "losses.jsonl").read_text().splitlines()]
    entropy = {r["language"]: f"{r['unigram_entropy']:.2f}" for r in losses}
    assert f"| unigram entropy | {entropy['de']} | {entropy['en']} | {entropy['hi']} |" in text
    of_bart = [r["loss"] for r in losses if r["kind"] == "seq2seq"]
    assert table[3][3] == "-" and table[6][3] == f"{sum(of_bart) / 3:.3f}"  # an encoder's loss is of another objective
    assert float(table[2][1]) < float(table[3][1])  # the second stage adds to the first
    assert not (checkpoints / "OUT" / "pairs.png").exists()  # one pair only
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        command(report, "nowhere.jsonl", "--out", "OUT")
    (checkpoints / "bad.jsonl").write_text("{}\n[1]\n")
    with pytest.raises(InputError, match=r"bad\.jsonl:1: not a result of a task"):
        command(report, "bad.jsonl", "--out", "OUT")
    poor = {name: value for name, value in results[0].items() if name != "train_lang"}
    (checkpoints / "bad.jsonl").write_text(json.dumps(poor) + "\n")
    with pytest.raises(InputError, match=r"bad\.jsonl:1: not a result of a task"):
        command(report, "bad.jsonl", "--out", "OUT")
    strange = [r | {"checkpoint": "unfreeze-at-x.pt", "history": []} for r in losses if r["kind"] == "seq2seq"]
    (checkpoints / "strange.jsonl").write_text("".join(json.dumps(r) + "\n" for r in strange))
    command(report, "losses.jsonl", "strange.jsonl", "--out", "OUT")
    (checkpoints / "file").touch()
    for blocked in ("file", "file/OUT"):
        with pytest.raises(OSError, match=blocked):  # one line by run_command
            command(report, "losses.jsonl", "--out", blocked)


def result(row, unfreeze_at=0.0, pretrained=0, **more):
    """A line of results.jsonl of a second stage, or of bart-12e12d."""
    flops, settings = 1e9 * (2 - unfreeze_at), {"unfreeze_at": unfreeze_at, "seed": pretrained}
    history = [{"stage": "seq2seq", "flops": flops, "steps": 2, "settings": settings}]
    history = [{"stage": "encoder", "flops": 1e9, "steps": 2}] * (row != "bart-12e12d") + history
    return {"checkpoint": f"{row}.pt", "kind": "seq2seq", "history": history, "task": "loss", "language": "en"} | more


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(name)


@pytest.fixture
def losses(monkeypatch, tmp_path):
    """Of the model from scratch and of three points of a sweep, one of them from a second seed too."""
    monkeypatch.chdir(tmp_path)
    models = [("bart-12e12d", 0.0, 0, 2.0), ("2stage-bart-12e12d-unfrz", 0.5, 0, 9.0)]  # this one is made again below
    models += [("2stage-bart-12e12d-unfrz", 0.5, 0, 2.0), ("2stage-bart-12e12d", 1.0, 0, 4.0)]
    models += [("unfreeze-at-0", 0.0, 0, 1.5), ("2stage-bart-12e12d-unfrz", 0.5, 1, 7.0)]
    return [
        result(row, point, seed, language=language, loss=loss + more, checkpoint=f"{seed}/{row}.pt")
        for row, point, seed, loss in models
        for language, more in (("en", -1), ("de", 1))
    ]


def curve(text):
    """The lines of a report's table of the sweep."""
    return text[text.index("# When to unfreeze") :].splitlines()[2:]


@pytest.mark.parametrize(
    "more, complaint",
    [
        ({"n_train": 2000}, r"a\.jsonl:2: scratch in summ with n_train 2000, not 10 as before; keep"),
        ({"items": 20}, r"a\.jsonl:2: scratch in summ of de with items 20, not 9 as before; keep"),
        ({"language": "fr"}, r"bart-12e12d\.pt:0: not in summ of fr, as others are; score it in all"),
    ],
)
def test_a_report_does_not_compare_what_differs(command, checkpoints, more, complaint):
    one = result("bart-12e12d", task="summ", scores={"ROUGE-L": 1.0}, train_lang="en", n_train=10, items=9, seed=0)
    one |= {"language": "de"}
    path = write("a.jsonl", [one, {**one, "checkpoint": "scratch.pt", **more}])
    with pytest.raises(InputError, match=complaint):
        command(report, path, "--out", "OUT")


def test_a_checkpoint_that_was_trained_further_costs_what_it_did_in_the_end(command, checkpoints):
    short, long = (result("bart-12e12d", unfreeze_at=x, loss=y) for x, y in ((1.0, 4.0), (0.0, 3.0)))
    command(report, write("a.jsonl", [short, long]), "--out", "OUT")
    assert "| bart-12e12d | 2.00e+09 | - | 3.000 |" in Path("OUT/tables.md").read_text()


def test_a_checkpoint_is_one_whatever_the_way_to_it(command, checkpoints, losses):
    again = [{**row, "checkpoint": str(Path(row["checkpoint"]).resolve())} for row in losses[:2]]
    command(report, write("a.jsonl", losses + again), "--out", "OUT")
    assert "| bart-12e12d | 2.00e+09 | - | 2.000 |" in Path("OUT/tables.md").read_text()


def test_what_was_measured_last_tells_what_a_model_is(command, checkpoints):
    old, new = (result("bart-12e12d", unfreeze_at=x, loss=y) for x, y in ((1.0, 4.0), (0.0, 3.0)))
    parse = {name: value for name, value in old.items() if name != "loss"}
    parse |= dict(task="parse", train_lang="en", seed=0, scores={"exact match": 9.0})
    command(report, write("a.jsonl", [old, parse, new]), "--out", "OUT")  # trained further; the loss measured again
    assert "| bart-12e12d | 2.00e+09 | - | 3.000 |" in Path("OUT/tables.md").read_text()


def test_two_seeds_under_one_name_are_two_runs(command, checkpoints):
    rows = [result("bart-12e12d", pretrained=seed, loss=loss) for seed, loss in ((0, 2.0), (1, 4.0))]
    command(report, write("a.jsonl", rows), "--out", "OUT")
    assert "| bart-12e12d | 2.00e+09 | - | 3.000 ± 1.414 |" in Path("OUT/tables.md").read_text()


def test_report_of_runs_from_other_seeds_and_the_sweep(command, checkpoints, losses):
    encoder = result("roberta-12e", loss=1.0, kind="encoder", history=[{"stage": "encoder", "flops": 1e9, "steps": 2}])
    again = [result("bart-12e12d", language=x, loss=y) for x, y in (("en", 1.2), ("de", 3.2))]
    command(report, write("a.jsonl", losses), write("b.jsonl", [encoder, *again]), "--out", "OUT")
    text = Path("OUT/tables.md").read_text()
    assert "| bart-12e12d | 2.00e+09 | - | 2.100 ± 0.141 |" in text
    assert "| nats | de | en | mean |\n|---|---|---|---|\n| bart-12e12d | 3.10 ± 0.14 | 1.10 ± 0.14 | 2.10" in text
    assert "| 2stage-bart-12e12d | 5.00 | 3.00 | 4.00 |" in text
    assert curve(text)[2:] == [
        "| 0 | 1.500 | 3.00e+09 | 0.0% |",
        "| 0.5 | 2.000 | 2.50e+09 | 16.7% |",
        "| 1 | 4.000 | 2.00e+09 | 33.3% |",
    ]  # seed 1 has one point of them: no part of the curve
    assert "| 2stage-bart-12e12d-unfrz | 2.50e+09 | 16.7% | 4.500 ± 3.536 |" in text


def test_claims_are_compared_over_the_seeds_of_pre_training(losses):
    losses = [row for row in losses if "2stage-bart-12e12d.pt" not in row["checkpoint"]]
    again = [result("bart-12e12d", 0.0, 1, language=x, loss=y) for x, y in (("en", 1.2), ("de", 3.2))]
    parse = dict(task="parse", train_lang="en")
    rows = [("2stage-bart-12e12d-unfrz", 0, 50.0), ("2stage-bart-12e12d-unfrz", 1, 52.0)]
    rows += [("bart-12e12d", 0, 40.0), ("bart-12e12d", 0, 42.0)]  # two fine-tunings of one
    scores = [
        result(x, 0.5, seed, **parse, seed=i, scores={"exact match": y}, checkpoint=f"{seed}/{x}.pt")
        for i, (x, seed, y) in enumerate(rows)
    ]
    text = report.claims_table(report.read_results([write("a.jsonl", losses + again), write("b.jsonl", scores)]))
    assert text.splitlines()[2:] == [
        "| unfrozen part-way, does it match? | held-out loss | 4.500 ± 3.536 | 2.100 ± 0.141 | -1.0 | equal |",
        "|  | parse, trained | 51.0 ± 1.4 | 41.0 | +7.1 | better |",
    ]
    assert report.compared([1.0], [2.0], 1) == ("-", "one seed")


def test_pairs_are_compared_at_what_both_models_cost(losses, monkeypatch):
    stage = {"stage": "encoder", "flops": 8e9, "steps": 4}
    encoder = result("roberta-12e", loss=1.0, kind="encoder", history=[stage])
    drawn, draw = {}, Axes.plot
    keep = lambda self, x, y, style, label: drawn.update({label: (x, y)}) or draw(self, x, y, style, label=label)
    monkeypatch.setattr(Axes, "plot", keep)
    assert report.plot_pairs(report.read_results([write("a.jsonl", [*losses, encoder])]), Path("."))
    assert drawn["both from scratch"] == ([2e9 + 4e9], [2.0])  # 2 of the 4 updates of roberta-12e
    assert drawn["2stage-bart-12e12d"] == ([2e9], [4.0])


def test_generation_scores_of_the_sweep(command, checkpoints, losses):
    parse = dict(train_lang="en", task="parse")
    rows = [("2stage-bart-12e12d-unfrz", 0.5, 20.0), ("2stage-bart-12e12d-unfrz", 0.5, 22.0), ("bart-12e12d", 0.0, 9.0)]
    rows += [("unfreeze-at-0.25", 0.25, 1.0)]  # without a loss: no point
    scores = [result(row, at, **parse, seed=i, scores={"exact match": x}) for i, (row, at, x) in enumerate(rows)]
    command(report, write("a.jsonl", losses), write("c.jsonl", scores), "--out", "OUT")
    lines = curve(Path("OUT/tables.md").read_text())
    assert lines[0] == "| `--unfreeze-at` | held-out loss, nats | parse, exact match: trained | FLOPs | pair saved |"
    assert lines[2:4] == ["| 0 | 1.500 | - | 3.00e+09 | - |", "| 0.5 | 2.000 | 21.00 ± 1.41 | 2.50e+09 | - |"]
    assert lines[4:] == ["| 1 | 4.000 | - | 2.00e+09 | - |"]


def test_report_of_models_that_cost_nothing(command, checkpoints, losses):
    for row in losses:
        for stage in row["history"]:
            stage["flops"] = 0.0
    encoder = result("roberta-12e", loss=1.0, kind="encoder", history=[{"stage": "encoder", "flops": 0.0, "steps": 2}])
    command(report, write("a.jsonl", [*losses, encoder]), "--out", "OUT")
    assert "| 2stage-bart-12e12d | 0.00e+00 | - | 4.000 |" in Path("OUT/tables.md").read_text()


def test_report_without_matplotlib(command, checkpoints, folder, capsys, monkeypatch):
    command(evaluation, "enc.pt", "--task", "nli", "--data", folder / "nli", "--epochs", 1, "--out", "r.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command(report, "r.jsonl", "--out", "OUT")
    assert "for the figure: pip install matplotlib" in capsys.readouterr().out
    assert [path.name for path in Path("OUT").iterdir()] == ["tables.md"]
