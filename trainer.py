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
from collections.abc import Callable, Iterator
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from checkpoint import MODELS, as_checkpoint, save_checkpoint, warm_start
from cli import InputError, OneProcessError, build, rank, say, world
from compute import batch_flops
from config import Run, TrainConfig, make_run, parse_flags, run_checkpoints
from data import TokenData
from log import Log
from model import IGNORE
from objectives import NOISE, VALID_NOISE, sample_rng
from optim import freeze_encoder, make_optimizers, rate

Example = dict[str, np.ndarray]  # arguments of the model's forward for one row
Objective = Callable[[np.ndarray, np.random.Generator], Example]
TARGETS = {"labels", "tgt_out"}  # the arguments of forward that hold targets
MAX_NOT_FINITE = 3  # updates in a row
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOST = {  # how torch says that a process is lost, and what we say
    "DataLoader worker": "a process that prepares rows died (out of memory?)",
    "Connection closed by peer": "another process of the run died",
    "Connection reset by peer": "another process of the run died",
    "imed out": "another process of the run did not answer within --timeout",
}


def start(description: str, kind: str, objective: type) -> Run:
    """Joins the process group and returns the run that a training script's command line asks for.

    Raises InputError if flags and checkpoints contradict each other.
    """
    flags = parse_flags(description, kind, objective)
    start_processes(build(TrainConfig, flags).timeout)
    run = make_run(kind, flags, objective)
    if run.train.dtype == "bf16" and product_dtype("bf16") == torch.float32:
        say("this processor has no bf16 and would be 40 times slower with it: matrix products are in fp32")
    if run.train.compile and device().type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("--compile: needs a C++ compiler, g++ or what CXX names; install one or leave the flag out")
    return run


def new_model(run: Run) -> nn.Module:
    """The run's model with its initial weights: random ones from the seed, and with --init that checkpoint's.

    Raises InputError if the checkpoint's weights do not fit.
    """
    torch.manual_seed(run.train.seed)
    model = MODELS[run.kind](run.model)
    if run.init:
        warm_start(model, run.settings["init"], run.init.pop("weights"))
    return model


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
    """Makes glibc keep freed memory instead of returning it to the system: it saves 3 to 20 % of an update on a CPU.

    Figures: benchmarks/README.md.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def start_processes(timeout: int) -> None:
    """Joins the process group that torchrun describes in the environment, if there is one."""
    keep_memory()
    if world() > 1 and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        except ValueError as error:  # WORLD_SIZE without the rest
            raise InputError(f"the environment is not torchrun's ({error}); start with torchrun") from None
    if torch.cuda.is_available():
        torch.cuda.set_device(device())


def _sum_over_ranks(values: list[float]) -> list[float]:
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return total.tolist()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the encoder and, where there is one, of the decoder."""
    return [block for part in model.children() for block in getattr(part, "blocks", [])]


def _shard(model: nn.Module, dtype: str) -> None:
    """Splits every parameter over the processes (FSDP2): a group for each block, one for the rest.

    The rest, with the shared embedding, is gathered in fp32, so residual stream and norms are as without sharding.
    """
    bf16 = torch.bfloat16 if product_dtype(dtype) == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False))


