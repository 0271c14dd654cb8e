"""This project beside what one would use instead, on this machine, in one run: tokens a second and peak memory.

    python benchmarks/throughput.py                     # all of it, about an hour on 2 cores
    python benchmarks/throughput.py --only mlm noise --rounds 3

Every contender is a process of its own that stays alive; they take turns (A B A B), a round being one or a few
updates of each. Printed are medians over the rounds, ratios of medians, and the peak of resident memory, libraries
included. An update is whole: forward, backward, clipping, AdamW. The models of transformers are exported from ours:
equal shapes, equal weights, the same batch. Saving, loading, the first update and memory against the vocabulary are
measured once. The share of the machine (MFU) is the ledger's FLOPs over the rate of a large product in the same
dtype, measured in the same run.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import trainer  # noqa: E402
from compute import batch_flops  # noqa: E402
from config import PRESETS, SAMPLE, open_data  # noqa: E402
from data import HEADER, SAMPLE_OPTIONS, SAMPLE_TEXT, TokenData, prepare, read_meta  # noqa: E402
from generate import generate  # noqa: E402
from hf import hf_model  # noqa: E402
from model import MaskedLM, ModelConfig, Seq2Seq  # noqa: E402
from objectives import mask_tokens, noise_row, sample_rng  # noqa: E402
from tokenizer import SpecialIds  # noqa: E402
from train_encoder import SCORED, encoder_objective  # noqa: E402
from train_seq2seq import DenoiseConfig, seq2seq_objective  # noqa: E402

# Contenders ---------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """PyTorch's own layers put together in the shortest way: nn.Transformer, one embedding, all logits."""

    def __init__(self, cfg: ModelConfig, seq2seq: bool):
        super().__init__()
        self.embed, self.positions = nn.Embedding(cfg.vocab_size, cfg.d_model), nn.Embedding(cfg.max_len, cfg.d_model)
        shape = dict(
            dim_feedforward=cfg.d_ff, dropout=cfg.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        layer = nn.TransformerEncoderLayer(cfg.d_model, cfg.n_heads, **shape)
        self.encoder = nn.TransformerEncoder(layer, cfg.n_encoder_layers, nn.LayerNorm(cfg.d_model), False)
        if seq2seq:
            layer = nn.TransformerDecoderLayer(cfg.d_model, cfg.n_heads, **shape)
            self.decoder = nn.TransformerDecoder(layer, cfg.n_decoder_layers, nn.LayerNorm(cfg.d_model))

    def forward(self, src: Tensor, labels: Tensor, tgt_in: Tensor | None = None) -> Tensor:
        def embedded(x: Tensor) -> Tensor:  # [B, T] -> [B, T, D]
            return self.embed(x) + self.positions.weight[: x.shape[1]]

        hidden = self.encoder(embedded(src))
        if tgt_in is not None:
            causal = nn.Transformer.generate_square_subsequent_mask(tgt_in.shape[1], device=src.device)
            hidden = self.decoder(embedded(tgt_in), hidden, tgt_mask=causal, tgt_is_causal=True)
        return F.cross_entropy(F.linear(hidden, self.embed.weight).flatten(0, 1), labels.flatten())


def model_config(o: dict) -> ModelConfig:
    shape = dict(PRESETS[o["preset"]])
    if o["task"] == "mlm":
        shape["n_decoder_layers"] = 0
    more = {"dropout": o["dropout"], "positions": o["positions"]}
    if o["task"] != "mlm" and o.get("who", "").startswith("transformers"):
        more["positions"] = "learned"  # it has no seq2seq model of our shape with rotary ones
    return ModelConfig(o["vocab"], max_len=max(512, o["length"]), **shape | more)


def objective_of(task: str, ids: SpecialIds) -> trainer.Objective:
    return encoder_objective(ids, SCORED) if task == "mlm" else seq2seq_objective(ids, DenoiseConfig())


def batch_of(o: dict) -> tuple[dict[str, Tensor], int]:
    """A batch of random rows noised by our objectives, and how many targets it has."""
    ids, rng = SpecialIds(o["vocab"]), np.random.default_rng(0)
    objective = objective_of(o["task"], ids)
    rows = rng.integers(ids.ordinary, o["vocab"], (o["rows"], o["length"]))
    examples = [objective(row, sample_rng(0, 0, i)) for i, row in enumerate(rows)]
    return trainer.collate(examples, ids.pad), trainer.n_targets(examples)


def contender(o: dict) -> Callable[[], None]:
    """One update of one contender."""
    torch.manual_seed(0)
    if o["who"] in ("ours", "transformers, memory kept"):
        trainer.keep_memory()
    cfg, seq2seq = model_config(o), o["task"] != "mlm"
    batch, n = batch_of(o)
    batch = {name: x.to(trainer.device()) for name, x in batch.items()}
    ours = (Seq2Seq if seq2seq else MaskedLM)(cfg)
    labels = batch["tgt_out" if seq2seq else "labels"]
    if o["who"] == "ours":
        model: nn.Module = ours
    elif o["who"] == "nn.Transformer":
        model = Plain(cfg, seq2seq)
    else:
        model = hf_model(ours)
    model.to(trainer.device())
    if o["compile"]:
        if o["who"] == "ours":
            trainer.compile_parts(model)
        else:
            model.compile()

    def loss() -> Tensor:
        if o["who"] == "ours":
            return model(**batch) / n
        if o["who"] == "nn.Transformer":
            return model(batch["src"], labels, batch.get("tgt_in"))
        more = {"decoder_input_ids": batch["tgt_in"]} if seq2seq else {}
        return model(input_ids=batch["src"], labels=labels, **more).loss

    model.train()
    if o["frozen"]:
        trainer.freeze_encoder(model, True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=True)

    def update() -> None:
        with trainer.autocast(o["dtype"]):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return update


@torch.no_grad()
def products(model: Seq2Seq, rows: int, source: int, new: int) -> None:
    """The matrix products, as our layers compute them, and the attention of generating `new` tokens for so many rows,
    and nothing else: what is left of the time if all the rest were free.
    """
    cfg, like = model.cfg, model.embed.weight

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=like.dtype, device=like.device)

    x, wide, head = some(rows, 1, cfg.d_model), some(rows, 1, cfg.d_ff), cfg.d_model // cfg.n_heads
    q, lengths = some(rows, cfg.n_heads, 1, head), (new, new, source, source)
    caches = [[some(rows, cfg.n_heads, n, head) for n in lengths] for _ in model.decoder.blocks]
    for t in range(1, new + 1):
        for block, (k, v, source_k, source_v) in zip(model.decoder.blocks, caches):
            for linear in (block.attn.q, block.attn.kv, block.attn.out, block.cross.q, block.cross.out, block.ffn[0]):
                linear(x)
            block.ffn[2](wide)
            F.scaled_dot_product_attention(q, k[:, :, :t], v[:, :, :t])
            F.scaled_dot_product_attention(q, source_k, source_v)
        model.embed.weight @ x[:, 0].T


