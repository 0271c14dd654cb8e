"""The paper's claims and its two tables, the sweep of --unfreeze-at and a figure, from the results of eval.py.

python recipes/report.py runs/mini/results.jsonl --out REPORT    # one or more files

A model is known by its checkpoint's file name: results under one name in two files, or from two pre-training seeds,
are two runs of one model.
"""

import argparse
import json
import os
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import InputError, run_command
from compute import saved
from metrics import GENERATION, METRICS, mean_sd
from task_data import lines

ROWS = ["roberta-12e", "bart-12e12d", "bart-12e12d-mask", "bart-12e2d", "bart-12e2d-mask", "bart-12e1d-mask"]
ROWS += [f"{row}+mlm" for row in ROWS[1:]]
ROWS += ["2stage-bart-12e12d", "2stage-bart-12e12d-attn-f", "2stage-bart-12e12d-unfrz"]
SWEEP = r"2stage-bart-12e12d(-unfrz)?|unfreeze-at-.*"  # rows that differ only in --unfreeze-at
CLAIMS = [  # what is asked, of which model, compared with which other, their kind. paper: yes to all but our first
    ("does pre-training help at all?", "roberta-12e", "random", "encoder"),
    ("an encoder taken out of a seq2seq model: worse than one of MLM?", "bart-12e12d", "roberta-12e", "encoder"),
    ("with a short MLM continuation: still worse?", "bart-12e12d+mlm", "roberta-12e", "encoder"),
    ("frozen throughout, does the second stage fall short?", "2stage-bart-12e12d", "bart-12e12d", "seq2seq"),
    ("unfrozen part-way, does it match?", "2stage-bart-12e12d-unfrz", "bart-12e12d", "seq2seq"),
]
HOW = ("train_lang", "n_train", "epochs", "batch_size", "freeze", "beams", "cut")  # a model was fine-tuned
NOTE = """Mean ± standard deviation over the runs; scores in percent, FLOPs of the whole history. `pair saved`: the
share of the FLOPs of `roberta-12e` and `bart-12e12d` that a history with both models saves. Updates with
other masks or noise cost more or less by themselves.
"""


def read_results(paths: list[Path]) -> list[dict]:
    """The losses and scores of JSON lines files, with what the tables need; of what was measured twice, the last.

    Prints how many results of earlier states of a checkpoint are left out. Raises InputError with the line for what is
    no result, and for results that cannot be compared.
    """
    found: dict[tuple, dict] = {}  # run, task and language -> result
    seen: dict[tuple, object] = {}  # what results of a task must have in common
    for path in paths:
        for number, line in lines(path):
            try:
                result = json.loads(line)
                history, task = result["history"], result["task"]
                # A model from elsewhere has no history, an extracted encoder's last stage no settings.
                settings = history[-1].get("settings", {}) if history else {}
                result["row"] = Path(result["checkpoint"]).stem
                result["model"] = f"{path}, seed {settings.get('seed')}: {os.path.abspath(result['checkpoint'])}"
                result["run"] = f"{result['model']}:{result.get('seed')}"
                result["flops"] = sum(stage["flops"] for stage in history)
                result |= {"unfreeze_at": settings.get("unfreeze_at"), "pretrained": settings.get("seed")}
                result["objective"] = settings.get("noise"), settings.get("n_decoder_layers")
                if task == "loss":  # table: the kind of the model, or that which the task is for
                    result |= {"main": result["loss"], "table": result["kind"], "group": "all"}
                else:
                    result["main"] = result["scores"][METRICS[task][0]]
                    result["table"] = "seq2seq" if task in GENERATION else "encoder"
                    result["group"] = "trained" if result["language"] == result["train_lang"] else "others"
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"{path}:{number}: not a result of a task of eval.py; remove the line") from None
            same = {(task, name): result.get(name) for name in HOW}
            same[f"{task} of {result['language']}", "items"] = result.get("items")
            for (what, name), value in same.items():
                if value is not None and (before := seen.setdefault((what, name), value)) != value:
                    odd = f"{result['row']} in {what} with {name} {value}, not {before} as before"
                    raise InputError(f"{path}:{number}: {odd}; keep what cannot be compared in a file of its own")
            key = result["run"], task, result["language"]
            found.pop(key, None)  # so that what is measured last comes last
            found[key] = result
    if not found:
        names = " ".join(map(str, paths))
        raise InputError(f"{names}: no results in it; eval.py CHECKPOINT --task pos ... --out {paths[0]} adds some")
    newest = {r["model"]: r["history"] for r in found.values()}
    results = [r for r in found.values() if r["history"] == newest[r["model"]]]
    if older := len(found) - len(results):
        print(f"{older} results left out: their checkpoints were trained further and measured again")
    refuse_unlike_languages(results)
    return results


