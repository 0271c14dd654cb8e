"""The paper's claims and its two tables, the curve of --unfreeze-at, and figures, from the results of eval.py.

python recipes/report.py runs/mini/results.jsonl --out REPORT    # one or more files

A model is known by its checkpoint's file name: results under one name in two files are two runs of one model.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import InputError, run_command
from compute import saved
from task_data import lines
from tasks import GENERATION, METRICS, mean_sd

ROWS = ["roberta-12e", "bart-12e12d", "bart-12e12d-mask", "bart-12e2d", "bart-12e2d-mask", "bart-12e1d-mask"]
ROWS += [f"{row}+mlm" for row in ROWS[1:]]
ROWS += ["2stage-bart-12e12d", "2stage-bart-12e12d-attn-f", "2stage-bart-12e12d-unfrz"]
CLAIMS = [  # what is asked, of which model, compared with which other, their kind
    ("does pre-training help at all?", "roberta-12e", "random", "encoder"),
    ("an encoder taken out of a seq2seq model: worse than one of MLM?", "bart-12e12d", "roberta-12e", "encoder"),
    ("with a short MLM continuation: still worse?", "bart-12e12d+mlm", "roberta-12e", "encoder"),
    ("frozen throughout, does the second stage fall short?", "2stage-bart-12e12d", "bart-12e12d", "seq2seq"),
    ("unfrozen part-way, does it match?", "2stage-bart-12e12d-unfrz", "bart-12e12d", "seq2seq"),
]


def read_results(paths: list[Path]) -> list[dict]:
    """The losses and scores of JSON lines files. Raises InputError with the line."""
    results: list[dict] = []
    ways: dict[tuple[str, str], dict] = {}  # how a model was fine-tuned on a task
    for path in paths:
        for number, line in lines(path):
            try:
                row = json.loads(line)
                row["flops"] = sum(stage["flops"] for stage in row["history"])
                # A model from elsewhere has no history, an extracted encoder's last stage no settings.
                row["settings"] = dict(row["history"][-1].get("settings", {})) if row["history"] else {}
                row["row"] = Path(row["checkpoint"]).stem
                row["run"] = f"{path}:{os.path.abspath(row['checkpoint'])}:{row.get('seed')}"
                row["main"] = row["loss"] if row["task"] == "loss" else row["scores"][METRICS[row["task"]][0]]
                needed = ("language", "kind") + (() if row["task"] == "loss" else ("train_lang",))
                results.append(row | {"path": path} | {name: row[name] for name in needed})
                how = {
                    name: row.get(name)
                    for name in ("train_lang", "n_train", "epochs", "batch_size", "freeze", "beams", "cut")
                }
                before = ways.setdefault((row["row"], row["task"]), how)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"{path}:{number}: not a result of eval.py; remove the line") from None
            if odd := [f"{name} {how[name]}, not {before[name]}" for name in how if how[name] != before[name]]:
                what = f"{row['row']} in {row['task']} with {', '.join(odd)} as before"
                raise InputError(f"{path}:{number}: {what}; keep other ways of fine-tuning in a file of their own")
    if not results:
        names = " ".join(map(str, paths))
        raise InputError(f"{names}: no results in it; eval.py CHECKPOINT --task pos ... --out {paths[0]} adds some")
    return results


def by_run(results: list[dict]) -> list[float]:
    """The mean over the languages of each run (of pre-training and fine-tuning)."""
    runs: dict[str, dict[str, float]] = {}
    for r in results:
        runs.setdefault(r["run"], {})[r["language"]] = r["main"]  # the last one, if measured twice
    return [statistics.mean(x.values()) for x in runs.values()]


def over_runs(results: list[dict], digits: int = 2) -> str:
    """Mean and standard deviation over the runs, "-" if there are none."""
    return mean_sd(by_run(results), digits) if results else "-"


def in_order(names: set[str]) -> list[str]:
    """The rows of the paper in its order, then the others by name."""
    return [name for name in ROWS if name in names] + sorted(names - set(ROWS))


def pair_saved(results: list[dict], result: dict) -> str:
    """The share of FLOPs that the two models in a result's history save against the two from scratch."""
    scratch = {r["row"]: r["flops"] for r in results if r["row"] in ("roberta-12e", "bart-12e12d")}
    share = saved(result["history"], sum(scratch.values()) if len(scratch) == 2 else 0.0)
    return "-" if share is None else f"{share:.1%}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines_ = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines_[0], "|---" * len(head) + "|", *lines_[1:]]) + "\n"


