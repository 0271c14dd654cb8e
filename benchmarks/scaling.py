"""One process against two, and what 8 and 64 GPUs would hold and send.

    python benchmarks/scaling.py          weak scaling on this machine: as many rows a process, one process and two
    python benchmarks/scaling.py --plan   memory and bytes of the `paper` preset by formula

Weak scaling is measured on runs of train_seq2seq.py of one thread a process, interleaved, medians over the updates.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import unittest.mock
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import trainer  # noqa: E402
from compute import train_flops  # noqa: E402
from config import PRESETS, SAMPLE, open_data  # noqa: E402
from data import SAMPLE_OPTIONS  # noqa: E402
from model import ModelConfig, Seq2Seq  # noqa: E402

ROWS, STEPS = 16, 24  # rows a process and update; updates, of which the first 4 are not counted


def bytes_sent(model: nn.Module, world: int, parallel: str, micro_batches: int = 1, item: int = 2) -> float:
    """Bytes that each process sends in an update, and receives: rings, in which a tensor of n bytes passes
    (world - 1) / world * n for a gather or a scatter, and twice that for an all-reduce.

    DDP all-reduces the gradients that there are, in fp32. For every micro-batch FSDP2 gathers each block (`item` bytes
    a weight) for its forward and again for its backward, and the rest, with the embedding, once in fp32; it scatters
    the fp32 sums of the gradients once.
    """
    total = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for block in trainer.blocks(model) for p in block.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = (world - 1) / world
    if parallel == "ddp":
        return 2 * share * 4 * trained
    return share * (micro_batches * (2 * item * blocks + 4 * (total - blocks)) + 4 * trained)


def state_bytes(model: nn.Module, world: int, parallel: str) -> float:
    """Bytes of weights, gradients and AdamW's two moments on one GPU (fp32), and of what is gathered around them."""
    total = sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in trainer.blocks(model)]
    if parallel == "ddp":
        return 16 * total + 2 * total  # bf16 copies of the weights, which autocast keeps through forward and backward
    rest = total - sum(blocks)
    return 16 * total / world + (4 + 4) * rest + 2 * 2 * max(blocks)  # the rest stays whole; two blocks are at a time


def activation_bytes(cfg: ModelConfig) -> float:
    """Bytes that autograd keeps for each token of a row (source 85 %, target whole), counted on this CPU in bf16.

    With torch's attention, as on a GPU; the one written out for a CPU keeps the scores too.
    """
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not any(x.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in model.parameters()):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)  # so that no storage comes twice
        return x

    per_layer = []
    for layers in (1, 2):
        kept.clear()
        alive: list[Tensor] = []
        shape = {**PRESETS["paper"], "n_encoder_layers": layers, "n_decoder_layers": layers}
        model = Seq2Seq(ModelConfig(1000, max_len=512, **shape)).train()
        src, tgt = torch.full((1, 436), 200), torch.full((1, 512), 200)
        fused = unittest.mock.patch("model.plain_attention", F.scaled_dot_product_attention)
        kept_by = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with fused, kept_by, torch.autocast("cpu", torch.bfloat16):
            model(src=src, tgt_in=tgt, tgt_out=tgt)
        per_layer.append(sum(kept.values()) / 512)
    return per_layer[0] + (per_layer[1] - per_layer[0]) * (cfg.n_encoder_layers - 1)


def plan() -> None:
    """Prints memory and traffic for 8 and 64 GPUs at the paper's batch of 2,048 rows of 512 tokens."""
    cfg = ModelConfig(150_000, max_len=512, **PRESETS["paper"])
    with torch.device("meta"):
        model = Seq2Seq(cfg)
    flops = train_flops(cfg, 2048, 436, 512, 2048 * 512)
    print(f"paper preset, {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M weights, {flops:.3g} FLOPs an update")
    print(f"{activation_bytes(cfg) / 1e6:.2f} MB a token are kept for the backward pass")
    print("of each GPU, in an update:")
    print("GPUs  wrapper  rows  states, GB  sent, GB  sent while frozen, GB    FLOPs  FLOPs a byte sent")
    for world in (8, 64):
        for parallel in ("ddp", "fsdp"):
            rows = 2048 // world
            micro_batches = max(1, rows // 32)
            sent, states = bytes_sent(model, world, parallel, micro_batches), state_bytes(model, world, parallel)
            for part in (model.embed, model.encoder):
                part.requires_grad_(False)
            frozen = bytes_sent(model, world, parallel, micro_batches)
            model.requires_grad_(True)
            print(
                f"{world:4}  {parallel:7}  {rows:4}  {states / 1e9:10.1f}  {sent / 1e9:8.1f}  {frozen / 1e9:21.1f}"
                f"  {flops / world:.2g}  {flops / world / sent:17,.0f}"
            )


def tokens_per_second(world: int, parallel: str, folder: str) -> float:
    """Median of a run of STEPS updates, of all its processes together."""
    out = Path(folder) / "x.pt"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    line += [str(ROOT / "train_seq2seq.py"), "--out", str(out), "--parallel", parallel, "--dtype", "fp32"]
    line += ["--steps", str(STEPS), "--batch-size", str(ROWS * world), "--log-every", "1", "--eval-every", "1000"]
    subprocess.run(line, check=True, capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    log = out.with_suffix(".run") / "metrics.jsonl"
    speeds = [json.loads(text).get("tokens_per_second") for text in log.read_text().splitlines()]
    for path in (out, *out.with_suffix(".run").iterdir()):
        path.unlink()
    return statistics.median(speed for speed in speeds[4:] if speed)


def weak_scaling(rounds: int) -> None:
    """Prints tokens a second of one process and of two, under DDP and FSDP2."""
    open_data(SAMPLE, 128)  # made once, before anything is timed
    kinds = [(1, "ddp"), (2, "ddp"), (2, "fsdp")]
    seen: dict = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for kind in kinds:
                seen[kind].append(tokens_per_second(*kind, folder))
    model = Seq2Seq(ModelConfig(SAMPLE_OPTIONS["vocab_size"], max_len=128, **PRESETS["tiny"]))
    one = statistics.median(seen[kinds[0]])
    print(f"train_seq2seq.py, preset tiny, fp32, {ROWS} rows of 128 a process, one thread a process; {rounds} rounds")
    print("processes  wrapper  tokens/s  of twice one process  sent by each, an update")
    for kind in kinds:
        speed = statistics.median(seen[kind])
        sent = bytes_sent(model, *kind, item=4)  # of --dtype fp32
        print(f"{kind[0]:9}  {kind[1]:7}  {speed:8,.0f}  {speed / one / kind[0]:20.0%}  {sent / 1e6:20.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print the figures for 8 and 64 GPUs")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved measurements (default %(default)s)")
    args = parser.parse_args()
    if args.plan:
        plan()
    else:
        weak_scaling(args.rounds)


if __name__ == "__main__":
    main()
