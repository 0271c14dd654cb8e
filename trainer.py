"""The one training loop, for both stages: flags, process group, optimizer, schedule, freezing, checkpoints, ledger.

A run is a function of its settings: sample i and its noise follow from (seed, i), dropout from (seed, step, process),
freezing from the step. So a checkpoint holds weights, optimizer and what was spent, and a resumed run repeats the run
that was not interrupted. Everything about one objective stays in train_encoder.py and train_seq2seq.py.

    enc.pt                    the result (checkpoint.py)
    enc.run/000000500.pt      a checkpoint to resume from, named by its step; the newest --keep of them
    enc.run/metrics.jsonl     what the progress bar showed, and the held-out losses
    enc.run/not-finite.json   where a run stopped whose loss was no longer a number
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import math
import os
import shutil
import signal
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from checkpoint import MODELS, as_checkpoint, load_checkpoint, save_checkpoint, warm_start
from cli import InputError, OneProcessError, build, flag, flag_name, rank, say, world
from compute import batch_flops
from data import SAMPLE_DATA, SAMPLE_OPTIONS, SAMPLE_TEXT, TokenData, prepare
from model import IGNORE, PRESETS, ModelConfig
from objectives import NOISE, VALID_NOISE, sample_rng

Example = dict[str, np.ndarray]  # arguments of the model's forward for one row, or for a batch of them
Objective = Callable[[np.ndarray, np.random.Generator], Example]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SAMPLE = "sample/data"  # so named in checkpoints, which may outlive the folder that the code is in


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults suit the embedded corpus; paper, recalled: 1M tokens a batch, 500k updates, Adam, bf16."""

    data: str = flag(SAMPLE, "data folder written by data.py, or sample/data: the embedded corpus")
    steps: int = flag(400, "updates; 0 writes an initialised checkpoint")
    batch_size: int = flag(32, "rows an update, over all processes")
    micro_batch_size: int = flag(0, "rows at a time on one process, 0 for all of its share")
    seq_len: int = flag(64, "tokens a row, special ones included; with --init that checkpoint's max_len")
    lr: float = flag(0.0, "peak learning rate of AdamW, 0 for 0.016 / sqrt(d_model): 1e-3 at 256, 5e-4 at 1024")
    embed_lr: float = flag(0.0, "peak learning rate of the embedding, 0 for 3 times --lr")
    muon_lr: float = flag(0.02, "peak learning rate of Muon")
    optimizer: str = flag(
        "muon", "muon on the blocks' matrices and adamw on the rest, or adamw", choices=("muon", "adamw")
    )
    warmup: float = flag(0.02, "share of the steps in which the rate rises from 0; it then falls to 5 % of the peak")
    weight_decay: float = flag(0.1, "decoupled weight decay, on matrices only")
    alpha: float = flag(0.5, "languages are sampled in proportion to tokens ** alpha")
    seed: int = flag(0, "of rows, noise, initial weights and dropout")
    dtype: str = flag(
        "bf16",
        "matrix products in bf16, where the processor has it, or fp32; weights are fp32",
        choices=("bf16", "fp32"),
    )
    save_every: int = flag(500, "steps between checkpoints to resume from; one is written at the end anyway")
    eval_every: int = flag(500, "steps between held-out losses; they are taken at the end anyway")
    log_every: int = flag(10, "steps between lines of metrics.jsonl")
    keep: int = flag(1, "checkpoints to resume from that are kept, the newest")
    parallel: str = flag(
        "ddp", "several processes: each with a whole model, or with a shard of it", choices=("ddp", "fsdp")
    )
    activation_checkpointing: bool = flag(False, "keep no activations inside a layer: less memory, a third more time")
    compile: bool = flag(False, "compile the layers: slower to start, faster after that")
    workers: int = flag(0, "processes beside each training process that prepare its rows; 0: it does so itself")
    timeout: int = flag(600, "seconds after which a process that does not answer the others ends the run")

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "save_every", "eval_every", "log_every", "keep", "timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("steps", "micro_batch_size", "lr", "embed_lr", "muon_lr", "weight_decay", "seed", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.seed >= 1 << 64:
            raise ValueError(f"seed is {self.seed}: it must be below 2**64")
        for name in ("warmup", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be in [0, 1]")
        for name, most in (("timeout", 10**7), ("workers", 1000)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at most {most:,}")


# They change no result but by rounding, and with dropout by which units a row loses.
FREE_ON_RESUME = {"data", "micro_batch_size", "save_every", "eval_every", "log_every", "keep", "parallel"}
FREE_ON_RESUME |= {"activation_checkpointing", "compile", "workers", "timeout"}
MAX_NOT_FINITE = 3  # updates in a row


# Settings ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """All that a training script needs to know of its run, after flags, checkpoints and defaults are reconciled."""

    kind: str  # "encoder" or "seq2seq"
    out: Path
    settings: dict  # every flag, resolved
    train: TrainConfig
    model: ModelConfig
    own: object  # the script's own dataclass of flags
    data: TokenData
    init: dict | None  # the checkpoint of --init
    state: dict | None  # the checkpoint of --resume

    @property
    def folder(self) -> Path:
        """What the run keeps beside its result."""
        return self.out.with_suffix(".run")

    @property
    def history(self) -> list[dict]:
        """The stages before this one."""
        return self.state["history"][:-1] if self.state else self.init["history"] if self.init else []


def default_lr(d_model: int) -> float:
    """AdamW's peak rate where none is given; a width that no model can have is refused later, by ModelConfig."""
    return 0.016 / math.sqrt(max(1, d_model))


def _parse_flags(description: str, kind: str, configs: list[type]) -> dict:
    """Only the flags that were given; every field of the configs that has a default is one."""
    default_out = {"encoder": "enc.pt", "seq2seq": "seq2seq.pt"}[kind]
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, argument_default=argparse.SUPPRESS, formatter_class=as_written
    )
    parser.add_argument("--out", type=Path, default=Path(default_out), help="checkpoint to write (default %(default)s)")
    parser.add_argument("--init", help="encoder checkpoint to start from; it sets the model's shape")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --out")
    parser.add_argument("--preset", choices=PRESETS, help="model size (default micro); flags below change parts of it")
    for config in configs:
        group = parser.add_argument_group(config.__name__)
        for f in fields(config):
            if f.default is not MISSING and not (kind == "encoder" and f.metadata.get("decoder_only")):
                text = f.metadata["help"].replace("%", "%%")
                text += "" if f.metadata.get("from_preset") else f" (default {f.default})"
                more: dict = {"type": type(f.default), "choices": f.metadata.get("choices")}
                if type(f.default) is bool:
                    more = {"action": argparse.BooleanOptionalAction}
                group.add_argument(flag_name(f.name), dest=f.name, help=text, **more)
    return vars(parser.parse_args())


def start(description: str, kind: str, own: type) -> Run:
    """Reads the command line of a training script and reconciles it with the checkpoint of --init or --resume.

    Raises InputError where two of them contradict each other, naming the first field.
    """
    configs = [TrainConfig, ModelConfig, own]
    flags = _parse_flags(description, kind, configs)
    out, resume = flags.pop("out"), flags.pop("resume", False)
    preset = PRESETS.get(flags.pop("preset", None), {})
    if preset and kind == "encoder":
        preset = preset | {"n_decoder_layers": 0}
    defaults = {f.name: f.default for config in configs for f in fields(config)}
    if out.suffix != ".pt":
        raise InputError(f"--out {out}: name it something.pt; what the run keeps goes to something.run")
    _start_processes(build(TrainConfig, flags).timeout)
    folder, init, state = out.with_suffix(".run"), None, None
    newest = max(run_checkpoints(folder), default=folder)
    if resume:
        if newest == folder:
            raise InputError(f"{folder}: nothing to resume; start without --resume")
        state = load_checkpoint(newest, kind)
        shape = {name: value for name, value in preset.items() if name != "dropout"}  # of --init it was that encoder's
        settings = defaults | _resumed(state["config"] | state["settings"], shape | flags, newest)
        if out.exists() and state["spent"]["steps"] < settings["steps"]:
            raise InputError(f"{out}: exists, and is not of this run, which has not come to its end; move it away")
    else:
        for path in (out, newest):
            if path.exists() and path != folder:
                raise InputError(f"{path}: exists; go on with --resume, or give another --out")
        if not out.parent.is_dir():
            raise InputError(f"{out.parent}: no such folder to write {out.name} to; create it")
        init = load_checkpoint(Path(flags["init"]), "encoder") if "init" in flags else None
        settings = defaults | {"init": ""} | _shape(preset, init, flags) | flags
        if kind == "encoder":
            settings["n_decoder_layers"] = 0
        settings["max_len"] = settings["max_len"] or settings["seq_len"]
        settings["lr"] = settings["lr"] or default_lr(settings["d_model"])
        settings["embed_lr"] = settings["embed_lr"] or 3 * settings["lr"]
    train = build(TrainConfig, settings)
    if train.dtype == "bf16" and product_dtype("bf16") == torch.float32:
        say("this processor has no bf16 and would be 40 times slower with it: products are in fp32")
    if train.compile and device().type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("--compile: needs a C++ compiler, g++ or what CXX names; install one or leave the flag out")
    data = open_data(settings["data"], settings["seq_len"], settings["seed"], settings["alpha"])
    if state and state["data"] != data.fingerprint:
        raise InputError(f"{settings['data']}: not the data that {newest} was trained on; name that with --data")
    if init and init["tokenizer"] != data.tokenizer_model:
        raise InputError(f"{settings['data']}: its tokenizer is not that of {settings['init']}; use --tokenizer there")
    settings["vocab_size"] = data.ids.vocab_size
    model = build(ModelConfig, settings)
    if train.seq_len > model.max_len:
        raise InputError(f"--seq-len {train.seq_len}: the model has {model.max_len} positions; lower it")
    if state and state["config"] != asdict(model):
        raise InputError(f"{newest}: its model is not what its settings say; remove it, an older one may be beside it")
    return Run(kind, out, settings, train, model, build(own, settings), data, init, state)


def _resumed(stored: dict, flags: dict, newest: Path) -> dict:
    """The stored settings of a run, with those flags that change no result; any other flag must agree."""
    for name, value in flags.items():
        by_default = value == 0 and name in ("lr", "embed_lr", "max_len")  # stored as what 0 stood for
        if name not in FREE_ON_RESUME and stored.get(name) != value and not by_default:
            started = f"{newest} was started with {stored.get(name)}"
            remedy = "leave the flag out, or start anew under another --out"
            raise InputError(f"{flag_name(name)} {value}: {started}; {remedy}")
    return stored | {name: value for name, value in flags.items() if name in FREE_ON_RESUME}


def _shape(preset: dict, init: dict | None, flags: dict) -> dict:
    """Shape of a new run's model: the preset's, or that of --init's encoder with a decoder as deep, or micro's."""
    if init is None:
        return preset or PRESETS["micro"]
    shape = {name: value for name, value in init["config"].items() if name not in ("n_decoder_layers", "fusion")}
    for name, value in (preset | flags).items():
        if name != "dropout" and shape.get(name, value) != value:
            asked = f"{flag_name(name)} {value}"
            raise InputError(f"{flags['init']}: its {name} is {shape[name]}, the flags ask for {asked}; change one")
    return {"n_decoder_layers": shape["n_encoder_layers"]} | preset | shape | {"seq_len": shape["max_len"]}


def open_data(name: str, seq_len: int, seed: int = 0, alpha: float = 0.5) -> TokenData:
    """TokenData of a folder. That of the embedded corpus is made on first use; InputError where it cannot be."""
    folder = SAMPLE_DATA if name == SAMPLE else Path(name)
    if folder == SAMPLE_DATA and rank() == 0 and not folder.exists():
        try:  # elsewhere first: the folder is there whole or not at all, whoever else makes it meanwhile
            with tempfile.TemporaryDirectory(prefix="data.", dir=folder.parent) as new:
                prepare(SAMPLE_TEXT, Path(new) / "data", **SAMPLE_OPTIONS)
                (Path(new) / "data").rename(folder)
        except OSError as error:
            if not folder.exists():
                raise InputError(f"{folder}: cannot be made ({error.strerror}); use --data") from None
    if folder == SAMPLE_DATA and dist.is_initialized():
        dist.barrier()  # all of them: who comes late finds the folder made
    return TokenData(folder, seq_len, seed, alpha)


def new_model(run: Run) -> nn.Module:
    """The run's model with initial weights, from its seed and, with --init, from that checkpoint, which it lets go.

    Raises InputError where the checkpoint's weights do not fit.
    """
    torch.manual_seed(run.train.seed)
    model = MODELS[run.kind](run.model)
    if run.init:
        warm_start(model, run.settings["init"], run.init.pop("weights"))
    return model


# Processes ---------------------------------------------------------------------------------------------------------


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def keep_memory() -> None:
    """Has the C library keep the memory that is freed, where it is glibc, which by itself hands most of it back.

    Every update would else ask the system for its tensors' pages anew, and have each zeroed as it is first touched: on
    a CPU 3 to 20 % of an update (benchmarks/README.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most it takes: what is larger may still be mapped, and unmapped
        mallopt(M_TRIM_THRESHOLD, -1)  # the end of the heap is never handed back


def _start_processes(timeout: int) -> None:
    """Joins the process group that torchrun describes in the environment; alone, there is none."""
    keep_memory()
    if world() > 1 and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        except ValueError as error:  # WORLD_SIZE without the rest
            raise InputError(f"the environment is not torchrun's ({error}); start with torchrun") from None
    if torch.cuda.is_available():
        torch.cuda.set_device(device())


def _shard(model: nn.Module, dtype: str) -> None:
    """Splits every parameter over the processes (FSDP2): a group for each block, one for all the rest.

    The rest, with the shared embedding, is gathered in fp32: residual stream and norms stay what they are without it.
    """
    bf16 = torch.bfloat16 if product_dtype(dtype) == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False))


def stacks(model: nn.Module) -> list[nn.Module]:
    """The encoder and, where there is one, the decoder."""
    return [stack for stack in model.children() if hasattr(stack, "blocks")]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of both."""
    return [block for stack in stacks(model) for block in stack.blocks]


def _like(x: Tensor, p: Tensor) -> Tensor:
    """This process's part of a whole tensor, if p is shared by the processes."""
    if isinstance(p, DTensor) and x.shape == p.shape:
        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose update, a matrix, is brought near an orthogonal one (Jordan et al. 2024): `torch.optim.Muon`.

    That one iterates in bf16 always, this one in `dtype`: a CPU that has no bf16 takes 40 times as long for it.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 0.05)
                    update = _orthogonal(p.grad.lerp(momentum, 0.95).to(self.dtype))  # Nesterov's
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def _orthogonal(x: Tensor) -> Tensor:
    """Five steps of Newton and Schulz, by the coefficients of Jordan et al.: singular values come to 0.7 to 1.2."""
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), wide, beta=3.4445)
    return wide if x.shape[0] <= x.shape[1] else wide.T


