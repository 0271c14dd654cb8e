"""The one training loop, for both stages: flags, process group, optimizer, schedule, freezing, checkpoints, ledger.

A run is a function of its settings: sample i and its noise follow from (seed, i), dropout from (seed, step), freezing
from the step. So a checkpoint holds weights, optimizer and one integer, and a resumed run repeats the run that was
not interrupted. Everything about one objective stays in train_encoder.py and train_seq2seq.py.

    enc.pt                  the result, one file to hand on: weights, shape, tokenizer, history of its stages
    enc.run/state.pt        the newest checkpoint to resume from
    enc.run/metrics.jsonl   what the progress bar showed, and the held-out losses
"""

import argparse
import contextlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# Imported once a process group exists (DDP does), its functions hold the group as a default argument: gloo's threads
# then live on past its destruction, and now and then one meets the interpreter's end and aborts the process.
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import SAMPLE_DATA, SAMPLE_OPTIONS, SAMPLE_TEXT, TokenData, prepare
from model import IGNORE, PRESETS, MaskedLM, ModelConfig, Seq2Seq, flag
from objectives import NOISE, VALID_NOISE, InputError, sample_rng

Example = dict[str, np.ndarray]  # arguments of the model's forward for one row, or for a batch of them
Objective = Callable[[np.ndarray, np.random.Generator], Example]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults suit the embedded corpus; paper: 1M tokens a batch, 500k updates, Adam, bf16."""

    data: str = flag(str(SAMPLE_DATA), "data folder written by data.py")
    steps: int = flag(150, "updates; 0 writes an initialised checkpoint")
    batch_size: int = flag(32, "rows an update, over all processes")
    micro_batch_size: int = flag(0, "rows at a time on one process, 0 for all of its share")
    seq_len: int = flag(128, "tokens a row, special ones included; with --init that checkpoint's max_len")
    lr: float = flag(0.0, "peak learning rate of AdamW, 0 for 0.016 / sqrt(d_model): 1e-3 at 256, 5e-4 at 1024")
    embed_lr: float = flag(0.0, "peak learning rate of the embedding, 0 for 3 times --lr")
    muon_lr: float = flag(0.02, "peak learning rate of Muon")
    optimizer: str = flag("adamw", "adamw, or muon on the blocks' matrices beside it", choices=("adamw", "muon"))
    warmup: float = flag(0.02, "share of the steps in which the rate rises from 0; it then falls to 5 % of the peak")
    weight_decay: float = flag(0.1, "decoupled weight decay, on matrices only")
    alpha: float = flag(0.5, "languages are sampled in proportion to tokens ** alpha")
    seed: int = flag(0, "of rows, noise, initial weights and dropout")
    dtype: str = flag("bf16", "matrix products in bf16 or fp32; weights are fp32", choices=("bf16", "fp32"))
    save_every: int = flag(500, "steps between checkpoints to resume from; one is written at the end anyway")
    eval_every: int = flag(500, "steps between held-out losses; they are taken at the end anyway")
    log_every: int = flag(10, "steps between lines of metrics.jsonl")

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "save_every", "eval_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("steps", "micro_batch_size", "lr", "embed_lr", "muon_lr", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.seed >= 1 << 64:
            raise ValueError(f"seed is {self.seed}: it must be below 2**64")
        for name in ("warmup", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be in [0, 1]")


FREE_ON_RESUME = {"data", "micro_batch_size", "save_every", "eval_every", "log_every"}  # they change no result


# Checkpoints -------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes to a temporary name, flushes to the disk, renames: at any instant `path` is the old file or the new one.

    Raises InputError when the file cannot be written; what was there before is untouched.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself lives in the folder
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise InputError(f"{path}: cannot be written ({reason}); make room and use --resume") from None


def load_checkpoint(path: Path, *kinds: str) -> dict:
    """A checkpoint of one of the kinds ("encoder", "seq2seq"), on the CPU.

    Raises InputError for a file that is missing, cut short, of another kind, or holds anything but tensors and plain
    values: such a file could run code when loaded, and is refused.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run the command that writes it first") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        unsafe = "weights_only" in str(error).lower() or "unsupported" in str(error).lower()
        reason = "it holds more than tensors and plain values" if unsafe else "damaged or not a checkpoint"
        raise InputError(f"{path}: refused, {reason}") from None
    if not isinstance(checkpoint, dict) or not {"kind", "config", "weights", "tokenizer", "history"} <= set(checkpoint):
        raise InputError(f"{path}: not a checkpoint of this project")
    if kinds and checkpoint["kind"] not in kinds:
        remedy = "take its encoder out with extract.py" if "encoder" in kinds else "train one with train_seq2seq.py"
        raise InputError(f"{path}: a checkpoint of kind {checkpoint['kind']!r}, not {' or '.join(kinds)}; {remedy}")
    return checkpoint


