"""From the results that eval.py collects to the paper's two tables, the curve of --unfreeze-at, and figures.

python eval.py runs/mini/results.jsonl --report OUT              # of one or more files

A model is known by its checkpoint's file name: results of two files of one name are two runs of one model.
"""

import json
import os
import statistics
from pathlib import Path

from cli import InputError
from compute import saved
from rows import lines
from tasks import GENERATION, METRICS, mean_sd
from trainer import read_metrics

ROWS = ["roberta-12e", "bart-12e12d", "bart-12e12d-mask", "bart-12e2d", "bart-12e2d-mask", "bart-12e1d-mask"]
ROWS += [f"{row}+mlm" for row in ROWS[1:]]
ROWS += ["2stage-bart-12e12d", "2stage-bart-12e12d-attn-f", "2stage-bart-12e12d-unfrz"]


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
                    name: row.get(name) for name in ("train_lang", "n_train", "epochs", "batch_size", "freeze", "beams")
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
    """Of each run (of pre-training and fine-tuning) the mean over the languages."""
    runs: dict[str, dict[str, float]] = {}
    for r in results:
        runs.setdefault(r["run"], {})[r["language"]] = r["main"]  # of a measurement made twice the last
    return [statistics.mean(x.values()) for x in runs.values()]


def over_runs(results: list[dict], digits: int = 2) -> str:
    """Mean and standard deviation over the runs, "-" where there is none."""
    return mean_sd(by_run(results), digits) if results else "-"


def in_order(names: set[str]) -> list[str]:
    """The rows of the paper as it has them, then the others by name."""
    return [name for name in ROWS if name in names] + sorted(names - set(ROWS))


def pair_saved(results: list[dict], of: dict) -> str:
    """The share of FLOPs that both models in a result's history take less than each from scratch."""
    scratch = {r["row"]: r["flops"] for r in results if r["row"] in ("roberta-12e", "bart-12e12d")}
    share = saved(of["history"], sum(scratch.values()) if len(scratch) == 2 else 0.0)
    return "-" if share is None else f"{share:.1%}"


def task_table(results: list[dict], kind: str, tasks: list[str]) -> str:
    """Markdown: a line a model; its cost and held-out loss; for each task the mean over the languages but the training
    one, and that one's.
    """
    mine = [r for r in results if r["task"] in tasks or (r["task"] == "loss" and r["kind"] == kind)]
    seen = [task for task in tasks if any(r["task"] == task for r in mine)]
    head = [f"{task}, {METRICS[task][0]}: others | {task}: trained" for task in seen]
    head = ["model", "FLOPs", "pair saved", "held-out loss, nats", *head]
    out = [f"| {' | '.join(head)} |", "|---" * (4 + 2 * len(seen)) + "|"]
    for name in in_order({r["row"] for r in mine}):
        of = [r for r in mine if r["row"] == name]
        loss = over_runs([r for r in of if r["task"] == "loss"], 3)
        cells = [name, f"{of[0]['flops']:.2e}", pair_saved(results, of[0]), loss]
        for task in seen:
            for others in (True, False):
                cells.append(
                    over_runs([r for r in of if r["task"] == task and (r["language"] != r["train_lang"]) == others])
                )
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def loss_table(results: list[dict], kind: str) -> str:
    """Markdown: the held-out losses of each model of a kind in each language; "" where there is one language."""
    mine = [r for r in results if r["task"] == "loss" and r["kind"] == kind]
    languages = sorted({r["language"] for r in mine})
    if len(languages) < 2:
        return ""
    out = [f"| nats | {' | '.join(languages)} | mean |", "|---" * (2 + len(languages)) + "|"]
    entropy = {r["language"]: r.get("unigram_entropy") for r in mine}
    if all(entropy.values()):
        cells = [f"{x:.2f}" for x in (*(entropy[x] for x in languages), statistics.mean(entropy.values()))]
        out.append(f"| unigram entropy | {' | '.join(cells)} |")
    for name in in_order({r["row"] for r in mine}):
        of = [r for r in mine if r["row"] == name]
        cells = [over_runs([r for r in of if r["language"] == language]) for language in languages]
        out.append(f"| {' | '.join([name, *cells, over_runs(of)])} |")
    return "\n".join(out) + "\n"