def _restore(model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict) -> None:
    """Weights and optimizer state of a checkpoint, whole there, into a model that may be shared by the processes.

    Takes them out of `state`, for they are large.
    """
    own = model.state_dict()
    model.load_state_dict({name: _like(x, own[name]) for name, x in state.pop("weights").items()})
    for optimizer, stored in zip(optimizers, state.pop("optimizers"), strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        stored = {i: {name: _like(x, parameters[i]) for name, x in of_one.items()} for i, of_one in stored.items()}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": stored})


def _sum_over_ranks(values: list[float]) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device())
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


# Batches -----------------------------------------------------------------------------------------------------------


def collate(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """Stacks examples to tensors [B, longest] on the device, padded at the end: targets with IGNORE, tokens with pad.

    A src_mask is added only where a source was padded: without one attention is faster.
    """
    batch = {}
    for name in examples[0]:
        rows = [example[name] for example in examples]
        longest = max(len(row) for row in rows)
        filler = IGNORE if name in TARGETS else pad
        stacked = np.full((len(rows), longest), filler, np.int64)
        for row, values in zip(stacked, rows):
            row[: len(values)] = values
        batch[name] = torch.from_numpy(stacked)
        if name == "src" and min(len(row) for row in rows) < longest:
            lengths = torch.tensor([len(row) for row in rows])
            batch["src_mask"] = torch.arange(longest) < lengths[:, None]  # [B, S]
    return {name: x.to(device()) for name, x in batch.items()}


TARGETS = {"labels", "tgt_out"}  # the arguments of the models' forward that hold targets


def n_targets(examples: list[Example]) -> int:
    """Positions that carry a loss."""
    return sum(int((example[name] != IGNORE).sum()) for example in examples for name in example if name in TARGETS)


def valid_examples(data: TokenData, language: str, objective: Objective, at_most: int = 0) -> list[Example]:
    """Held-out rows of a language with fixed noise, spread evenly; all of them, or at_most so many.

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
    """Mean loss in nats for each language, over all processes; every process must call it. Leaves model.eval()."""
    model.eval()
    sums = []
    for language in languages:
        examples = valid_examples(data, language, objective, at_most)
        n = dist.get_world_size() if dist.is_initialized() else 1  # eval.py is one process even under torchrun
        mine, loss = examples[rank() :: n], 0.0
        for at in range(0, -(-len(examples) // n), 32):
            # Under FSDP all processes must take part in every pass: one that has no more rows repeats one, unheard.
            batch = collate(mine[at : at + 32] or examples[:1], data.ids.pad)
            with autocast(dtype):
                part = model(**batch).item()
            loss += part if mine[at : at + 32] else 0.0
        sums += [loss, n_targets(mine)]
    if isinstance(model, FSDPModule):
        model.reshard()  # what a pass without gradients leaves whole would not notice that the encoder freezes or thaws
    sums = _sum_over_ranks(sums)
    return {language: sums[2 * i] / max(1, sums[2 * i + 1]) for i, language in enumerate(languages)}


def product_dtype(dtype: str) -> torch.dtype:
    """What --dtype asks for, but fp32 on a CPU without bf16 instructions: it takes 40 times as long to do without."""
    on_cpu = device().type == "cpu"
    slow = on_cpu and not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if dtype == "bf16" and not slow else torch.float32


def autocast(dtype: str) -> torch.autocast:
    """Matrix products in bf16, or what the weights are in: of --dtype."""
    return torch.autocast(device().type, torch.bfloat16, enabled=product_dtype(dtype) == torch.bfloat16)


# The loop ----------------------------------------------------------------------------------------------------------


def _optimizers(model: nn.Module, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW on everything, or Muon (Jordan et al. 2024) on the blocks' matrices and AdamW on the rest.

    All parameters are there from step 0: one that is frozen has no gradient and is passed over. Weight decay is for
    matrices only. The embedding has a rate of its own, for most of its rows hear from few tokens of a batch.
    AlexaTM 20B: Adam, weight decay 0.1; betas, eps, clipping and the rates are ours.
    """
    muon = {n: p for n, p in model.named_parameters() if cfg.optimizer == "muon" and ".blocks." in n and p.ndim == 2}
    rest = {n: p for n, p in model.named_parameters() if n not in muon and n != "embed.weight"}
    groups = [
        {"params": [model.embed.weight], "lr": cfg.embed_lr, "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest.values() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, cfg.lr, (0.9, 0.98), eps=1e-6, fused=True)]
    if muon:
        optimizers.append(Muon(list(muon.values()), cfg.muon_lr, cfg.weight_decay, product_dtype(cfg.dtype)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate(step: int, cfg: TrainConfig) -> float:
    """Learning rate of a step as a share of its peak: linear rise, then linear fall to 5 % at the last step."""
    rise = cfg.warmup * cfg.steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 1 - 0.95 * (step - rise) / max(1, cfg.steps - 1 - rise)


def freeze_encoder(model: nn.Module, frozen: bool) -> None:
    """While frozen, encoder and shared embedding get no gradient and the encoder no dropout: it stays what it was."""
    for part in (model.embed, model.encoder):
        part.requires_grad_(not frozen)
        part.train(not frozen)


def fit(run: Run, model: nn.Module, objective: Objective, frozen: Callable[[int], bool] = lambda step: False) -> None:
    """Trains the model by the run's settings and writes its checkpoint; `frozen(step)` freezes the encoder.

    SIGTERM and SIGUSR1 end it after the next whole update, with a checkpoint to resume from. Raises InputError when
    the run cannot go on: another one writes there, the loss is no longer a number, another process is gone.
    """
    if run.train.batch_size % world():
        raise InputError(f"--batch-size {run.train.batch_size}: not a multiple of the {world()} processes; change it")
    for language in run.data.languages:
        run.data.n_valid_rows(language)  # better now than after days of training
    told_to_stop: list[int] = []
    before = {number: signal.signal(number, lambda n, _: told_to_stop.append(n)) for number in STOP_SIGNALS}
    try:
        with _Log(run) as log:
            _fit(run, model, objective, frozen, log, told_to_stop)
    except RuntimeError as error:
        for sign, meaning in LOST.items():
            if sign in str(error):
                raise OneProcessError(f"process {rank()}: {meaning}; start the run again with --resume") from None
        raise
    except OneProcessError as error:  # from a row worker it comes behind torch's account of where it was
        raise OneProcessError(str(error).strip().rsplit("OneProcessError: ", 1)[-1]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if dist.is_initialized():
        dist.destroy_process_group()


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOST = {  # what torch says of it
    "DataLoader worker": "a process that prepares rows died (out of memory?)",
    "Connection closed by peer": "another process of the run died",
    "Connection reset by peer": "another process of the run died",
    "Timed out": "another process of the run did not answer within --timeout",
    "timed out": "another process of the run did not answer within --timeout",
}


def _set_up(model: nn.Module, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """Brings the model to its device, in the form that the flags ask for, and makes its optimizers."""
    model.to(device())
    for stack in stacks(model):
        stack.checkpointing = cfg.activation_checkpointing
    if cfg.compile:
        for block in blocks(model):
            block.compile()
    if dist.is_initialized() and cfg.parallel == "fsdp":
        _shard(model, cfg.dtype)
    return _optimizers(model, cfg)


def _fit(
    run: Run, model: nn.Module, objective: Objective, frozen: Callable[[int], bool], log: "_Log", told_to_stop: list
) -> None:
    """The loop: from where the run stands to its last step, or until `told_to_stop` holds something."""
    cfg, data = run.train, run.data
    optimizers = _set_up(model, cfg)
    spent = {"steps": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "skipped": 0}
    if run.state:
        spent = spent | run.state["spent"]
        _restore(model, optimizers, run.state)

    def checkpoint() -> dict:
        history = run.history + [{"stage": run.kind, **spent, "settings": run.settings}]
        return as_checkpoint(run.kind, run.model, model.state_dict(), data.tokenizer_model, history)

    def save() -> None:
        state = {"spent": spent, "settings": run.settings, "data": data.fingerprint}
        state["optimizers"] = [optimizer.state_dict()["state"] for optimizer in optimizers]
        save_checkpoint(run.folder / f"{spent['steps']:09d}.pt", checkpoint() | state)
        if rank() == 0:
            for old in run_checkpoints(run.folder)[: -cfg.keep]:
                old.unlink()

    def validate() -> None:
        log.losses(spent["steps"], held_out_loss(model, data, data.languages, objective, cfg.dtype, at_most=64))

    wrapped, not_finite = None, []
    if cfg.steps and not spent["steps"]:
        validate()
    began = time.perf_counter()
    for step, examples in enumerate(_loader(run, objective, spent["steps"]), spent["steps"]):
        freeze_encoder(model.train(), frozen(step))
        if wrapped is None or frozen(step) != frozen(step - 1):
            wrapped = _wrap(model)
        loss, norm, flops, stop = _update(run, wrapped, optimizers, examples, step, frozen(step), bool(told_to_stop))
        not_finite = [] if math.isfinite(loss) and math.isfinite(norm) else [*not_finite, step]
        seconds, tokens = time.perf_counter() - began, cfg.batch_size * cfg.seq_len
        one = {"steps": 1, "tokens": tokens, "flops": flops, "seconds": seconds, "skipped": int(bool(not_finite))}
        spent = {name: spent[name] + one[name] for name in one}
        log.step(step, loss, norm, cfg.lr * rate(step, cfg), tokens / seconds)
        if len(not_finite) == MAX_NOT_FINITE:
            raise InputError(log.not_finite(not_finite))
        done = spent["steps"]
        if done % cfg.eval_every == 0 or done == cfg.steps:
            validate()
        if done % cfg.save_every == 0 or done == cfg.steps or stop:
            save()
        if stop and done < cfg.steps:
            say(f"{run.out}: stopped by a signal after {done} steps, all saved; go on with --resume")
            return
        began = time.perf_counter()
    if cfg.steps == 0 and not run.state:
        save()
    if run.out.exists():
        say(f"{run.out}: done already, after {cfg.steps} steps")
    else:
        if dist.is_initialized():
            dist.barrier()  # whoever comes late must still see that there was no file
        save_checkpoint(run.out, checkpoint())
        cost = f"{spent['tokens']:,} tokens, {spent['flops']:.3g} FLOPs, {spent['seconds']:.0f} s of training"
        say(f"{run.out}: {cfg.steps} steps, {cost}" + (f", {spent['skipped']} skipped" if spent["skipped"] else ""))
        if cfg.steps:
            say(f"{run.out}: {log.summary()}")


class _Batches(Dataset):
    """Step -> the examples of this process: a function of the step, whoever asks."""

    def __init__(self, run: Run, objective: Objective):
        self.run, self.objective = run, objective

    def __getitem__(self, step: int) -> list[Example]:
        cfg, data = self.run.train, self.run.data
        share = cfg.batch_size // world()
        first = step * cfg.batch_size + rank() * share
        return [self.objective(data.row(i), sample_rng(cfg.seed, NOISE, i)) for i in range(first, first + share)]


def _loader(run: Run, objective: Objective, done: int) -> DataLoader:
    """This process's examples of each step from `done` on, made by --workers processes or as they are asked for."""
    return DataLoader(
        _Batches(run, objective),
        batch_size=None,
        sampler=range(done, run.train.steps),
        collate_fn=lambda examples: examples,
        num_workers=run.train.workers,
        multiprocessing_context="fork" if run.train.workers else None,
        worker_init_fn=lambda _: os.setpgid(0, 0),  # a signal to the whole group would end them before their last rows
    )


def _wrap(model: nn.Module) -> nn.Module:
    """The model, under DDP where there are several whole copies of it.

    Wrapped anew when the encoder freezes or thaws: a live DDP does not see that, and its ranks would drift apart in
    silence. FSDP2 sees it.
    """
    if not dist.is_initialized() or isinstance(model, FSDPModule):
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextlib.contextmanager
def _gradients(wrapped: nn.Module, summed: bool) -> Iterator[None]:
    """Gradients of this backward pass are summed over the processes only if asked for: at the last micro-batch."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(summed)
    with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not summed else contextlib.nullcontext():
        yield


def _update(
    run: Run, wrapped: nn.Module, optimizers: list, examples: list[Example], step: int, frozen: bool, stop: bool
) -> tuple[float, float, float, bool]:
    """One update from this process's examples: (mean loss in nats, gradient norm, FLOPs) of the global batch, and
    whether any process was told to stop.

    The gradient is that of the mean loss over all targets of the global batch, however the batch is split. Where loss
    or norm is not a finite number the weights stay as they are: all processes see the same two numbers, so they agree.
    """
    cfg = run.train
    torch.manual_seed((cfg.seed << 32 ^ step << 8 ^ rank()) & (1 << 63) - 1)  # dropout
    all_targets = max(1, *_sum_over_ranks([n_targets(examples)]))  # rows of nothing but special tokens have none
    micro = cfg.micro_batch_size or len(examples)
    loss, flops = torch.zeros((), device=device()), 0.0
    for at in range(0, len(examples), micro):
        batch = collate(examples[at : at + micro], run.data.ids.pad)
        flops += batch_flops(run.model, batch, frozen)
        with _gradients(wrapped, summed=at + micro >= len(examples)):
            with autocast(cfg.dtype):
                part = wrapped(**batch)
            (part * (world() / all_targets)).backward()  # DDP and FSDP average over processes: undo that
        loss += part.detach()
    norm = nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    loss_sum, flops, stops = _sum_over_ranks([loss.item(), flops, float(stop)])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step, cfg)
        if math.isfinite(loss_sum) and math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    return loss_sum / all_targets, norm, flops, stops > 0


def run_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints to resume from in a run's folder, the newest last."""
    return sorted(folder.glob("[0-9]" * 9 + ".pt"))


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without the one that a run was killed at. Raises InputError for another file."""
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        if not all(isinstance(row["step"], int) for row in rows):
            raise ValueError
        return rows
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not lines of a run; remove it, its checkpoints do without") from None


class _Log:
    """Progress bar and metrics.jsonl of rank 0; a resumed run drops the lines that came after its checkpoint.

    Holds a lock on the run's folder, so that no two runs write there. Raises InputError where one does already, or
    where the folder cannot be written.
    """

    def __init__(self, run: Run):
        self.run, self.path, self.lock = run, run.folder / "metrics.jsonl", None
        self.entropy = sum(map(run.data.unigram_entropy, run.data.languages)) / len(run.data.languages)
        self.means: dict[int, float] = {}  # updates done -> held-out loss
        done = run.state["spent"]["steps"] if run.state else 0
        self.bar = tqdm(total=run.train.steps, initial=done, desc=run.out.name, disable=None if rank() == 0 else True)
        if rank() == 0:
            try:
                run.folder.mkdir(exist_ok=True)
                self.lock = open(run.folder / "lock", "w")
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
                old = read_metrics(self.path) if done and self.path.exists() else []
                # The loss of step n is of the update after checkpoint n, a held-out loss of the one before it.
                kept = [line for line in old if line["step"] < done + ("held_out" in line)]
                for part in run.folder.glob("*.part"):  # of a save that was cut short
                    part.unlink()
                if run.state is None and self.path.exists():  # of a run whose checkpoints are gone
                    self.path.rename(run.folder / f"metrics-{len(list(run.folder.glob('metrics*')))}.jsonl")
                self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
                self.means = {line["step"]: line["mean"] for line in kept if "held_out" in line}
            except BlockingIOError:
                self.lock.close()
                raise InputError(f"{run.folder}: another run writes there; wait, or give another --out") from None
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.lock:
            self.lock.close()

    def _write(self, **values: object) -> None:
        if rank() == 0:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error.strerror}); use --resume") from None

    def step(self, step: int, loss: float, norm: float, lr: float, speed: float) -> None:
        """One update: loss in nats, gradient norm, AdamW's rate, tokens a second."""
        self.bar.set_postfix_str(f"loss {loss:.3f}, norm {norm:.2f}, lr {lr:.1e}, {speed:,.0f} tokens/s")
        self.bar.update()
        if step % self.run.train.log_every == 0:
            self._write(step=step, loss=loss, grad_norm=norm, lr=lr, tokens_per_second=speed)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            say(f"step {step}: loss {loss}, gradient norm {norm}; skipped, the weights stay as they are")

    def losses(self, done: int, losses: dict[str, float]) -> None:
        """Held-out losses in nats, by language, after so many updates."""
        self.means[done] = mean = sum(losses.values()) / len(losses)
        self._write(step=done, held_out=losses, mean=mean)
        say(
            f"step {done}: held-out loss {mean:.3f}"
            + f", ln V = {math.log(self.run.model.vocab_size):.3f}" * (not done)
        )

    def summary(self) -> str:
        """What the run brought, beside the loss of who knows how frequent each piece is and ignores the context."""
        means = list(self.means.values())
        return f"held-out loss {means[0]:.2f} before, {means[-1]:.2f} after; of single pieces {self.entropy:.2f}"

    def not_finite(self, steps: list[int]) -> str:
        """Writes down the samples of these steps; returns what to tell the user."""
        size, path = self.run.train.batch_size, self.run.folder / "not-finite.json"
        samples, where = {step: list(range(step * size, (step + 1) * size)) for step in steps}, f"samples in {path}"
        if rank() == 0:
            try:
                path.write_text(json.dumps({"seed": self.run.train.seed, "samples": samples}) + "\n")
            except OSError as error:  # a full disk may be the lesser trouble
                where = f"{path} cannot be written ({error.strerror})"
        return f"{self.run.out}: loss or gradients not finite in steps {steps}; {where}; lower --lr"