def refuse_unlike_languages(results: list[dict]) -> None:
    """Raises InputError if a run lacks languages that others have: their means would not be comparable."""
    for table, task, group, run in dict.fromkeys((r["table"], r["task"], r["group"], r["run"]) for r in results):
        compared = select(results, table=table, task=task, group=group)
        if lacking := {r["language"] for r in compared} - {r["language"] for r in select(compared, run=run)}:
            remedy = "score it in all, or keep it in a file of its own"
            raise InputError(f"{run}: not in {task} of {' '.join(sorted(lacking))}, as others are; {remedy}")


def select(results: list[dict], **wanted: object) -> list[dict]:
    """The results whose fields have these values."""
    return [r for r in results if all(r[name] == value for name, value in wanted.items())]


def by_run(results: list[dict]) -> list[float]:
    """The mean over the languages of each run (of pre-training and fine-tuning)."""
    runs = dict.fromkeys(r["run"] for r in results)
    return [statistics.mean(r["main"] for r in select(results, run=run)) for run in runs]


def by_seed(results: list[dict]) -> list[float]:
    """The mean of each pre-training seed over languages and fine-tunings."""
    seeds = dict.fromkeys(r["pretrained"] for r in results)
    return [statistics.mean(by_run(select(results, pretrained=seed))) for seed in seeds]


def rows_of(results: list[dict]) -> list[str]:
    """The models among the results: the paper's in its order, then the others by name."""
    names = {r["row"] for r in results}
    return [name for name in ROWS if name in names] + sorted(names - set(ROWS))


def costs(results: list[dict], result: dict) -> list[str]:
    """The FLOPs of a result's history, and the share it saves if it has both models, against the two from scratch."""
    scratch = {r["row"]: r["flops"] for r in results if r["row"] in ("roberta-12e", "bart-12e12d")}
    share = saved(result["history"], sum(scratch.values()) if len(scratch) == 2 else 0.0)
    return [f"{result['flops']:.2e}", "-" if share is None else f"{share:.1%}"]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    first, *others = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *others]) + "\n"


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


def claims_table(results: list[dict]) -> str:
    """A line for each claim and measure: both models, and their difference in standard deviations over the seeds."""
    rows = []
    measures = [("loss", "all"), *((task, group) for task in METRICS for group in ("trained", "others"))]
    for claim, *names, kind in CLAIMS:
        question = claim
        for task, group in measures:
            pair = [by_seed(select(results, row=name, table=kind, task=task, group=group)) for name in names]
            if all(pair):
                measure, digits, sign = ("held-out loss", 3, -1) if task == "loss" else (f"{task}, {group}", 1, 1)
                rows.append([question, measure, *(mean_sd(x, digits) for x in pair), *compared(*pair, sign)])
                question = ""
    head = ["question", "measure", "model", "compared with", "difference in spreads", "it is"]
    return markdown(head, rows) if rows else ""


def task_table(results: list[dict], kind: str) -> str:
    """A line per model: cost, held-out loss, and for each task the mean of the other languages and the training one."""
    chosen, head, columns, rows = select(results, table=kind), [], [], []
    for task in METRICS:
        if select(chosen, task=task):
            head += [f"{task}, {METRICS[task][0]}: others", f"{task}: trained"]
            columns += [(task, "others"), (task, "trained")]
    for name in rows_of(chosen):
        model = select(chosen, row=name)
        loss = mean_sd(by_run(select(model, task="loss")), 3)
        scores = [mean_sd(by_run(select(model, task=task, group=group))) for task, group in columns]
        rows.append([name, *costs(results, model[0]), loss, *scores])
    return markdown(["model", "FLOPs", "pair saved", "held-out loss, nats", *head], rows)


def loss_table(results: list[dict], kind: str) -> str:
    """The held-out losses of each model of a kind in each language; "" if there is only one."""
    chosen = select(results, task="loss", table=kind)
    languages = sorted({r["language"] for r in chosen})
    if len(languages) < 2:
        return ""
    rows, entropy = [], {r["language"]: r.get("unigram_entropy") for r in chosen}
    if all(entropy.values()):
        values = (*(entropy[x] for x in languages), statistics.mean(entropy.values()))
        rows.append(["unigram entropy", *(f"{x:.2f}" for x in values)])
    for name in rows_of(chosen):
        model = select(chosen, row=name)
        groups = [*(select(model, language=language) for language in languages), model]
        rows.append([name, *(mean_sd(by_run(group)) for group in groups)])
    return markdown(["nats", *languages, "mean"], rows)