SWEEP = ("2stage-bart-12e12d", "2stage-bart-12e12d-unfrz", "unfreeze-at-")  # rows that differ in --unfreeze-at alone


def sweep(results: list[dict]) -> dict[float, dict[str, list[dict]]]:
    """Losses and generation scores of the second stages that differ in the point of unfreezing alone: point -> task ->
    results; of the seeds of pre-training that every point has.
    """
    rows, seeds = [], {}
    for r in results:
        if r["task"] in ("loss", *GENERATION) and (r["row"] in SWEEP or r["row"].startswith(SWEEP[-1])):
            if not {"unfreeze_at", "seed"} <= r["settings"].keys():
                continue  # of that name, but none of our training scripts'
            at, seed = r["settings"]["unfreeze_at"], r["settings"]["seed"]
            rows.append((at, seed, r))
            if r["task"] == "loss":
                seeds.setdefault(at, set()).add(seed)
    shared = set.intersection(*seeds.values()) if seeds else set()
    points: dict[float, dict[str, list[dict]]] = {at: {} for at in sorted(seeds) if shared}
    for at, seed, r in rows:
        if at in points and seed in shared:
            points[at].setdefault(r["task"], []).append(r)
    return points


def seeds_of(points: dict[float, dict[str, list[dict]]]) -> set[int]:
    """The seeds of pre-training that a sweep is of."""
    return {r["settings"]["seed"] for by_task in points.values() for r in by_task["loss"]}


def from_scratch(results: list[dict], points: dict[float, dict[str, list[dict]]], task: str) -> list[dict]:
    """Results in a task of the model that a sweep is compared with, of the sweep's own seeds of pre-training."""
    rows = [r for r in results if r["row"] == "bart-12e12d" and r["kind"] == "seq2seq" and r["task"] == task]
    return [r for r in rows if r["settings"].get("seed") in seeds_of(points)]


def sweep_table(results: list[dict], points: dict[float, dict[str, list[dict]]]) -> str:
    """Markdown: a line a point of unfreezing: loss, generation scores, compute."""
    tasks = [task for task in GENERATION if any(task in by_task for by_task in points.values())]
    head = ["`--unfreeze-at`", "held-out loss, nats", *(f"{task}, {METRICS[task][0]}" for task in tasks)]
    head += ["FLOPs", "pair saved"]
    out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for at, by_task in points.items():
        scores = [over_runs(by_task.get(task, [])) for task in tasks]
        one = by_task["loss"][0]
        cells = [f"{at:g}", over_runs(by_task["loss"], 3), *scores, f"{one['flops']:.2e}", pair_saved(results, one)]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def tables(results: list[dict]) -> str:
    """Markdown: the paper's two tables, held-out losses by language, the sweep of --unfreeze-at; of what is there."""
    text = ""
    for kind, names in (("encoder", [task for task in METRICS if task not in GENERATION]), ("seq2seq", [*GENERATION])):
        if any(r["task"] in names or (r["task"] == "loss" and r["kind"] == kind) for r in results):
            title = "Encoder" if kind == "encoder" else "Generation"
            text += f"# {title} tasks\n\n{task_table(results, kind, names)}\n"
        if table := loss_table(results, kind):
            text += f"Held-out losses:\n\n{table}\n"
    text += "Mean ± standard deviation over the runs; scores in percent, FLOPs of the whole history. `pair saved`: of "
    text += "the\nFLOPs of `roberta-12e` and `bart-12e12d`, where a history has both models in it.\n"
    if len(points := sweep(results)) > 1:
        seeds = " and ".join(map(str, sorted(seeds_of(points))))
        text += f"\n# When to unfreeze (seed {seeds} of pre-training)\n\n{sweep_table(results, points)}"
    return text


def report(paths: list[Path], out: Path) -> None:
    """Writes tables.md and, where matplotlib is installed, figures, in place of those of an earlier report.

    Raises InputError where it cannot.
    """
    results = read_results(paths)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "tables.md").write_text(tables(results), "utf-8")
        figures = [plot_scores(results, out), plot_losses(results, out), plot_sweep(results, out)]
        print(f"{out}: {', '.join(['tables.md', *filter(None, figures)])}")
    except ImportError:
        print(f"{out / 'tables.md'} written; for figures: pip install matplotlib")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); name another --report") from None