def load_model(path: Path, *kinds: str) -> tuple[nn.Module, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint. Raises InputError as load_checkpoint does."""
    checkpoint = load_checkpoint(path, *kinds)
    try:
        model = {"encoder": MaskedLM, "seq2seq": Seq2Seq}[checkpoint["kind"]](ModelConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: its weights do not fit its config ({str(error).splitlines()[0]})") from None
    return model.eval(), checkpoint


def warm_start(model: nn.Module, path: object, weights: dict[str, Tensor]) -> None:
    """Copies a checkpoint's weights into the model and prints what was loaded, what is new and what was unused.

    A part (embed, encoder, decoder, head ...) is taken whole or not at all, and embed and encoder must be taken: a
    model that silently lacks half of what it was to start from looks much like one that trains badly. Else InputError.
    """
    own = model.state_dict()
    loaded = [name for name in own if name in weights and own[name].shape == weights[name].shape]
    rest = {"new": own.keys() - loaded, "unused": weights.keys() - loaded}
    part = {name: "cross-attention" if ".cross" in name else name.split(".")[0] for name in own | weights}
    taken = {part[name] for name in loaded}
    unfit = [name for names in rest.values() for name in sorted(names) if part[name] in taken | {"embed", "encoder"}]
    if unfit:
        raise InputError(f"{path}: does not fit this model: {unfit[0]} is missing, of another shape, or one too many")
    model.load_state_dict({name: weights[name] for name in loaded}, strict=False)
    for title, names in {"loaded": loaded, **rest}.items():
        _say(f"{path}: {title} {len(names)} tensors ({', '.join(sorted({part[name] for name in names})) or '-'})")


# Settings ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """All that a training script needs to know of its run, after flags, checkpoints and defaults are reconciled."""

    kind: str  # "encoder" or "seq2seq"
    out: Path
    settings: dict  # every flag, resolved
    train: TrainConfig
    model: ModelConfig
    objective: object  # the script's own dataclass of flags
    data: TokenData
    init: dict | None  # the checkpoint of --init
    state: dict | None  # the checkpoint of --resume

    @property
    def folder(self) -> Path:
        return self.out.with_suffix(".run")

    @property
    def history(self) -> list[dict]:
        """The stages before this one."""
        return self.state["history"][:-1] if self.state else self.init["history"] if self.init else []


def build(config: type, settings: dict) -> object:
    """A config dataclass from the settings that it has fields for. Raises InputError naming the flag that is off."""
    try:
        return config(**{f.name: settings[f.name] for f in fields(config) if f.name in settings})
    except ValueError as error:
        raise InputError(f"--{str(error).replace('_', '-')}") from None


def _parse_flags(description: str, kind: str, configs: list[type]) -> dict:
    """Only the flags that were given; every field of the configs that has a default is one."""
    default_out = {"encoder": "enc.pt", "seq2seq": "seq2seq.pt"}[kind]
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(default_out), help="checkpoint to write (default %(default)s)")
    parser.add_argument("--init", help="encoder checkpoint to start from; it sets the model's shape")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --out")
    parser.add_argument("--preset", choices=PRESETS, help="model size (default tiny); flags below change parts of it")
    for config in configs:
        group = parser.add_argument_group(config.__name__)
        for f in fields(config):
            if f.default is not MISSING and not (kind == "encoder" and f.metadata.get("decoder_only")):
                name = {"n_decoder_layers": "decoder_layers", "n_encoder_layers": "encoder_layers"}.get(f.name, f.name)
                text = f.metadata["help"].replace("%", "%%")
                text += "" if f.metadata.get("from_preset") else f" (default {f.default})"
                more: dict = {"type": type(f.default), "choices": f.metadata.get("choices")}
                if type(f.default) is bool:
                    more = {"action": "store_true"}
                group.add_argument(f"--{name.replace('_', '-')}", dest=f.name, help=text, **more)
    return vars(parser.parse_args())


def start(description: str, kind: str, objective: type) -> Run:
    """Reads the command line of a training script and reconciles it with the checkpoint of --init or --resume.

    Raises InputError where two of them contradict each other, naming the first field.
    """
    configs = [TrainConfig, ModelConfig, objective]
    flags = _parse_flags(description, kind, configs)
    out, resume = flags.pop("out"), flags.pop("resume", False)
    preset = PRESETS.get(flags.pop("preset", None))
    defaults = {f.name: f.default for config in configs for f in fields(config)}
    if out.suffix != ".pt":
        raise InputError(f"--out {out}: name it something.pt; what the run keeps goes to something.run")
    _start_processes()
    newest, init, state = out.with_suffix(".run") / "state.pt", None, None
    if resume:
        if not newest.exists():
            raise InputError(f"{newest}: nothing to resume; start without --resume")
        state = load_checkpoint(newest, kind)
        settings = defaults | _resumed(state["settings"], {**(preset or {}), **flags}, newest)
    else:
        for path in (out, newest):
            if path.exists():
                raise InputError(f"{path}: exists; go on with --resume, or give another --out")
        if not out.parent.is_dir():
            raise InputError(f"{out.parent}: no such folder to write {out.name} to; create it")
        init = load_checkpoint(Path(flags["init"]), "encoder") if "init" in flags else None
        settings = defaults | {"init": ""} | _shape(preset, init, flags) | flags
        if kind == "encoder":
            settings["n_decoder_layers"] = 0
        settings["max_len"] = settings["max_len"] or settings["seq_len"]
        settings["lr"] = settings["lr"] or 0.016 / math.sqrt(settings["d_model"])
        settings["embed_lr"] = settings["embed_lr"] or 3 * settings["lr"]
    if settings["seq_len"] > settings["max_len"]:
        raise InputError(f"--seq-len {settings['seq_len']}: the model has {settings['max_len']} positions; lower it")
    train = build(TrainConfig, settings)
    data = open_data(Path(settings["data"]), settings["seq_len"], settings["seed"], settings["alpha"])
    if state and state["data"] != data.fingerprint:
        raise InputError(f"{settings['data']}: not the data that {newest} was trained on; name that with --data")
    if init and init["tokenizer"] != data.tokenizer_model:
        raise InputError(f"{settings['data']}: its tokenizer is not that of {settings['init']}; use --tokenizer there")
    settings["vocab_size"] = data.ids.vocab_size
    model, own = build(ModelConfig, settings), build(objective, settings)
    return Run(kind, out, settings, train, model, own, data, init, state)


def _resumed(stored: dict, flags: dict, newest: Path) -> dict:
    """The stored settings of a run, with those flags that change no result; any other flag must agree."""
    for name, value in flags.items():
        if name not in FREE_ON_RESUME and stored.get(name) != value:
            started = f"{newest} was started with {stored.get(name)}"
            remedy = "leave the flag out, or start anew under another --out"
            raise InputError(f"--{name.replace('_', '-')} {value}: {started}; {remedy}")
    return stored | {name: value for name, value in flags.items() if name in FREE_ON_RESUME}


def _shape(preset: dict | None, init: dict | None, flags: dict) -> dict:
    """Shape of a new run's model: the preset's, or that of --init's encoder with a decoder as deep, or tiny's."""
    if init is None:
        return preset or PRESETS["tiny"]
    shape = {name: value for name, value in init["config"].items() if name not in ("n_decoder_layers", "fusion")}
    for name, value in {**(preset or {}), **flags}.items():
        if name != "dropout" and shape.get(name, value) != value:
            raise InputError(f"{flags['init']}: its {name} is {shape[name]}, the flags ask for {value}; change one")
    return {"n_decoder_layers": shape["n_encoder_layers"]} | (preset or {}) | shape | {"seq_len": shape["max_len"]}


def open_data(folder: Path, seq_len: int, seed: int = 0, alpha: float = 0.5) -> TokenData:
    """TokenData of a folder; that of the embedded corpus is made on first use."""
    if folder == SAMPLE_DATA and not (folder / "meta.json").exists():
        if _rank() == 0:
            prepare(SAMPLE_TEXT, folder, **SAMPLE_OPTIONS)
        if dist.is_initialized():
            dist.barrier()
    return TokenData(folder, seq_len, seed, alpha)


# Processes ---------------------------------------------------------------------------------------------------------


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def _start_processes() -> None:
    """Joins the process group that torchrun describes in the environment; alone, there is none."""
    if _world() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(device())


def _sum_over_ranks(values: list[float]) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device())
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


# Batches -----------------------------------------------------------------------------------------------------------


def collate(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """Stacks examples to tensors [B, longest], padded at the end: targets with IGNORE, tokens with pad.

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
    return batch


TARGETS = {"labels", "tgt_out"}  # the argument of forward that holds the targets, by the model's kind


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
        examples = valid_examples(data, language, objective, at_most)[_rank() :: _world()]
        loss = 0.0
        for at in range(0, len(examples), 32):
            batch = collate(examples[at : at + 32], data.ids.pad)
            with _autocast(dtype):
                loss += model(**{name: x.to(device()) for name, x in batch.items()}).item()
        sums += [loss, n_targets(examples)]
    sums = _sum_over_ranks(sums)
    return {language: sums[2 * i] / sums[2 * i + 1] for i, language in enumerate(languages)}


def _autocast(dtype: str) -> torch.autocast:
    return torch.autocast(device().type, torch.bfloat16, enabled=dtype == "bf16")


# The loop ----------------------------------------------------------------------------------------------------------


def train_flops(cfg: ModelConfig, rows: int, source: int, target: int, n_targets: int, frozen: bool = False) -> float:
    """Matrix-product FLOPs of one update, forward and backward, on `rows` rows of `source` and `target` tokens.

    A backward pass costs twice its forward: one product for the inputs' gradient, one for the weights'. A frozen
    encoder has no backward; neither have the decoder's gradient for its output nor that for the frozen embedding.
    Attention fusion, less than a thousandth of an encoder's products, is left out.
    (Soltan et al. 2023 compare compute by counting a stack's forward as 1 and its backward as 2.)
    """
    d, layer = cfg.d_model, 2 * (4 * cfg.d_model**2 + 2 * cfg.d_model * cfg.d_ff)  # a block's products, per token
    encoder = rows * cfg.n_encoder_layers * (source * layer + 4 * source**2 * d)
    projection = 2 * n_targets * d * cfg.vocab_size
    if cfg.n_decoder_layers == 0:
        return 3 * (encoder + n_targets * 2 * d**2 + projection)
    cross_kv = rows * cfg.n_decoder_layers * source * 4 * d**2
    cross = rows * cfg.n_decoder_layers * (target * 4 * d**2 + 4 * target * source * d)
    decoder = rows * cfg.n_decoder_layers * (target * layer + 4 * target**2 * d) + cross
    return 3 * decoder + (encoder + 2 * (cross_kv + projection) if frozen else 3 * (encoder + cross_kv + projection))


def batch_flops(cfg: ModelConfig, batch: dict[str, Tensor], frozen: bool = False) -> float:
    """train_flops of a collated batch, padding included: the decoder projects every position, the MLM head only those
    that carry a label."""
    rows, source = batch["src"].shape
    if "labels" in batch:
        return train_flops(cfg, rows, source, 0, int((batch["labels"] != IGNORE).sum()))
    target = batch["tgt_in"].shape[1]
    return train_flops(cfg, rows, source, target, rows * target, frozen)


def _optimizers(model: nn.Module, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW on everything, or Muon (Jordan et al. 2024) on the blocks' matrices and AdamW on the rest.

    All parameters are there from step 0: one that is frozen has no gradient and is passed over. Weight decay is for
    matrices only. The embedding has a rate of its own, for most of its rows hear from few tokens of a batch.
    paper: Adam, weight decay 0.1; betas, eps, clipping and the rates are ours.
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
        optimizers.append(torch.optim.Muon(muon.values(), cfg.muon_lr, weight_decay=cfg.weight_decay))
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
    """Trains the model by the run's settings and writes its checkpoint; `frozen(step)` freezes the encoder."""
    cfg, data = run.train, run.data
    if cfg.batch_size % _world():
        raise InputError(f"--batch-size {cfg.batch_size}: not a multiple of the {_world()} processes")
    for language in data.languages:
        data.n_valid_rows(language)  # better now than after days of training
    model.to(device())
    optimizers = _optimizers(model, cfg)
    spent = {"steps": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0}
    if run.state:
        spent = run.state["spent"]
        model.load_state_dict(run.state["weights"])
        for optimizer, state in zip(optimizers, run.state["optimizers"]):
            optimizer.load_state_dict(state)
    log, parallel = _Log(run, spent["steps"]), None

    def checkpoint() -> dict:
        weights = {name: x.cpu() for name, x in model.state_dict().items()}
        history = run.history + [{"stage": run.kind, **spent, "settings": run.settings}]
        content = {"kind": run.kind, "config": asdict(run.model), "weights": weights, "history": history}
        return content | {"tokenizer": data.tokenizer_model}

    def evaluate_and_save() -> None:
        done = spent["steps"]
        if done and (done % cfg.eval_every == 0 or done == cfg.steps):
            log.losses(done, held_out_loss(model, data, data.languages, objective, cfg.dtype, at_most=64))
        if _rank() == 0 and (done % cfg.save_every == 0 or done == cfg.steps):
            state = {"spent": spent, "settings": run.settings, "data": data.fingerprint}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            save_checkpoint(run.folder / "state.pt", checkpoint() | state)

    for step in range(spent["steps"], cfg.steps):
        began = time.perf_counter()
        freeze_encoder(model.train(), frozen(step))
        if parallel is None or (dist.is_initialized() and frozen(step) != frozen(step - 1)):
            # A live DDP does not see the change: its ranks would drift apart in silence.
            parallel = DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.is_initialized() else model
        share = cfg.batch_size // _world()
        first = step * cfg.batch_size + _rank() * share
        examples = [objective(data.row(i), sample_rng(cfg.seed, NOISE, i)) for i in range(first, first + share)]
        loss, norm, flops = _update(run, parallel, optimizers, examples, step, frozen(step))
        seconds, tokens = time.perf_counter() - began, cfg.batch_size * cfg.seq_len
        one = {"steps": 1, "tokens": tokens, "flops": flops, "seconds": seconds}
        spent = {name: spent[name] + one[name] for name in one}
        log.step(step, loss, norm, cfg.lr * rate(step, cfg), tokens / seconds)
        evaluate_and_save()
    if cfg.steps == 0:
        evaluate_and_save()
    if _rank() == 0 and not run.out.exists():
        save_checkpoint(run.out, checkpoint())
        cost = f"{spent['tokens']:,} tokens, {spent['flops']:.3g} FLOPs, {spent['seconds']:.0f} s of training"
        _say(f"{run.out}: {cfg.steps} steps, {cost}")
    if dist.is_initialized():
        del parallel  # it holds the group
        dist.destroy_process_group()


def _update(
    run: Run, parallel: nn.Module, optimizers: list, examples: list[Example], step: int, frozen: bool
) -> tuple[float, float, float]:
    """One update from this process's examples: (mean loss in nats, gradient norm, FLOPs), all of the global batch.

    The gradient is that of the mean loss over all targets of the global batch, however the batch is split.
    """
    cfg = run.train
    torch.manual_seed((cfg.seed << 32 ^ step << 8 ^ _rank()) & (1 << 63) - 1)  # dropout
    (all_targets,) = _sum_over_ranks([n_targets(examples)])
    micro = cfg.micro_batch_size or len(examples)
    loss, flops = torch.zeros((), device=device()), 0.0
    for at in range(0, len(examples), micro):
        batch = {name: x.to(device()) for name, x in collate(examples[at : at + micro], run.data.ids.pad).items()}
        flops += batch_flops(run.model, batch, frozen)
        synchronise = at + micro >= len(examples) or not dist.is_initialized()
        with contextlib.nullcontext() if synchronise else parallel.no_sync():
            with _autocast(cfg.dtype):
                part = parallel(**batch)
            (part * (_world() / all_targets)).backward()  # DDP averages over processes: undo that
        loss += part.detach()
    norm = nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad()
    loss_sum, flops = _sum_over_ranks([loss.item(), flops])
    return loss_sum / all_targets, float(norm), flops


def _say(line: str) -> None:
    if _rank() == 0:
        tqdm.write(line)


class _Log:
    """Progress bar and metrics.jsonl of rank 0; a resumed run drops the lines that came after its checkpoint."""

    def __init__(self, run: Run, done: int):
        self.run, self.path = run, run.folder / "metrics.jsonl"
        self.bar = tqdm(total=run.train.steps, initial=done, desc=run.out.name, disable=None if _rank() == 0 else True)
        if _rank() == 0:
            try:
                run.folder.mkdir(exist_ok=True)
                old = self.path.read_text().splitlines() if done and self.path.exists() else []
                # A line may be torn where the run was killed; the loss of step n is of the update after checkpoint n.
                lines = [json.loads(line) for line in old if line.endswith("}")]
                kept = [line for line in lines if line["step"] < done + ("held_out" in line)]
                self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _write(self, **values: object) -> None:
        if _rank() == 0:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error.strerror}); use --resume") from None

    def step(self, step: int, loss: float, norm: float, lr: float, speed: float) -> None:
        if step == 0:
            _say(f"step 0: loss {loss:.3f}, ln V = {math.log(self.run.model.vocab_size):.3f}")
        self.bar.set_postfix_str(f"loss {loss:.3f}, norm {norm:.2f}, lr {lr:.1e}, {speed:,.0f} tokens/s")
        self.bar.update()
        if step % self.run.train.log_every == 0:
            self._write(step=step, loss=loss, grad_norm=norm, lr=lr, tokens_per_second=speed)

    def losses(self, done: int, losses: dict[str, float]) -> None:
        mean = sum(losses.values()) / len(losses)
        self._write(step=done, held_out=losses, mean=mean)
        _say(f"step {done}: held-out loss {mean:.3f} ({', '.join(f'{x} {y:.2f}' for x, y in losses.items())})")