def searcher(o: dict) -> Callable[[], None]:
    """Generation of `new` tokens for each row of a batch, by ours or by transformers; or only its products."""
    torch.manual_seed(0)
    cfg, ids = model_config(o), SpecialIds(o["vocab"])
    dtype = torch.bfloat16 if o["dtype"] == "bf16" else torch.float32
    ours = Seq2Seq(cfg).eval().to(trainer.device(), dtype)
    src = torch.randint(ids.ordinary, o["vocab"], (o["rows"], 64), device=trainer.device())
    if o["who"] == "products":
        trainer.keep_memory()
        return lambda: products(ours, o["rows"] * o["beams"], src.shape[1], o["new"])
    if o["who"] == "ours":  # an end that never comes: both make all tokens
        trainer.keep_memory()
        sys.modules[generate.__module__].EOS = -1
        return lambda: generate(ours, src, max_new=o["new"], beams=o["beams"])
    model = hf_model(ours).eval().to(trainer.device(), dtype)
    options = dict(max_new_tokens=o["new"], min_new_tokens=o["new"], num_beams=o["beams"], do_sample=False)
    options |= dict(decoder_start_token_id=ids.bos, early_stopping=False)
    mask = torch.ones_like(src)
    return lambda: model.generate(src, attention_mask=mask, **options)


