"""The one training loop, for both stages: processes, batches, freezing, checkpoints, ledger.

A run is a function of its settings: sample i and its noise depend on (seed, i), dropout on (seed, step, process), and
freezing on the step. A checkpoint therefore holds weights, optimizer state and what was spent, and a resumed run
matches one that was never interrupted. The objectives themselves are in train_encoder.py and train_seq2seq.py.

    enc.pt                    the result (checkpoint.py)
    enc.run/000000500.pt      a checkpoint to resume from, named after its step; the newest --keep stay
    enc.run/metrics.jsonl     what the progress bar showed, and the held-out losses
"""

import contextlib
import ctypes
import math
import os
import shutil
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from checkpoint import MODELS, as_checkpoint, save_checkpoint, warm_start
from cli import InputError, OneProcessError, build, rank, say, world
from compute import batch_flops
from config import Run, TrainConfig, make_run, parse_flags, run_checkpoints
from data import TokenData
from log import Log
from model import IGNORE, softmax_loss
from objectives import NOISE, VALID_NOISE, sample_rng
from optim import freeze_encoder, make_optimizers, rate

Example = dict[str, np.ndarray]  # arguments of the model's forward for one row
Objective = Callable[[np.ndarray, np.random.Generator], Example]
Frozen = Callable[[int], bool]  # whether the encoder is frozen in a step
TARGETS = {"labels", "tgt_out"}  # the arguments of forward that hold targets
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOST = {  # how torch says that a process is lost, and what we say
    "DataLoader worker": "a process that prepares rows died (out of memory?)",
    " by peer": "another process of the run died",  # its connection was closed or reset
    "imed out": "another process of the run did not answer within --timeout",
}


def start(description: str, kind: str, objective: type) -> Run:
    """Joins the process group and returns the run that a training script's command line asks for.

    Raises InputError if flags and checkpoints contradict each other.
    """
    flags = parse_flags(description, kind, objective)
    keep_memory()
    if world() > 1:
        wait = timedelta(seconds=build(TrainConfig, flags).timeout)
        try:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=wait)
        except ValueError as error:  # a cluster may set WORLD_SIZE and not the rest
            raise InputError(f"the environment is not torchrun's ({error}); start with torchrun") from None
    if torch.cuda.is_available():
        if (n := torch.cuda.device_count()) <= device().index:
            raise OneProcessError(f"--nproc-per-node: more than the {n} GPUs here; start as many processes")
        torch.cuda.set_device(device())
    run = make_run(kind, flags, objective)
    if run.train.dtype == "bf16" and product_dtype("bf16") == torch.float32:
        say("this processor has no bf16 and would be 40 times slower with it: matrix products are in fp32")
    if run.train.compile and device().type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("--compile: needs a C++ compiler, g++ or what CXX names; install one or leave the flag out")
    return run


# Processes and devices ---------------------------------------------------------------------------------------------


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def product_dtype(dtype: str) -> torch.dtype:
    """What --dtype asks for, but fp32 on a CPU without bf16 instructions, where bf16 would take 40 times as long."""
    on_cpu = device().type == "cpu"
    slow = on_cpu and not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if dtype == "bf16" and not slow else torch.float32


def autocast(dtype: str) -> torch.autocast:
    """A context in which matrix products are in --dtype."""
    return torch.autocast(device().type, torch.bfloat16, enabled=product_dtype(dtype) == torch.bfloat16)


def keep_memory() -> None:
    """Makes glibc keep freed memory, which saves 3 to 20 % of an update on a CPU (benchmarks/README.md)."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def _sum_over_ranks(values: list[float]) -> list[float]:
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return total.tolist()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the encoder and, where there is one, of the decoder."""
    return [block for part in model.children() for block in getattr(part, "blocks", [])]


def compile_parts(model: nn.Module) -> None:
    """Has torch compile each layer, and the softmax over the vocabulary: one pass over the logits instead of six."""
    for block in blocks(model):
        block.compile()
    model.softmax_loss = torch.compile(softmax_loss)


def _shard(model: nn.Module, dtype: str) -> None:
    """Splits every parameter over the processes (FSDP2): a group for each block, one for the rest.

    The rest, with the shared embedding, is gathered in fp32, so residual stream and norms are as without sharding.
    """
    bf16 = torch.bfloat16 if product_dtype(dtype) == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False))