def by_seed(results: list[dict]) -> list[float]:
    """The mean of each pre-training seed over languages and fine-tunings."""
    seeds: dict[int | None, list[dict]] = {}
    for r in results:
        seeds.setdefault(r["settings"].get("seed"), []).append(r)
    return [statistics.mean(by_run(x)) for x in seeds.values()]


def claims_table(results: list[dict]) -> str:
    """A line for each claim and measure: both models, and their difference in standard deviations over the seeds.

    paper: yes to all; the first question is ours.
    """
    rows = []
    for claim, row, other, kind in CLAIMS:
        for task in ("loss", *(x for x in METRICS if (x in GENERATION) == (kind == "seq2seq"))):
            for language in ("all",) if task == "loss" else ("trained", "others"):
                chosen = [r for r in results if r["task"] == task and (task != "loss" or r["kind"] == kind)]
                if language != "all":
                    chosen = [r for r in chosen if (r["language"] == r["train_lang"]) == (language == "trained")]
                pair = [by_seed([r for r in chosen if r["row"] == name]) for name in (row, other)]
                if all(pair):
                    measure = "held-out loss" if task == "loss" else f"{task}, {language}"
                    digits = 3 if task == "loss" else 1
                    cells = [mean_sd(x, digits) for x in pair]
                    said = any(claim == line[0] for line in rows)
                    rows.append(["" if said else claim, measure, *cells, *compared(*pair, -1 if task == "loss" else 1)])
    head = ["question", "measure", "model", "compared with", "difference in spreads", "it is"]
    return markdown(head, rows) if rows else ""


def compared(values: list[float], others: list[float], sign: int) -> tuple[str, str]:
    """How far apart the means over two sets of seeds are, in pooled standard deviations; and the verdict in a word.

    Differences of less than 2 are called equal. `sign` is 1 if more is better, else -1.
    """
    variances = [statistics.variance(x) for x in (values, others) if len(x) > 1]
    if not variances:
        return "-", "one seed"
    difference = sign * (statistics.mean(values) - statistics.mean(others))
    spreads = difference / max(1e-9, statistics.mean(variances) ** 0.5)
    return f"{spreads:+.1f}", "equal" if abs(spreads) < 2 else "better" if spreads > 0 else "worse"


def task_table(results: list[dict], kind: str, tasks: list[str]) -> str:
    """A line per model: cost, held-out loss, and for each task the mean of the other languages and the training one."""
    chosen = [r for r in results if r["task"] in tasks or (r["task"] == "loss" and r["kind"] == kind)]
    seen = [task for task in tasks if any(r["task"] == task for r in chosen)]
    columns = [(task, others) for task in seen for others in (True, False)]
    head = [f"{task}: trained" if not others else f"{task}, {METRICS[task][0]}: others" for task, others in columns]
    rows = []
    for name in in_order({r["row"] for r in chosen}):
        model = [r for r in chosen if r["row"] == name]
        cells = [name, f"{model[0]['flops']:.2e}", pair_saved(results, model[0])]
        cells.append(over_runs([r for r in model if r["task"] == "loss"], 3))
        for task, others in columns:
            scored = [r for r in model if r["task"] == task and (r["language"] != r["train_lang"]) == others]
            cells.append(over_runs(scored))
        rows.append(cells)
    return markdown(["model", "FLOPs", "pair saved", "held-out loss, nats", *head], rows)