def work(o: dict) -> None:
    """A contender's process: for each number read from stdin so many updates, their seconds written to stdout."""
    act = searcher(o) if o["task"] == "generate" else contender(o)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            act()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        print(seconds, peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


# Rounds -------------------------------------------------------------------------------------------------------------


def take_turns(options: list[dict], rounds: int, times: int) -> list[tuple[float, float]]:
    """(median seconds, peak bytes) of an act of each contender: one act each to warm up, then turns of `times` acts."""
    line = [sys.executable, __file__, "--work"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    processes = [subprocess.Popen([*line, json.dumps(o)], **pipes) for o in options]

    def ask(process: subprocess.Popen, n: int) -> list[float]:
        process.stdin.write(f"{n}\n")
        process.stdin.flush()
        answer = process.stdout.readline().split()
        return [float(x) for x in answer] if answer else [float("nan"), float("nan")]

    for process in processes:
        ask(process, 1)
    seen = [[ask(process, times) for process in processes] for _ in range(rounds)]
    for process in processes:
        process.stdin.close()
        process.wait()
    return [
        (statistics.median(row[k][0] for row in seen) / times, max(row[k][1] for row in seen))
        for k in range(len(options))
    ]


def matmul_rate(dtype: str, n: int = 2048) -> float:
    """FLOPs a second of a product of two n x n matrices: the best of ten."""
    a = torch.randn(n, n, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, device=trainer.device())
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def fetching(o: dict, rounds: int) -> float:
    """Seconds, in this process, to draw a batch's rows from the embedded corpus, noise and collate them: what an update
    waits for without --workers.
    """
    rows, seconds = open_data(SAMPLE, o["length"]), []
    objective = objective_of(o["task"], rows.ids)
    for turn in range(10 * rounds):
        began = time.perf_counter()
        numbers = range(turn * o["rows"], (turn + 1) * o["rows"])
        trainer.collate([objective(rows.row(i), sample_rng(0, 0, i)) for i in numbers], rows.ids.pad)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


BASE = dict(preset="tiny", vocab=16000, rows=32, length=128, dropout=0.0, compile=False, frozen=False)
BASE |= dict(positions="rotary")
# Where a processor has no bf16, trainer.py falls back to fp32: nothing else to time.
DTYPES = ("fp32",) if trainer.product_dtype("bf16") == torch.float32 else ("bf16", "fp32")


def training(task: str, rounds: int, **more) -> None:
    """A line for each contender in each dtype."""
    for dtype in DTYPES:
        o = BASE | dict(task=task, dtype=dtype, **more)
        who = ["ours", "transformers", "nn.Transformer"]
        if not more:
            who.append("transformers, memory kept")
        before = matmul_rate(dtype)
        found = take_turns([o | {"who": x} for x in who], rounds, 3 if o["preset"] == "tiny" else 1)
        peak = max(before, matmul_rate(dtype))  # a moment in which the machine was busy elsewhere makes it too low
        flops = batch_flops(model_config(o), *batch_of(o))
        print(
            f"{task}, {o['preset']}, {dtype}{', compiled' * o['compile']}: ours does {flops / found[0][0] / peak:.1%} "
            f"of the {peak / 1e9:,.0f} GFLOP/s of a large product, "
            f"waits for its rows {1 - found[0][0] / (found[0][0] + fetching(o, rounds)):.2%}"
        )
        for name, (seconds, memory) in zip(who, found):
            speed = f"{o['rows'] * o['length'] / seconds:9,.0f} tokens/s, {memory / 2**20:6,.0f} MB"
            ratios = f"{seconds / found[0][0]:.2f} x the time, {memory / found[0][1]:.2f} x the memory of ours"
            print(f"  {name:25} {speed}   {ratios * (name != 'ours')}", flush=True)


def positions(rounds: int) -> None:
    """What the rotation of queries and keys costs: an update beside one with learned positions."""
    for preset, task, dtype in itertools.product(("tiny", "small"), ("mlm", "denoise"), DTYPES):
        o = BASE | dict(task=task, who="ours", dtype=dtype, preset=preset)
        (a, _), (b, _) = take_turns([o, o | {"positions": "learned"}], rounds, 3 if preset == "tiny" else 1)
        print(f"{task}, {preset}, {dtype}: rotary {a:.3f} s, learned {b:.3f} s an update: {a / b:.3f}", flush=True)


def frozen(rounds: int) -> None:
    """The second stage, its encoder frozen and not."""
    for dtype in DTYPES:
        o = BASE | dict(task="denoise", who="ours", dtype=dtype)
        (a, _), (b, _) = take_turns([o | {"frozen": True}, o], rounds, 3)
        print(f"second stage, tiny, {dtype}: frozen {a:.3f} s, unfrozen {b:.3f} s an update: {a / b:.2f}", flush=True)


def generation(rounds: int) -> None:
    for dtype, (beams, new) in itertools.product(DTYPES, ((1, 256), (4, 64))):
        o = BASE | dict(task="generate", beams=beams, new=new, dtype=dtype)
        found = take_turns([o | {"who": who} for who in ("ours", "products", "transformers")], rounds, 1)
        speeds = [o["rows"] * new / seconds for seconds, _ in found]
        print(
            f"generation, tiny, {dtype}, beams {beams}, {new} tokens, 32 rows: ours {speeds[0]:,.0f} tokens/s, "
            f"transformers {speeds[2]:,.0f}: {speeds[0] / speeds[2]:.2f} x; products and attention alone "
            f"{speeds[1]:,.0f}: {speeds[1] / speeds[2]:.2f} x",
            flush=True,
        )


def t5_noise(length: int, density: float, mean: float, rng: np.random.Generator) -> np.ndarray:
    """T5's span corruption from its definition (Raffel et al. 2020, 3.1.4): as many noise spans as clean ones, their
    lengths random compositions; True where noise is.
    """
    n_noise = max(1, round(length * density))
    n_spans = max(1, round(n_noise / mean))

    def composition(total: int) -> np.ndarray:
        starts = rng.permutation(np.arange(total - 1) < n_spans - 1)
        return np.bincount(np.cumsum(np.concatenate([[False], starts])), minlength=n_spans)

    lengths = np.stack([composition(length - n_noise), composition(n_noise)], 1).flatten()
    return np.repeat(np.arange(2 * n_spans) % 2 == 1, lengths)


def noise(rounds: int) -> None:
    """Tokens a second of the objectives on one core, beside the collator of transformers and T5's definition."""
    torch.set_num_threads(1)
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    ids, rng, n = SpecialIds(16000), np.random.default_rng(0), 400
    rows = rng.integers(ids.ordinary, 16000, (n, 512))
    vocabulary = {f"w{i}": i for i in range(16000 - 2)} | {"<pad>": 15998, "<mask>": 15999}
    their = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<pad>")), pad_token="<pad>", mask_token="<mask>"
    )
    collator = DataCollatorForLanguageModeling(their, mlm_probability=0.15)
    tensors = [{"input_ids": torch.from_numpy(row)} for row in rows]
    acts = {
        "mask_tokens": lambda: [mask_tokens(row, sample_rng(0, 0, i), ids) for i, row in enumerate(rows)],
        "collator of transformers": lambda: [collator(tensors[at : at + 32]) for at in range(0, n, 32)],
        "noise_row, drop": lambda: [noise_row(row, sample_rng(0, 0, i), ids, "drop") for i, row in enumerate(rows)],
        "noise_row, sentinel": lambda: [noise_row(r, sample_rng(0, 0, i), ids, "sentinel") for i, r in enumerate(rows)],
        "T5's spans, the mask alone": lambda: [t5_noise(512, 0.15, 3.0, np.random.default_rng(i)) for i in range(n)],
    }
    seen: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds + 1):
        for name, act in acts.items():
            began = time.perf_counter()
            act()
            seen[name].append(time.perf_counter() - began)
    for name, seconds in seen.items():
        median = statistics.median(seconds[1:])
        print(f"{name:28} {n * 512 / median / 1e6:6.2f}M tokens/s, {n / median:8,.0f} rows of 512/s", flush=True)