def refuse_unlike_processes(run: Run) -> None:
    """Raises InputError if processes read other data or go on from other checkpoints, as on machines without shared
    files. Every process must call it.
    """
    done = run.state["spent"]["steps"] if run.state else 0
    dist.all_gather_object(theirs := [None] * world(), (run.data.fingerprint[:8], done))
    for what, values in zip((f"{run.train.data}: the data", f"{run.folder}: the updates done"), zip(*theirs)):
        if len(set(values)) > 1:
            differ = f"{what} are not the same for all processes ({', '.join(map(str, values))[:80]})"
            raise InputError(f"{differ}; put the files where every machine sees them")


def _like(x: Tensor, p: Tensor) -> Tensor:
    """This process's shard of a whole tensor, if p is sharded."""
    if isinstance(p, DTensor) and x.shape == p.shape:
        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return x


# Batches -----------------------------------------------------------------------------------------------------------


def collate(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """Stacks examples into tensors [B, longest] on the device, padded at the end: targets with IGNORE, tokens with pad.

    A src_mask is added only where a source was padded: attention is faster without one. To labels the positions [N]
    that have one are added.
    """
    batch = {}
    for name in examples[0]:
        rows = [torch.from_numpy(example[name]).long() for example in examples]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=IGNORE if name in TARGETS else pad)
    if "labels" in batch:
        batch["labelled"] = torch.from_numpy(np.flatnonzero(batch["labels"].numpy() != IGNORE))
    lengths = [len(example["src"]) for example in examples]
    if min(lengths) < max(lengths):
        batch["src_mask"] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # [B, S]
    if device().type == "cuda":  # a copy from pinned memory does not hold up the GPU
        return {name: x.pin_memory().to(device(), non_blocking=True) for name, x in batch.items()}
    return batch


def n_targets(examples: list[Example]) -> int:
    """Number of positions that carry a loss."""
    return sum(int((example[name] != IGNORE).sum()) for example in examples for name in example if name in TARGETS)


def batch_of(run: Run, objective: Objective, step: int) -> list[Example]:
    """The examples of this process in the batch of a step."""
    share = run.train.batch_size // world()
    first = step * run.train.batch_size + rank() * share
    return [objective(run.data.row(i), sample_rng(run.train.seed, NOISE, i)) for i in range(first, first + share)]


def _loader(run: Run, objective: Objective, first_step: int) -> DataLoader:
    """The examples of each step, made by --workers processes, or by this one on demand."""
    return DataLoader(
        range(first_step, run.train.steps),
        batch_size=None,
        collate_fn=lambda step: batch_of(run, objective, step),
        num_workers=run.train.workers,
        multiprocessing_context="fork" if run.train.workers else None,
        worker_init_fn=_shielded,
    )


