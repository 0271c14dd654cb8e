"""Time to quality: seconds and tokens to a held-out loss, beside the models of transformers that one would pick.

    python benchmarks/quality.py DATA --out RUNS                   # everything; stopped at any point, it continues
    python benchmarks/quality.py DATA --out RUNS --only mlm        # or: mask, sentinel
    python benchmarks/quality.py DATA --out RUNS --report          # the table and the figure, of what is there

DATA is a folder of data.py. All models have the shape of the preset, read the same rows in the same order and are
scored on the same held-out rows with the same noise. Theirs train by AdamW with warm-up and linear decay, at each of
the rates that are tried; ours by the commands of the README with their defaults. Seconds are those of the updates.
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

import trainer  # noqa: E402
from cli import InputError, append_json, run_command  # noqa: E402
from config import PRESETS  # noqa: E402
from data import TokenData  # noqa: E402
from log import read_metrics  # noqa: E402
from objectives import NOISE, sample_rng  # noqa: E402
from tokenizer import SpecialIds  # noqa: E402
from train_encoder import SCORED, MLMConfig, encoder_objective  # noqa: E402
from train_seq2seq import DenoiseConfig, seq2seq_objective  # noqa: E402


@dataclass(frozen=True)
class Peer:
    """A model of transformers, and how it is customarily trained."""

    task: str  # mlm; or the noise of a seq2seq model: mask (BART's), sentinel (T5's)
    model: str
    rates: tuple[float, ...]  # of AdamW; the best one counts
    mask_prob: float = 0.15  # of its training; all are scored at 15 %
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    more: dict = field(default_factory=dict)  # settings of the model


PEERS = {
    "RoBERTa": Peer("mlm", "Roberta", (3e-4, 1e-3)),  # Liu et al. 2019
    "ModernBERT": Peer(  # Warner et al. 2024: 30 % masks, logits of the masked positions only
        "mlm", "ModernBert", (1e-3, 3e-3), mask_prob=0.3, weight_decay=1e-5, more={"sparse_prediction": True}
    ),
    "BART (Blenderbot)": Peer("mask", "Blenderbot", (3e-4, 1e-3)),  # Lewis et al. 2020, here Pre-LN
    "T5": Peer("sentinel", "T5", (1e-3, 3e-3), weight_decay=0.0),  # v1.1; Raffel et al. 2020
}


def peer_model(peer: Peer, preset: dict, vocab_size: int, length: int) -> nn.Module:
    """The peer in the shape of our preset; gated feed-forward layers have two thirds of the width: equal weights."""
    d, heads, ff, layers = (preset[x] for x in ("d_model", "n_heads", "d_ff", "n_encoder_layers"))
    ids = dict(pad_token_id=SpecialIds.pad, bos_token_id=SpecialIds.bos, eos_token_id=SpecialIds.eos)
    encoder = dict(hidden_size=d, num_attention_heads=heads, num_hidden_layers=layers, vocab_size=vocab_size, **ids)
    both = {f"{part}_{name}": n for part in ("encoder", "decoder")
            for name, n in (("layers", layers), ("attention_heads", heads), ("ffn_dim", ff))}  # fmt: skip
    shapes = {
        "Roberta": encoder | dict(intermediate_size=ff, max_position_embeddings=length + 1),
        "ModernBert": encoder | dict(intermediate_size=ff * 2 // 3, max_position_embeddings=length)
        | dict(cls_token_id=SpecialIds.bos, sep_token_id=SpecialIds.eos),
        "Blenderbot": dict(d_model=d, vocab_size=vocab_size, max_position_embeddings=length, **both, **ids),
        "T5": dict(d_model=d, d_kv=d // heads, d_ff=ff * 2 // 3, num_layers=layers, num_heads=heads, **ids)
        | dict(vocab_size=vocab_size, feed_forward_proj="gated-gelu", decoder_start_token_id=SpecialIds.bos),
    }  # fmt: skip
    config = getattr(transformers, f"{peer.model}Config")(**shapes[peer.model], **peer.more)
    kind = "MaskedLM" if peer.task == "mlm" else "ConditionalGeneration"
    return getattr(transformers, f"{peer.model}For{kind}")(config)


def objective_of(task: str, ids: SpecialIds, mask_prob: float) -> trainer.Objective:
    """Our noise, which all train with."""
    if task == "mlm":
        return encoder_objective(ids, MLMConfig(mask_prob=mask_prob))
    return seq2seq_objective(ids, DenoiseConfig(noise=task))


def peer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss over the targets, as the model itself computes it."""
    names = {"src": "input_ids", "src_mask": "attention_mask", "labels": "labels"}
    names |= {"tgt_in": "decoder_input_ids", "tgt_out": "labels"}
    return model(**{names[name]: x for name, x in batch.items() if name in names}).loss