def checkpoints(rounds: int) -> None:
    """Seconds and peak memory of saving and loading the paper's seq2seq model, in processes of their own."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import resource, struct, time
from dataclasses import asdict
from pathlib import Path
import data
from checkpoint import *
from config import PRESETS
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
data.prepare(data.SAMPLE_TEXT, Path("D"), **data.SAMPLE_OPTIONS)
tokenizer = Path("D/tokenizer.model").read_bytes()
for i in range(data.SAMPLE_OPTIONS["vocab_size"], 150_000):  # protocol buffers put end to end are one: more pieces
    piece = b"w%06d" % i
    entry = b"\\x0a" + bytes([len(piece)]) + piece + b"\\x15" + struct.pack("<f", -20.0)
    tokenizer += b"\\x0a" + bytes([len(entry)]) + entry
cfg, path = ModelConfig(150_000, max_len=512, **PRESETS["paper"]), Path("x.pt")
model = Seq2Seq(cfg)
content = dict(kind="seq2seq", config=asdict(cfg), weights=model.state_dict(), history=[], tokenizer=tokenizer)
before, began = peak(), time.perf_counter()
save_checkpoint(path, content)
seconds, size = time.perf_counter() - began, path.stat().st_size / 1e9
n = sum(p.numel() for p in model.parameters()) / 1e6
print(f"save {{n:.0f}}M weights, {{size:.2f}} GB: {{seconds:.1f}} s, peak memory +{{peak() - before:.2f}} GB")
del model, content
began = time.perf_counter()
load_checkpoint(path)
print(f"load: {{time.perf_counter() - began:.1f}} s")
"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        print(f"paper preset, 150,000 pieces\n{done.stdout}", end="", flush=True)


def grown_data(folder: Path, size: int, fill: bool) -> Path:
    """The embedded corpus's data folder with shards of `size` bytes in all: of random tokens, or of holes that take no
    room on the disk.
    """
    prepare(SAMPLE_TEXT, folder / "D", **SAMPLE_OPTIONS)
    some = np.random.default_rng(0).integers(300, SAMPLE_OPTIONS["vocab_size"], 1 << 20).astype(np.uint16)
    for language, entry in (meta := read_meta(folder / "D")).items():
        (shard,), n = entry["train"], size // 2 // len(meta)
        with open(folder / "D" / shard, "r+b") as file:
            file.seek(HEADER - 8)
            file.write(n.to_bytes(8, "little"))
            for start in range(0, n, len(some)) if fill else ():
                file.write(some[: n - start].tobytes())
            file.truncate(HEADER + 2 * n)
        (folder / "D" / f"{language}.json").write_text(json.dumps(entry | {"train": {shard: n}}))
    return folder / "D"


def first_step(rounds: int) -> None:
    """Seconds from the start of the command to the first update, on shards of 10 MB and of 10 GB; peak memory."""
    for size in (10**7, 10**10):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            grown_data(folder, size, fill=False)
            line = [sys.executable, str(ROOT / "train_encoder.py"), "--data", "D", "--steps", "20", "--batch-size", "8"]
            began = time.perf_counter()
            process = subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, text=True)
            if not any(said.startswith("step 0:") for said in process.stdout):
                sys.exit("first-step: the training command ended before its first update; above is why")
            seconds = time.perf_counter() - began
            with open(f"/proc/{process.pid}/status") as file:
                memory = next(int(x.split()[1]) for x in file if x.startswith("VmHWM")) / 1024
            process.kill()
            process.wait()
            print(
                f"{size / 1e9:5.2f} GB of shards: {seconds:.1f} s to the first update, {memory:,.0f} MB",
                flush=True,
            )


def stream(rounds: int) -> None:
    """Microseconds a token of batches of noised rows, on one core, against the size of the shards; the share of an
    update that waits for them.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        costs: dict[int, list[float]] = {}
        for size in (10**7, 10**8, 10**9, 10**10):
            (folder := Path(name) / str(size)).mkdir()
            grown_data(folder, size, fill=True)
        for turn in range(rounds + 1):
            for size in (10**7, 10**8, 10**9, 10**10):
                rows = TokenData(Path(name) / str(size) / "D", 128)
                objective = encoder_objective(rows.ids, SCORED)
                began = time.perf_counter()
                for i in range(turn * 6400, (turn + 1) * 6400):
                    objective(rows.row(i), sample_rng(0, 0, i))
                costs.setdefault(size, []).append((time.perf_counter() - began) / 6400)
    medians = {size: statistics.median(seconds[1:]) for size, seconds in costs.items()}
    ((update, _),) = take_turns([BASE | dict(task="mlm", who="ours", dtype=DTYPES[0])], rounds, 3)
    for size, seconds in medians.items():
        print(
            f"{size / 1e9:5.2f} GB of shards: {1 / seconds:,.0f} masked rows of 128 a second, "
            f"{seconds / 128 * 1e6:.3f} us a token, {seconds / medians[10**7]:.2f} of that at 10 MB; "
            f"32 rows are {32 * seconds / update:.1%} of an update",
            flush=True,
        )