def loss_table(results: list[dict], kind: str) -> str:
    """The held-out losses of each model of a kind in each language; "" if there is only one."""
    chosen = [r for r in results if r["task"] == "loss" and r["kind"] == kind]
    languages = sorted({r["language"] for r in chosen})
    if len(languages) < 2:
        return ""
    rows, entropy = [], {r["language"]: r.get("unigram_entropy") for r in chosen}
    if all(entropy.values()):
        values = (*(entropy[x] for x in languages), statistics.mean(entropy.values()))
        rows.append(["unigram entropy", *(f"{x:.2f}" for x in values)])
    for name in in_order({r["row"] for r in chosen}):
        model = [r for r in chosen if r["row"] == name]
        by_language = [over_runs([r for r in model if r["language"] == language]) for language in languages]
        rows.append([name, *by_language, over_runs(model)])
    return markdown(["nats", *languages, "mean"], rows)


SWEEP = ("2stage-bart-12e12d", "2stage-bart-12e12d-unfrz", "unfreeze-at-")  # rows that differ only in --unfreeze-at


def sweep(results: list[dict]) -> tuple[dict[float, dict[str, list[dict]]], set[int]]:
    """Second stages that differ only in the point of unfreezing: point -> task -> results; and the pre-training
    seeds that all points have. Results of other seeds are left out.
    """
    chosen = [r for r in results if r["row"] in SWEEP[:2] or r["row"].startswith(SWEEP[2])]
    chosen = [
        r for r in chosen if r["task"] in ("loss", *GENERATION) and {"unfreeze_at", "seed"} <= r["settings"].keys()
    ]
    trained = {(r["settings"]["unfreeze_at"], r["settings"]["seed"]) for r in chosen if r["task"] == "loss"}
    shares, seeds = ({pair[k] for pair in trained} for k in (0, 1))
    seeds = {seed for seed in seeds if all((share, seed) in trained for share in shares)}
    points: dict[float, dict[str, list[dict]]] = {share: {} for share in sorted(shares) if seeds}
    for r in chosen:
        if r["settings"]["unfreeze_at"] in points and r["settings"]["seed"] in seeds:
            points[r["settings"]["unfreeze_at"]].setdefault(r["task"], []).append(r)
    return points, seeds


def sweep_table(results: list[dict], points: dict[float, dict[str, list[dict]]]) -> str:
    """A line per point of unfreezing: loss, generation scores, compute."""
    tasks = [task for task in GENERATION if any(task in by_task for by_task in points.values())]
    head = ["`--unfreeze-at`", "held-out loss, nats", *(f"{task}, {METRICS[task][0]}" for task in tasks)]
    rows = []
    for share, by_task in points.items():
        scores, one = [over_runs(by_task.get(task, [])) for task in tasks], by_task["loss"][0]
        loss = over_runs(by_task["loss"], 3)
        rows.append([f"{share:g}", loss, *scores, f"{one['flops']:.2e}", pair_saved(results, one)])
    return markdown([*head, "FLOPs", "pair saved"], rows)


def tables(results: list[dict]) -> str:
    """The results as Markdown: the paper's two tables, held-out losses by language, the sweep of --unfreeze-at."""
    table = claims_table(results)
    text = f"# Claims\n\n{table}\n" if table else ""
    for kind, names in (("encoder", [task for task in METRICS if task not in GENERATION]), ("seq2seq", [*GENERATION])):
        if any(r["task"] in names or (r["task"] == "loss" and r["kind"] == kind) for r in results):
            title = "Encoder" if kind == "encoder" else "Generation"
            text += f"# {title} tasks\n\n{task_table(results, kind, names)}\n"
        if table := loss_table(results, kind):
            text += f"Held-out losses:\n\n{table}\n"
    text += "Mean ± standard deviation over the runs; scores in percent, FLOPs of the whole history. `pair saved`: the "
    text += "share\nof the FLOPs of `roberta-12e` and `bart-12e12d` that a history with both models saves.\n"
    points, seeds = sweep(results)
    if len(points) > 1:
        seeds = " and ".join(map(str, sorted(seeds)))
        text += f"\n# When to unfreeze (seed {seeds} of pre-training)\n\n{sweep_table(results, points)}"
    return text