def _wrap(model: nn.Module) -> nn.Module:
    """The model, in DDP if several processes each hold a whole copy of it.

    It is wrapped again when the encoder freezes or thaws: DDP does not notice, and its ranks would silently drift
    apart. FSDP2 notices.
    """
    if not dist.is_initialized() or isinstance(model, FSDPModule):
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextlib.contextmanager
def _gradients(wrapped: nn.Module, summed: bool) -> Iterator[None]:
    """Sums the gradients of this backward pass over the processes only if asked: at the last micro-batch."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(summed)
    with contextlib.ExitStack() as stack:
        if isinstance(wrapped, DistributedDataParallel) and not summed:
            stack.enter_context(wrapped.no_sync())
        yield


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
        rows = [example[name] for example in examples]
        longest = max(len(row) for row in rows)
        stacked = np.full((len(rows), longest), IGNORE if name in TARGETS else pad, np.int64)
        for row, values in zip(stacked, rows):
            row[: len(values)] = values
        batch[name] = torch.from_numpy(stacked)
        if name == "labels":
            batch["labelled"] = torch.from_numpy(np.flatnonzero(stacked != IGNORE))
        if name == "src" and min(len(row) for row in rows) < longest:
            lengths = torch.tensor([len(row) for row in rows])
            batch["src_mask"] = torch.arange(longest) < lengths[:, None]  # [B, S]
    if device().type == "cuda":  # a copy from pinned memory does not hold up the GPU
        return {name: x.pin_memory().to(device(), non_blocking=True) for name, x in batch.items()}
    return batch


def n_targets(examples: list[Example]) -> int:
    """Number of positions that carry a loss."""
    return sum(int((example[name] != IGNORE).sum()) for example in examples for name in example if name in TARGETS)


class _Batches(Dataset):
    """Step -> the examples of this process, whichever worker asks for them."""

    def __init__(self, run: Run, objective: Objective):
        self.run, self.objective = run, objective

    def __getitem__(self, step: int) -> list[Example]:
        cfg, data = self.run.train, self.run.data
        share = cfg.batch_size // world()
        first = step * cfg.batch_size + rank() * share
        return [self.objective(data.row(i), sample_rng(cfg.seed, NOISE, i)) for i in range(first, first + share)]


def _loader(run: Run, objective: Objective, first_step: int) -> DataLoader:
    """The examples of each step, made by --workers processes, or by this one on demand."""
    return DataLoader(
        _Batches(run, objective),
        batch_size=None,
        sampler=range(first_step, run.train.steps),
        collate_fn=lambda examples: examples,
        num_workers=run.train.workers,
        multiprocessing_context="fork" if run.train.workers else None,
        worker_init_fn=lambda _: os.setpgid(0, 0),  # a signal to the group must not end workers before their last rows
    )


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
            # Under FSDP every process must take part in every pass: one without rows repeats a row, uncounted.
            batch = collate(share[first : first + 32] or examples[:1], data.ids.pad)
            with autocast(dtype):
                part = model(**batch)
            loss += part if share[first : first + 32] else 0.0
        sums += [loss.item(), n_targets(share)]
    if isinstance(model, FSDPModule):
        model.reshard()  # parameters left gathered would not notice freezing or thawing
    sums = _sum_over_ranks(sums)
    return {language: sums[2 * i] / max(1, sums[2 * i + 1]) for i, language in enumerate(languages)}


# The loop ----------------------------------------------------------------------------------------------------------


def fit(
    run: Run,
    model: nn.Module,
    objective: Objective,
    frozen: Callable[[int], bool] = lambda step: False,
    scored: Objective | None = None,
) -> None:
    """Trains the model by the run's settings and writes its checkpoint; `frozen(step)` freezes the encoder.

    Held-out losses are those of the objective, or of `scored`.
    SIGTERM, SIGUSR1 and the end of torchrun end it after the next whole update, with a checkpoint to resume from.
    Raises InputError when the run cannot go on: another run writes there, the loss is no longer a number, another
    process is gone.
    """
    if run.train.batch_size % world():
        raise InputError(f"--batch-size {run.train.batch_size}: not a multiple of the {world()} processes; change it")
    for language in run.data.languages:
        run.data.n_valid_rows(language)  # better now than after days of training
    signals, parent, under_torchrun = [], os.getppid(), "TORCHELASTIC_RUN_ID" in os.environ
    before = {number: signal.signal(number, lambda n, _: signals.append(n)) for number in STOP_SIGNALS}

    def told_to_stop() -> bool:  # torchrun dies of a signal that it does not expect, and its workers live on
        return bool(signals) or (under_torchrun and os.getppid() != parent)

    try:
        with Log(run) as log:
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


class Training:
    """A run under way: its model, its optimizers and what it has spent."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        objective: Objective,
        frozen: Callable[[int], bool],
        scored: Objective,
        log: Log,
        told_to_stop: Callable[[], bool],
    ):
        self.run, self.model, self.objective, self.frozen = run, model, objective, frozen
        self.scored, self.log, self.told_to_stop = scored, log, told_to_stop
        cfg = run.train
        model.to(device())
        if cfg.compile:
            for block in blocks(model):
                block.compile()
        if dist.is_initialized() and cfg.parallel == "fsdp":
            _shard(model, cfg.dtype)
        self.optimizers = make_optimizers(model, cfg, product_dtype(cfg.dtype))
        self.spent = {"steps": 0, "tokens": 0, "flops": 0.0, "thawed_flops": 0.0, "seconds": 0.0, "skipped": 0}
        if run.state:
            self.spent |= run.state["spent"]
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
                wrapped = _wrap(self.model)
            loss, norm, stop = self.update(wrapped, examples, step)
            not_finite = [] if math.isfinite(loss) and math.isfinite(norm) else [*not_finite, step]
            seconds, tokens = time.perf_counter() - began, cfg.batch_size * cfg.seq_len
            for name, value in dict(steps=1, tokens=tokens, seconds=seconds, skipped=int(bool(not_finite))).items():
                spent[name] += value
            self.log.step(step, loss, norm, cfg.lr * rate(step, cfg), tokens / seconds)
            done = step + 1
            if len(not_finite) == MAX_NOT_FINITE:
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
        done_before = run.out.exists() and run.state and run.state["spent"]["steps"] == cfg.steps
        if dist.is_initialized():
            dist.barrier()  # every process must have checked before one writes
        if done_before:
            say(f"{run.out}: already done, after {cfg.steps} steps")
        else:
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
            with _gradients(wrapped, summed=first + micro >= len(examples)):
                with autocast(cfg.dtype):
                    part = wrapped(**batch)
                (part * (world() / all_targets)).backward()  # DDP and FSDP average over processes: undo that
            loss += part.detach()
        norm = nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss, norm = torch.stack([loss, norm]).tolist()  # one process waits for its GPU here and nowhere else
        loss_sum, flops, thawed_flops, stops = _sum_over_ranks([loss, flops, thawed_flops, float(self.told_to_stop())])
        self.spent["flops"] += flops
        self.spent["thawed_flops"] += thawed_flops
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, cfg)
            if math.isfinite(loss_sum) and math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad()
        return loss_sum / all_targets, norm, stops > 0

    def validate(self) -> None:
        """Computes and logs the held-out loss of every language, on 64 rows of each."""
        run = self.run
        with torch.compiler.set_stance("force_eager"):  # layers compiled for its numbers of rows would train, too
            losses = held_out_loss(self.model, run.data, run.data.languages, self.scored, run.train.dtype, 64)
        self.log.losses(self.spent["steps"], losses)

    def checkpoint(self) -> dict:
        """The result as of now: the current weights and the history so far."""
        run = self.run
        history = run.history + [{"stage": run.kind, **self.spent, "settings": run.settings}]
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
        run, spent, steps = self.run, self.spent, self.run.train.steps
        save_checkpoint(run.out, self.checkpoint())
        cost = f"{spent['tokens']:,} tokens, {spent['flops']:.3g} FLOPs, {spent['seconds']:.0f} s of training"
        say(f"{run.out}: {steps} steps, {cost}" + (f", {spent['skipped']} skipped" if spent["skipped"] else ""))
        if steps:
            say(f"{run.out}: {self.log.summary()}")