def sweep(results: list[dict]) -> list[dict]:
    """Those of second stages that differ only in the point of unfreezing, from pre-training seeds that all points have.

    Empty if there is only one point.
    """
    chosen = [r for r in select(results, table="seq2seq") if re.fullmatch(SWEEP, r["row"])]
    trained = {(r["unfreeze_at"], r["pretrained"]) for r in select(chosen, task="loss")}
    points, seeds = ({pair[k] for pair in trained} - {None} for k in (0, 1))
    whole = {seed for seed in seeds if all((point, seed) in trained for point in points)}
    chosen = [r for r in chosen if r["unfreeze_at"] in points and r["pretrained"] in whole]
    return chosen if len(points) > 1 else []


def sweep_table(results: list[dict], swept: list[dict]) -> str:
    """A line per point of unfreezing: loss, generation scores in the training language, compute."""
    tasks, rows = [task for task in GENERATION if select(swept, task=task)], []
    for point in sorted({r["unfreeze_at"] for r in swept}):
        losses = select(swept, unfreeze_at=point, task="loss")
        scored = [select(swept, unfreeze_at=point, task=task, group="trained") for task in tasks]
        cells = [mean_sd(by_run(losses), 3), *(mean_sd(by_run(x)) for x in scored)]
        rows.append([f"{point:g}", *cells, *costs(results, losses[0])])
    head = ["`--unfreeze-at`", "held-out loss, nats", *(f"{task}, {METRICS[task][0]}: trained" for task in tasks)]
    return markdown([*head, "FLOPs", "pair saved"], rows)


def tables(results: list[dict]) -> str:
    """The results as Markdown: the paper's two tables, held-out losses by language, the sweep of --unfreeze-at."""
    table = claims_table(results)
    text = f"# Claims\n\n{table}\n" if table else ""
    for kind, title in (("encoder", "Encoder"), ("seq2seq", "Generation")):
        if select(results, table=kind):
            text += f"# {title} tasks\n\n{task_table(results, kind)}\n"
        if table := loss_table(results, kind):
            text += f"Held-out losses:\n\n{table}\n"
    text += NOTE
    if swept := sweep(results):
        seeds = " and ".join(map(str, sorted({r["pretrained"] for r in swept})))
        text += f"\n# When to unfreeze (pre-training seed {seeds}, or some of them)\n\n{sweep_table(results, swept)}"
    return text


def plot_pairs(results: list[dict], out: Path) -> bool:
    """Held-out loss of each seq2seq model against the FLOPs of the pair: two stages, and both models from scratch.

    A pair from scratch is a model without a first stage, and an encoder with as many updates, each at the cost of one
    of roberta-12e. Models of another noise or decoder than bart-12e12d's are left out: their losses mean something
    else. Returns whether there is anything to compare.
    """
    from matplotlib.figure import Figure  # pyplot would keep every figure it makes in memory

    encoders = [r["history"][-1] for r in select(results, row="roberta-12e") if r["flops"]]
    kinds = [r["objective"] for r in select(results, row="bart-12e12d", task="loss")]
    runs: dict[str, dict[float, list[dict]]] = {}  # model -> FLOPs -> results
    for r in select(results, task="loss", table="seq2seq"):
        if r["history"] and encoders and r["objective"] in kinds:
            alone = all(stage["stage"] == "seq2seq" for stage in r["history"])
            encoder = encoders[0]["flops"] / encoders[0]["steps"] * r["history"][-1]["steps"] if alone else 0.0
            name = "both from scratch" if alone else r["row"]
            runs.setdefault(name, {}).setdefault(r["flops"] + encoder, []).append(r)
    if len(runs) < 2:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(sorted(runs.items())):
        marker = "sDv"[i // 10 % 3]  # there are ten colours
        means = [statistics.mean(by_run(points[flops])) for flops in sorted(points)]
        axes.plot(sorted(points), means, "o--" if name == "both from scratch" else marker, label=name)
    axes.set(xlabel="FLOPs of the encoder and the seq2seq model", ylabel="held-out loss of the seq2seq model, nats")
    axes.legend(fontsize="small")
    figure.savefig(out / "pairs.png", dpi=120)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON lines files written by eval.py --out")
    parser.add_argument("--out", type=Path, default=Path("REPORT"), help="folder to write (default %(default)s)")
    args = parser.parse_args()
    results = read_results(args.results)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tables.md").write_text(tables(results), "utf-8")
    try:
        figure = plot_pairs(results, args.out)
        print(f"{args.out}: tables.md{', pairs.png' * figure}")
    except ImportError:
        print(f"{args.out / 'tables.md'} written; for the figure: pip install matplotlib")


if __name__ == "__main__":
    run_command(main)