def plot_scores(results: list[dict], out: Path) -> str:
    """A point for each task and model: score against compute. The name of the figure, "" without scores."""
    from matplotlib.figure import Figure  # pyplot would keep every figure it makes in memory

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for task in dict.fromkeys(r["task"] for r in results if r["task"] != "loss"):
        points: dict[str, list[dict]] = {}
        for r in results:
            if r["task"] == task:
                points.setdefault(r["row"], []).append(r)
        axes.scatter(
            [x[0]["flops"] for x in points.values()],
            [statistics.mean(by_run(x)) for x in points.values()],
            label=f"{task}, {METRICS[task][0]}",
        )
    axes.set(xlabel="FLOPs of the whole history", ylabel="mean over languages and seeds, %")
    if not axes.collections:
        return ""
    axes.legend()
    figure.savefig(out / "score-against-compute.png", dpi=120)
    return "score-against-compute.png"


def curves(results: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Kind of model -> run -> its held-out losses, of every run whose folder is where the results say.

    A run that is not in the folder of the first result has its own folder's name before its own.
    """
    found: dict[str, dict[str, list[dict]]] = {}
    first = results[0]["path"].parent
    for r in results:
        run = os.path.relpath(r["path"].parent / Path(r["checkpoint"]).with_suffix(""), first)
        log = first / f"{run}.run" / "metrics.jsonl"
        if log.exists() and (held_out := [row for row in read_metrics(log) if "mean" in row]):
            found.setdefault(r["kind"], {})[run.removeprefix("../")] = held_out
    return found


def plot_losses(results: list[dict], out: Path) -> str:
    """A panel of curves for each kind of model, since their losses are of other objectives. The name of the figure, ""
    where there is none.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    by_kind = curves(results)
    if not by_kind:
        return ""
    figure = Figure(figsize=(7 * len(by_kind), 4), layout="constrained")
    panels = figure.subplots(1, len(by_kind), squeeze=False)
    for axes, (kind, runs) in zip(panels[0], sorted(by_kind.items())):
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        for name, held_out in runs.items():
            axes.plot([x["step"] for x in held_out], [x["mean"] for x in held_out], ".-", label=name)
        axes.set(xlabel="updates", ylabel="held-out loss, nats", title=kind)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(out / "loss-curves.png", dpi=120)
    return "loss-curves.png"


def plot_sweep(results: list[dict], out: Path) -> str:
    """Held-out loss, generation scores and compute against the point of unfreezing, with the standard deviation over
    the runs. Its name, "" for less than two points.
    """
    from matplotlib.figure import Figure

    if len(points := sweep(results)) < 2:
        return ""

    def mean_and_sd(of: list[dict]) -> tuple[float, float]:
        runs = by_run(of)
        return statistics.mean(runs), statistics.stdev(runs) if len(runs) > 1 else 0.0

    tasks = ["loss", *(task for task in GENERATION if any(task in by_task for by_task in points.values()))]
    figure = Figure(figsize=(5.5 * len(tasks), 4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)
    for axes, task in zip(panels[0], tasks):
        means = {at: mean_and_sd(by_task[task]) for at, by_task in points.items() if task in by_task}
        axes.errorbar(list(means), *zip(*means.values()), fmt="o-", capsize=3, label="two stages")
        if scratch := from_scratch(results, points, task):
            mean, sd = mean_and_sd(scratch)
            axes.axhline(mean, linestyle="--", label="from scratch")
            axes.axhspan(mean - sd, mean + sd, alpha=0.2)
        label = "held-out loss, nats" if task == "loss" else f"{task}, {METRICS[task][0]}, %"
        axes.set(xlabel="--unfreeze-at", ylabel=label)
        if task == "loss":
            axes.legend(loc="upper center")
    right = panels[0][0].twinx()
    right.plot(list(points), [by_task["loss"][0]["flops"] for by_task in points.values()], "s:", color="gray")
    right.set_ylabel("FLOPs of both stages (dotted)")
    figure.savefig(out / "unfreeze-at.png", dpi=120)
    return "unfreeze-at.png"