def _shielded(_: int) -> None:
    """Keeps signals to the run from ending a row worker before its last rows."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# Held-out loss -----------------------------------------------------------------------------------------------------


def valid_examples(data: TokenData, language: str, objective: Objective, at_most: int = 0) -> list[Example]:
    """Held-out rows of a language with fixed noise: all of them, or `at_most` of them, evenly spread.

    The noise is the same in every run, whatever its seed, so that held-out losses can be compared.
    """
    n_rows = data.n_valid_rows(language)
    n = min(at_most or n_rows, n_rows)
    rows = [k * n_rows // n for k in range(n)]
    key = zlib.crc32(language.encode()) << 32
    return [objective(data.valid_row(language, j), sample_rng(0, VALID_NOISE, key | j)) for j in rows]


@torch.no_grad()
def held_out_loss(
    model: nn.Module, data: TokenData, languages: list[str], objective: Objective, dtype: str, at_most: int = 0
) -> dict[str, float]:
    """Mean loss in nats for each language, over all processes; all must call it. Leaves the model in eval mode."""
    model.eval()
    sums = []
    for language in languages:
        examples = valid_examples(data, language, objective, at_most)
        n = dist.get_world_size() if dist.is_initialized() else 1  # eval.py is one process even under torchrun
        share, loss = examples[rank() :: n], torch.zeros((), dtype=torch.float64, device=device())
        for first in range(0, -(-len(examples) // n), 32):
            rows = share[first : first + 32]
            with autocast(dtype):  # FSDP needs every process in every pass: one without rows repeats a row, uncounted
                part = model(**collate(rows or examples[:1], data.ids.pad))
            loss += part if rows else 0.0
        sums += [loss.item(), n_targets(share)]
    if isinstance(model, FSDPModule):
        model.reshard()  # parameters left gathered would not notice freezing or thawing
    sums = _sum_over_ranks(sums)
    return {language: sums[2 * i] / max(1, sums[2 * i + 1]) for i, language in enumerate(languages)}


# The loop ----------------------------------------------------------------------------------------------------------


def fit(run: Run, objective: Objective, frozen: Frozen = lambda _: False, scored: Objective | None = None) -> None:
    """Trains the run's model by its settings and writes its checkpoint. Held-out losses are of `scored`, if given.

    The model starts from random weights of the seed, and with --init from that checkpoint's. SIGTERM, SIGUSR1 and the
    end of torchrun end the run after the next whole update, with a checkpoint to resume from. Raises InputError when it
    cannot go on: --init does not fit, another run writes there, the loss is no longer a number, a process is gone.
    """
    if run.train.batch_size % world():
        raise InputError(f"--batch-size {run.train.batch_size}: not a multiple of the {world()} processes; change it")
    torch.manual_seed(run.train.seed)
    model = MODELS[run.kind](run.model)
    if run.init:
        warm_start(model, run.settings["init"], run.init.pop("weights"))
    signals, parent, under_torchrun = [], os.getppid(), "TORCHELASTIC_RUN_ID" in os.environ
    before = {number: signal.signal(number, lambda n, _: signals.append(n)) for number in STOP_SIGNALS}

    def told_to_stop() -> bool:  # torchrun dies of a signal that it does not expect, and its workers live on
        return bool(signals) or (under_torchrun and os.getppid() != parent)

    try:
        if dist.is_initialized():
            refuse_unlike_processes(run)
        with contextlib.closing(Log(run)) as log:
            Training(run, model, objective, frozen, scored or objective, log, told_to_stop).loop()
    except OneProcessError as error:  # torch puts its own report before the message of a row worker
        raise OneProcessError(str(error).strip().rsplit("OneProcessError: ", 1)[-1]) from None
    except RuntimeError as error:
        for sign, meaning in LOST.items():
            if sign in str(error):
                raise OneProcessError(f"process {rank()}: {meaning}; start the run again with --resume") from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass
class Training:
    """A run under way: its model, its optimizers and what it has spent."""

    run: Run
    model: nn.Module
    objective: Objective
    frozen: Frozen
    scored: Objective
    log: Log
    told_to_stop: Callable[[], bool]

    def __post_init__(self) -> None:
        run, model = self.run, self.model
        cfg = run.train
        model.to(device())
        if cfg.compile:
            compile_parts(model)
        if dist.is_initialized() and cfg.parallel == "fsdp":
            _shard(model, cfg.dtype)
        self.optimizers = make_optimizers(model, cfg, product_dtype(cfg.dtype))
        self.spent = Counter(steps=0, tokens=0, flops=0.0, thawed_flops=0.0, seconds=0.0, skipped=0)
        if run.state:
            self.spent.update(run.state["spent"])
            self._restore(run.state)

    def _restore(self, state: dict) -> None:
        """Loads weights and optimizer state from a checkpoint, where they are whole; shards them if the model is."""
        now = self.model.state_dict()
        self.model.load_state_dict({name: _like(x, now[name]) for name, x in state.pop("weights").items()})
        for optimizer, stored in zip(self.optimizers, state.pop("optimizers"), strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            stored = {i: {name: _like(x, params[i]) for name, x in values.items()} for i, values in stored.items()}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": stored})

    def loop(self) -> None:
        """Trains from where the run stands to its last step, or until it is told to stop."""
        run, cfg, spent = self.run, self.run.train, self.spent
        if cfg.steps and not spent["steps"]:
            self.validate()
        wrapped, not_finite = None, []
        began = time.perf_counter()
        for step, examples in enumerate(_loader(run, self.objective, spent["steps"]), spent["steps"]):
            freeze_encoder(self.model.train(), self.frozen(step))
            if wrapped is None or self.frozen(step) != self.frozen(step - 1):
                wrapped = self.model
                if dist.is_initialized() and cfg.parallel == "ddp":  # anew at the thaw, which DDP does not notice
                    wrapped = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
            loss, norm, stop = self.update(wrapped, examples, step)
            not_finite = [] if math.isfinite(loss) and math.isfinite(norm) else [*not_finite, step]
            seconds, tokens = time.perf_counter() - began, cfg.batch_size * cfg.seq_len
            spent.update(steps=1, tokens=tokens, seconds=seconds, skipped=int(bool(not_finite)))
            self.log.step(step, loss, norm, cfg.lr * rate(step, cfg), tokens / seconds)
            done = step + 1
            if len(not_finite) == 3:
                first, last = not_finite[0] * cfg.batch_size, done * cfg.batch_size - 1
                where = f"in steps {not_finite}, samples {first:,} to {last:,}"
                raise InputError(f"{run.out}: loss or gradients not finite {where}; lower --lr or --muon-lr")
            if done % cfg.eval_every == 0 or done == cfg.steps:
                self.validate()
            if done % cfg.save_every == 0 or done == cfg.steps or stop:
                self.save()
            if stop and done < cfg.steps:
                say(f"{run.out}: stopped after {done} steps, all saved; continue with --resume")
                return
            began = time.perf_counter()
        if cfg.steps == 0 and not run.state:
            self.save()
        self.finish()

    def update(self, wrapped: nn.Module, examples: list[Example], step: int) -> tuple[float, float, bool]:
        """Does one update from this process's examples; returns mean loss in nats and gradient norm of the global
        batch, and whether any process was told to stop.

        The gradient is that of the mean loss over all targets of the global batch, however the batch is split. If loss
        or norm is not finite the weights stay as they are: all processes see the same two numbers, so they agree.
        """
        run, cfg = self.run, self.run.train
        torch.manual_seed((cfg.seed << 32 ^ step << 8 ^ rank()) & (1 << 63) - 1)  # dropout
        all_targets = max(1, *_sum_over_ranks([n_targets(examples)]))  # rows of only special tokens have none
        micro = cfg.micro_batch_size or len(examples)
        loss, flops, thawed_flops = torch.zeros((), device=device()), 0.0, 0.0
        for first in range(0, len(examples), micro):
            rows = examples[first : first + micro]
            batch, labelled = collate(rows, run.data.ids.pad), n_targets(rows)
            flops += batch_flops(run.model, batch, labelled, self.frozen(step))
            thawed_flops += batch_flops(run.model, batch, labelled)
            last = first + micro >= len(examples)  # only then are the gradients summed over the processes
            if isinstance(wrapped, FSDPModule):
                wrapped.set_requires_gradient_sync(last)
            elif isinstance(wrapped, DistributedDataParallel):
                wrapped.require_backward_grad_sync = last
            with autocast(cfg.dtype):
                part = wrapped(**batch)
            (part * (world() / all_targets)).backward()  # DDP and FSDP average over processes: undo that
            loss += part.detach()
        norm = nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss, norm = torch.stack([loss, norm]).tolist()  # one process waits for its GPU here and nowhere else
        loss_sum, flops, thawed_flops, stops = _sum_over_ranks([loss, flops, thawed_flops, float(self.told_to_stop())])
        self.spent.update(flops=flops, thawed_flops=thawed_flops)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, cfg)
            if math.isfinite(loss_sum) and math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad()
        return loss_sum / all_targets, norm, stops > 0

    def validate(self) -> None:
        """Computes and logs the held-out loss of every language, on 64 rows of each."""
        data, dtype = self.run.data, self.run.train.dtype
        with torch.compiler.set_stance("force_eager"):  # layers compiled for its numbers of rows would train, too
            losses = held_out_loss(self.model, data, data.languages, self.scored, dtype, 64)
        self.log.losses(self.spent["steps"], losses)

    def checkpoint(self) -> dict:
        """The result as of now: the current weights and the history so far."""
        run = self.run
        before = run.state["history"][:-1] if run.state else run.init["history"] if run.init else []
        history = [*before, {"stage": run.kind, **self.spent, "settings": run.settings}]
        return as_checkpoint(run.kind, run.model, self.model.state_dict(), run.data.tokenizer_model, history)

    def save(self) -> None:
        """Writes a checkpoint to resume from and removes the oldest beyond --keep."""
        run = self.run
        state = {"spent": dict(self.spent), "settings": run.settings, "data": run.data.fingerprint}
        state["optimizers"] = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        save_checkpoint(run.folder / f"{self.spent['steps']:09d}.pt", self.checkpoint() | state)
        if rank() == 0:
            for old in run_checkpoints(run.folder)[: -run.train.keep]:
                old.unlink()

    def finish(self) -> None:
        """Writes the result and says what it cost and achieved."""
        run, spent = self.run, self.spent
        save_checkpoint(run.out, self.checkpoint())
        cost = f"{spent['tokens']:,} tokens, {spent['flops']:.3g} FLOPs, {spent['seconds']:.0f} s of training"
        skipped = f", {spent['skipped']} skipped" if spent["skipped"] else ""
        say(f"{run.out}: {spent['steps']} steps, {cost}{skipped}")
        if 0 in (means := self.log.means):  # unless the log was removed on the way
            single = sum(map(run.data.unigram_entropy, run.data.languages)) / len(run.data.languages)
            found = f"held-out loss {means[0]:.2f} before, {means[max(means)]:.2f} after"
            say(f"{run.out}: {found}; of single pieces {single:.2f}")