@torch.no_grad()
def peer_held_out(model: nn.Module, data: TokenData, objective: trainer.Objective) -> float:
    """The mean over the languages of the loss on 64 held-out rows: what trainer.held_out_loss gives for ours."""
    model.eval()
    means = []
    for language in data.languages:
        examples, total = trainer.valid_examples(data, language, objective, at_most=64), 0.0
        for rows in (examples[i : i + 32] for i in range(0, len(examples), 32)):
            total += peer_loss(model, trainer.collate(rows, data.ids.pad)).item() * trainer.n_targets(rows)
        means.append(total / trainer.n_targets(examples))
    return statistics.mean(means)


def train_peer(peer: Peer, rate: float, data: TokenData, args: argparse.Namespace, folder: Path) -> None:
    """Trains a peer, or goes on from its last checkpoint; its metrics.jsonl is like that of our trainer."""
    torch.manual_seed(0)
    model = peer_model(peer, PRESETS[args.preset], data.ids.vocab_size, args.seq_len).to(trainer.device())
    matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == x] for x in (True, False))
    groups = [{"params": matrices, "weight_decay": peer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, rate, peer.betas, eps=1e-6, fused=True)
    steps, rise, done = args.steps, max(1, args.steps // 50), 0
    objective = objective_of(peer.task, data.ids, peer.mask_prob)
    scored = objective_of(peer.task, data.ids, SCORED.mask_prob)
    saved, log = folder / "saved.pt", folder / "metrics.jsonl"
    if saved.exists():
        state = torch.load(saved)
        done = state["done"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(done, steps):
        if step == 0:
            append_json(log, {"step": 0, "mean": peer_held_out(model, data, scored)})
        model.train()
        began, first = time.perf_counter(), step * args.batch_size
        rows = [objective(data.row(i), sample_rng(0, NOISE, i)) for i in range(first, first + args.batch_size)]
        with trainer.autocast("bf16"):
            loss = peer_loss(model, trainer.collate(rows, data.ids.pad))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / rise, (steps - step) / (steps - rise))
        optimizer.step()
        optimizer.zero_grad()
        speed = args.batch_size * args.seq_len / (time.perf_counter() - began)
        if step % 10 == 0:  # as ours
            append_json(log, {"step": step, "loss": loss.item(), "tokens_per_second": speed})
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            append_json(log, {"step": step + 1, "mean": peer_held_out(model, data, scored)})
            torch.save({"done": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)


def train_ours(task: str, steps: int, args: argparse.Namespace, out: Path) -> None:
    """The command of the README, with the defaults of everything but data and size."""
    script = ["train_encoder.py"] if task == "mlm" else ["train_seq2seq.py", "--noise", task]
    flags = dict(data=args.data, preset=args.preset, seq_len=args.seq_len, batch_size=args.batch_size, steps=steps)
    flags |= dict(eval_every=max(1, steps // 20), out=out)
    line = [x for name, value in flags.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    subprocess.run([sys.executable, str(ROOT / script[0]), *script[1:], *line, "--resume"], check=True)


def curve(log: Path, tokens: int) -> list[tuple[int, float, float]]:
    """(tokens, seconds, held-out loss) of a run, `tokens` an update; seconds at the median speed of its updates."""
    rows = read_metrics(log) if log.exists() else []
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    held_out = {row["step"] * tokens: row["mean"] for row in rows if "mean" in row}
    return [(n, n / statistics.median(speeds), loss) for n, loss in sorted(held_out.items())] if speeds else []


def reached(points: list[tuple[int, float, float]], loss: float) -> tuple[float, float] | None:
    """Tokens and seconds at which a curve first is at a loss, between two points by a straight line; None if never."""
    for before, after in zip(points, points[1:]):
        if after[2] <= loss < before[2]:
            share = (before[2] - loss) / (before[2] - after[2])
            return tuple(a + share * (b - a) for a, b in zip(before[:2], after[:2]))
    return None


def report(args: argparse.Namespace) -> None:
    """Prints seconds and tokens to the loss that each peer ends at, beside ours, and draws all curves."""
    tokens = args.batch_size * args.seq_len
    curves = {log.parent.name: curve(log, tokens) for log in sorted(args.out.glob("*/metrics.jsonl"))}
    if not curves:
        raise InputError(f"{args.out}: no runs in it; leave out --report to train them")
    print(f"{'run':34} {'loss':>6} {'tokens':>11} {'seconds':>8}  ours to this loss: tokens, seconds; fewer by")
    for name, points in curves.items():
        line = f"{name:34} {points[-1][2]:6.3f} {points[-1][0]:11,} {points[-1][1]:8,.0f}" if points else f"{name:34} -"
        ours = [x for other, x in curves.items() if other.startswith(f"{name.split(',')[0]}, ours")]
        if points and "ours" not in name and (found := [y for x in ours if (y := reached(x, points[-1][2]))]):
            n, seconds = min(found, key=lambda x: x[1])
            line += f"  {n:11,.0f} {seconds:8,.0f}; {points[-1][0] / n:.1f} x, {points[-1][1] / seconds:.1f} x"
        print(line)
    from matplotlib.figure import Figure

    tasks = sorted({name.split(",")[0] for name in curves})
    figure = Figure(figsize=(11, 4 * len(tasks)), layout="constrained")
    for panels, task in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks):
        for axes, k, unit in zip(panels, (0, 1), ("tokens", "seconds of training")):
            for name, points in curves.items():
                if name.startswith(f"{task},") and points:
                    style = "-" if "ours" in name else "--"
                    axes.plot([x[k] for x in points], [x[2] for x in points], style, label=name.split(", ", 1)[1])
            axes.set(xlabel=unit, ylabel=f"held-out loss, nats ({task})", xscale="linear" if k == 0 else "log")
        panels[0].legend(fontsize="small")
    figure.savefig(args.out / "quality.png", dpi=120)


def train(args: argparse.Namespace) -> None:
    """All runs that are not done yet."""
    trainer.keep_memory()
    data = TokenData(args.data, args.seq_len)
    for task in [args.only] if args.only else ["mlm", "mask", "sentinel"]:
        args.out.mkdir(parents=True, exist_ok=True)
        for steps in (args.steps // 8, args.steps):  # a short schedule reaches an early loss sooner
            train_ours(task, steps, args, args.out / f"{task}, ours, {steps} updates.pt")
        for name, peer in PEERS.items():
            for rate in peer.rates if peer.task == task else ():
                folder = args.out / f"{task}, {name}, {rate:g}.run"
                folder.mkdir(exist_ok=True)
                train_peer(peer, rate, data, args, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, help="data folder written by data.py")
    add("--out", type=Path, required=True, help="folder for the runs")
    add("--only", choices=("mlm", "mask", "sentinel"), help="one task (default: all)")
    add("--preset", choices=PRESETS, default="tiny", help="shape of all models (default %(default)s)")
    add("--steps", type=int, default=2000, help="updates (default %(default)s, 8M tokens)")
    add("--batch-size", type=int, default=32, help="rows per update (default %(default)s)")
    add("--seq-len", type=int, default=128, help="tokens per row (default %(default)s)")
    add("--eval-every", type=int, default=250, help="updates between held-out losses of theirs (default %(default)s)")
    add("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.report:
        train(args)
    report(args)


if __name__ == "__main__":
    run_command(main)