def encoding(rounds: int) -> None:
    """Megabytes a second of data.py on the embedded corpus written out 100 times, with a tokenizer at hand."""
    with tempfile.TemporaryDirectory() as name:
        folder, seconds = Path(name), []
        (folder / "text").mkdir()
        for path in (ROOT / "sample" / "text").glob("*.txt"):
            (folder / "text" / path.name).write_bytes((path.read_bytes() + b"\n") * 100)
        size = sum(path.stat().st_size for path in (folder / "text").iterdir())
        line = [sys.executable, str(ROOT / "data.py")]
        options = ["--vocab-size", "4000", "--valid-fraction", "0.15"]
        subprocess.run(
            [*line, str(ROOT / "sample" / "text"), "first", *options], cwd=folder, check=True, capture_output=True
        )
        for turn in range(rounds):
            began = time.perf_counter()
            more = ["--tokenizer", "first/tokenizer.model", "--valid-fraction", "0.15"]
            subprocess.run([*line, "text", f"D{turn}", *more], cwd=folder, check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds)
        print(f"data.py, {size / 1e6:.0f} MB, start to end: {median:.1f} s, {size / 1e6 / median:.1f} MB/s", flush=True)


def lengths(rounds: int) -> None:
    """Seconds a token against row length, measured and by the ledger's formula."""
    costs = []
    for length in (128, 256, 512, 1024, 2048):
        o = BASE | dict(task="mlm", who="ours", dtype="fp32", length=length, rows=4096 // length)
        ((seconds, _),) = take_turns([o], rounds, 2)
        costs.append((length, seconds / 4096, batch_flops(model_config(o), *batch_of(o)) / 4096))
    for length, seconds, flops in costs:
        print(
            f"rows of {length:4}: {seconds * 1e6:6.1f} us a token, {seconds / costs[0][1]:.2f} of that at 128; "
            f"by formula {flops / costs[0][2]:.2f}",
            flush=True,
        )


def vocabulary(rounds: int) -> None:
    """Peak memory of the de-noising update against vocabulary and rows."""
    for vocab in (16_000, 150_000):
        for rows in (8, 32):
            options = BASE | dict(task="denoise", vocab=vocab, rows=rows, dtype=DTYPES[0])
            who = ("ours", "transformers")
            found = take_turns([options | {"who": x} for x in who], 1, 1)
            figures = [f"{x} {memory / 2**20:,.0f} MB, {seconds:.2f} s" for x, (seconds, memory) in zip(who, found)]
            print(f"de-noising, tiny, {vocab:,} pieces, {rows} rows of 128: {', '.join(figures)}", flush=True)


PARTS: dict[str, Callable[[int], None]] = {
    "mlm": lambda rounds: training("mlm", rounds),
    "denoise": lambda rounds: training("denoise", rounds),
    "small": lambda rounds: training("mlm", rounds, preset="small"),
    "denoise-small": lambda rounds: training("denoise", rounds, preset="small"),
    "compiled": lambda rounds: training("mlm", rounds, compile=True),
    "denoise-compiled": lambda rounds: training("denoise", rounds, compile=True),
    "small-compiled": lambda rounds: training("mlm", rounds, preset="small", compile=True),
    "denoise-small-compiled": lambda rounds: training("denoise", rounds, preset="small", compile=True),
    "positions": positions,
    "frozen": frozen,
    "vocabulary": vocabulary,
    "generation": generation,
    "noise": noise,
    "lengths": lengths,
    "first-step": first_step,
    "stream": stream,
    "encoding": encoding,
    "checkpoints": checkpoints,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default %(default)s)")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # one contender's process
    args = parser.parse_args()
    if args.work:
        work(json.loads(args.work))
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"torch {torch.__version__}, {name}, {args.rounds} rounds")
    if DTYPES == ("fp32",):
        print("this processor has no bf16: everything is in fp32")
    for part in args.only or PARTS:
        PARTS[part](args.rounds)


if __name__ == "__main__":
    main()