def plot_pairs(results: list[dict], out: Path) -> str:
    """Held-out loss of each seq2seq model against the FLOPs of the pair: two stages, and both models from scratch.

    A pair from scratch is a model without a first stage, and an encoder with as many updates, each at the cost of one
    of roberta-12e. Returns the figure's name, or "" if there is nothing to compare.
    """
    from matplotlib.figure import Figure  # pyplot would keep every figure it makes in memory

    encoders = [r["history"][-1] for r in results if r["row"] == "roberta-12e" and r["history"]]
    runs: dict[str, dict[float, list[dict]]] = {}  # model -> FLOPs -> results
    for r in results:
        if r["task"] == "loss" and r["kind"] == "seq2seq" and r["history"] and encoders:
            alone = all(stage["stage"] == "seq2seq" for stage in r["history"])
            encoder = encoders[0]["flops"] / encoders[0]["steps"] * r["history"][-1]["steps"] if alone else 0.0
            name = "both from scratch" if alone else r["row"]
            runs.setdefault(name, {}).setdefault(r["flops"] + encoder, []).append(r)
    if len(runs) < 2:
        return ""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in sorted(runs.items()):
        means = [statistics.mean(by_run(points[flops])) for flops in sorted(points)]
        axes.plot(sorted(points), means, "o--" if name == "both from scratch" else "s", label=name)
    axes.set(xlabel="FLOPs of the encoder and the seq2seq model", ylabel="held-out loss of the seq2seq model, nats")
    axes.legend(fontsize="small")
    figure.savefig(out / "pairs.png", dpi=120)
    return "pairs.png"


def plot_sweep(results: list[dict], out: Path) -> str:
    """Plots loss and scores against the point of unfreezing, beside the model from scratch. Returns its file name."""
    from matplotlib.figure import Figure

    points, seeds = sweep(results)
    if len(points) < 2:
        return ""

    def mean_and_sd(chosen: list[dict]) -> tuple[float, float]:
        runs = by_run(chosen)
        return statistics.mean(runs), statistics.stdev(runs) if len(runs) > 1 else 0.0

    tasks = ["loss", *(task for task in GENERATION if any(task in by_task for by_task in points.values()))]
    figure = Figure(figsize=(5.5 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        means = {share: mean_and_sd(by_task[task]) for share, by_task in points.items() if task in by_task}
        axes.errorbar(list(means), *zip(*means.values()), fmt="o-", capsize=3, label="two stages")
        scratch = [r for r in results if r["row"] == "bart-12e12d" and r["task"] == task and r["kind"] == "seq2seq"]
        if scratch := [r for r in scratch if r["settings"].get("seed") in seeds]:
            mean, sd = mean_and_sd(scratch)
            axes.axhline(mean, linestyle="--", label="from scratch")
            axes.axhspan(mean - sd, mean + sd, alpha=0.2)
        label = "held-out loss, nats" if task == "loss" else f"{task}, {METRICS[task][0]}, %"
        axes.set(xlabel="--unfreeze-at", ylabel=label)
        axes.legend()
    figure.savefig(out / "unfreeze-at.png", dpi=120)
    return "unfreeze-at.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON lines files written by eval.py --out")
    parser.add_argument("--out", type=Path, default=Path("REPORT"), help="folder to write (default %(default)s)")
    args = parser.parse_args()
    results = read_results(args.results)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tables.md").write_text(tables(results), "utf-8")
    try:
        figures = [plot(results, args.out) for plot in (plot_pairs, plot_sweep)]
        print(f"{args.out}: {', '.join(['tables.md', *filter(None, figures)])}")
    except ImportError:
        print(f"{args.out / 'tables.md'} written; for figures: pip install matplotlib")


if __name__ == "__main__":
    run_command(main)
