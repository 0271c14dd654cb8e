"""The settings of a run: the training flags, and how flags, a preset and a checkpoint become one Run."""

import argparse
import math
import tempfile
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import torch.distributed as dist

from checkpoint import load_checkpoint
from cli import InputError, build, check_bounds, flag, flag_name, rank, say
from data import SAMPLE_DATA, SAMPLE_OPTIONS, SAMPLE_TEXT, TokenData, prepare
from model import PRESETS, ModelConfig

SAMPLE = "sample/data"  # how a checkpoint's settings name the embedded corpus, wherever the code lies


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults suit the embedded corpus. The paper's (recalled): 1M tokens a batch, 500k updates."""

    data: str = flag(SAMPLE, "data folder written by data.py, or sample/data: the embedded corpus")
    steps: int = flag(400, "updates; 0 writes an initialised checkpoint", least=0)
    batch_size: int = flag(32, "rows per update, over all processes", least=1)
    micro_batch_size: int = flag(0, "rows that a process takes at a time; 0: its whole share", least=0)
    seq_len: int = flag(64, "tokens per row, special ones included; default with --init: its max_len", least=1)
    lr: float = flag(0.0, "peak learning rate of AdamW, 0 for 0.016 / sqrt(d_model)", least=0)
    embed_lr: float = flag(0.0, "peak learning rate of the embedding, 0 for 3 times --lr", least=0)
    muon_lr: float = flag(0.02, "peak learning rate of Muon", least=0)
    optimizer: str = flag(
        "muon", "muon: Muon for the blocks' matrices, AdamW for the rest; adamw: only AdamW", choices=("muon", "adamw")
    )
    warmup: float = flag(0.02, "share of the steps over which the learning rate rises from 0", least=0, most=1)
    schedule: str = flag(
        "linear",
        "linear: the rate then falls steadily to 5 % of its peak; wsd: only in the last fifth of the steps, for a run "
        "that may be extended",
        choices=("linear", "wsd"),
    )
    weight_decay: float = flag(0.1, "decoupled weight decay, for matrices only", least=0)
    alpha: float = flag(0.5, "languages are sampled in proportion to tokens ** alpha", least=0, most=1)
    seed: int = flag(0, "seed for rows, noise, initial weights and dropout", least=0, below=1 << 64)
    dtype: str = flag(
        "bf16",
        "matrix products in bf16 where the processor has it, or fp32; weights are fp32",
        choices=("bf16", "fp32"),
    )
    save_every: int = flag(500, "steps between checkpoints to resume from; one is always written at the end", least=1)
    eval_every: int = flag(500, "steps between held-out losses; they are always computed at the end", least=1)
    log_every: int = flag(10, "steps between lines of metrics.jsonl", least=1)
    keep: int = flag(1, "how many checkpoints to resume from are kept", least=1)
    parallel: str = flag("ddp", "ddp: each process holds the whole model; fsdp: a shard", choices=("ddp", "fsdp"))
    compile: bool = flag(False, "compile the layers: slower to start, faster after that")
    workers: int = flag(0, "processes that prepare rows for each training process; 0: it does so itself", least=0)
    timeout: int = flag(600, "seconds to wait for an unresponsive process before the run ends", least=1)
    first_steps: int = 0  # the original --steps of an extended run, which shares of the steps still refer to

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def begun_steps(self) -> int:
        """The steps that --warmup and --unfreeze-at are shares of: those the run began with."""
        return self.first_steps or self.steps


# Settings that may change when a run is resumed. They affect only rounding and dropout's random numbers.
FREE_ON_RESUME = {"data", "micro_batch_size", "save_every", "eval_every", "log_every", "keep", "parallel"}
FREE_ON_RESUME |= {"compile", "workers", "timeout"}


@dataclass
class Run:
    """Everything a training script needs to know, once flags, checkpoints and defaults are reconciled."""

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
        """Where the run keeps its log and the checkpoints to resume from."""
        return self.out.with_suffix(".run")

    @property
    def history(self) -> list[dict]:
        """The stages before this one."""
        return self.state["history"][:-1] if self.state else self.init["history"] if self.init else []


def default_lr(d_model: int) -> float:
    """AdamW's peak rate if none is given: 1e-3 at width 256, 5e-4 at 1024."""
    return 0.016 / math.sqrt(max(1, d_model))


def parse_flags(description: str, kind: str, objective: type) -> dict:
    """The flags that were given on the command line, and `out`."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, argument_default=argparse.SUPPRESS, formatter_class=as_written
    )
    out = Path({"encoder": "enc.pt", "seq2seq": "seq2seq.pt"}[kind])
    parser.add_argument("--out", type=Path, default=out, help="checkpoint to write (default %(default)s)")
    parser.add_argument("--init", help="encoder checkpoint to start from; it sets the model's shape")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of --out, if any")
    parser.add_argument("--preset", choices=PRESETS, help="model size (default micro); flags below override it")
    for config in (TrainConfig, ModelConfig, objective):
        group = parser.add_argument_group(config.__name__)
        for f in fields(config):
            if "help" not in f.metadata or (kind == "encoder" and f.metadata.get("decoder_only")):
                continue
            text = f.metadata["help"].replace("%", "%%")
            text += "" if f.metadata.get("from_preset") else f" (default {f.default})"
            more: dict = {"type": type(f.default), "choices": f.metadata.get("choices")}
            if type(f.default) is bool:
                more = {"action": argparse.BooleanOptionalAction}
            group.add_argument(flag_name(f.name), dest=f.name, help=text, **more)
    return vars(parser.parse_args())


def run_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints to resume from in a run's folder, the newest last."""
    return sorted(folder.glob("[0-9]" * 9 + ".pt"))


def make_run(kind: str, flags: dict, objective: type) -> Run:
    """Reconciles the flags with the checkpoint of --init or --resume.

    Raises InputError if they contradict each other, naming the first such field.
    """
    out, resume, preset = flags.pop("out"), flags.pop("resume", False), PRESETS.get(flags.pop("preset", None), {})
    if out.suffix != ".pt":
        raise InputError(f"--out {out}: name it something.pt; the run's own files go to something.run")
    if preset and kind == "encoder":
        preset = preset | {"n_decoder_layers": 0}
    newest = max(run_checkpoints(out.with_suffix(".run")), default=None)
    init, state = None, None
    if resume and newest:
        state, settings = _resumed(kind, out, newest, preset, flags)
    else:
        if resume and out.exists():
            raise InputError(f"{out}: exists, but its run has no checkpoint to resume from; give another --out")
        init, settings = _fresh(kind, out, newest, preset, flags)
        if resume:
            say(f"{out.with_suffix('.run')}: nothing to resume; starting a new run")
    configs = [TrainConfig, ModelConfig, objective]
    settings = {f.name: f.default for c in configs for f in fields(c) if f.default is not MISSING} | settings
    train = build(TrainConfig, settings)
    data = open_data(train.data, train.seq_len, train.seed, train.alpha)
    if state and state["data"] != data.fingerprint:
        raise InputError(f"{train.data}: not the data that {newest} was trained on; give that with --data")
    if init and init["tokenizer"] != data.tokenizer_model:
        raise InputError(f"{train.data}: its tokenizer is not that of {settings['init']}; use --tokenizer there")
    settings["vocab_size"] = data.ids.vocab_size
    settings["max_len"] = settings["max_len"] or train.seq_len
    settings["lr"] = settings["lr"] or default_lr(settings["d_model"])
    settings["embed_lr"] = settings["embed_lr"] or 3 * settings["lr"]
    train, model = build(TrainConfig, settings), build(ModelConfig, settings)
    if train.seq_len > model.max_len:
        raise InputError(f"--seq-len {train.seq_len}: the model has {model.max_len} positions; lower it")
    if state and state["config"] != asdict(model):
        raise InputError(
            f"{newest}: its model differs from its settings; remove it, and resume from an older one if any"
        )
    return Run(kind, out, settings, train, model, build(objective, settings), data, init, state)


def _resumed(kind: str, out: Path, newest: Path, preset: dict, flags: dict) -> tuple[dict, dict]:
    """The newest checkpoint of a run, and its settings updated by the flags that may change. Other flags must agree."""
    state = load_checkpoint(newest, kind)
    stored, more = state["config"] | state["settings"], {}
    if flags.get("steps", 0) > stored["steps"]:
        more = {"steps": flags.pop("steps"), "first_steps": stored.get("first_steps") or stored["steps"]}
        longer = f"extended from {stored['steps']:,} to {more['steps']:,} steps"
        say(f"{out}: {longer}; the learning rate follows the longer schedule")
    if out.exists() and state["spent"]["steps"] < stored["steps"] and not stored.get("first_steps"):
        raise InputError(f"{out}: exists but is not the result of this run, which is unfinished; move it away")
    if stored["init"]:
        preset = {name: value for name, value in preset.items() if name != "dropout"}  # the encoder's was kept
    for name, value in (preset | flags).items():
        is_default = value == 0 and name in ("lr", "embed_lr", "max_len")  # stored as the value that 0 stands for
        if name not in FREE_ON_RESUME and stored.get(name) != value and not is_default:
            remedy = "leave the flag out, or start a new run under another --out"
            raise InputError(f"{flag_name(name)} {value}: {newest} was started with {stored.get(name)}; {remedy}")
    return state, stored | {name: value for name, value in flags.items() if name in FREE_ON_RESUME} | more


def _fresh(kind: str, out: Path, newest: Path | None, preset: dict, flags: dict) -> tuple[dict | None, dict]:
    """The checkpoint of --init and the settings of a new run, which must not overwrite another run's files."""
    for path in (out, newest):
        if path and path.exists():
            raise InputError(f"{path}: exists; continue it with --resume, or give another --out")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder to write {out.name} to; create it")
    init = load_checkpoint(Path(flags["init"]), "encoder") if "init" in flags else None
    settings = {"init": ""} | (_shape_of_init(preset, init, flags) if init else preset or PRESETS["micro"]) | flags
    return init, settings | ({"n_decoder_layers": 0} if kind == "encoder" else {})


def _shape_of_init(preset: dict, init: dict, flags: dict) -> dict:
    """The shape of --init's encoder. By default the decoder is as deep, and --seq-len is the encoder's max_len."""
    shape = {name: value for name, value in init["config"].items() if name not in ("n_decoder_layers", "fusion")}
    for name, value in (preset | flags).items():
        if name != "dropout" and shape.get(name, value) != value:
            asked = f"{flag_name(name)} {value}"
            raise InputError(f"{flags['init']}: its {name} is {shape[name]}, the flags ask for {asked}; change one")
    return {"n_decoder_layers": shape["n_encoder_layers"]} | preset | shape | {"seq_len": shape["max_len"]}


def open_data(name: str, seq_len: int, seed: int = 0, alpha: float = 0.5) -> TokenData:
    """Opens a data folder. Encodes the embedded corpus on first use; raises InputError if that fails."""
    folder = SAMPLE_DATA if name == SAMPLE else Path(name)
    if folder == SAMPLE_DATA and rank() == 0 and not folder.exists():
        say("encoding the embedded corpus, once")
        try:  # make it elsewhere, then rename: the folder is never half there, even if two processes make it
            with tempfile.TemporaryDirectory(prefix="data.", dir=folder.parent) as new:
                prepare(SAMPLE_TEXT, Path(new) / "data", **SAMPLE_OPTIONS)
                (Path(new) / "data").rename(folder)
        except OSError as error:
            if not folder.exists():
                raise InputError(f"{folder}: cannot be made ({error.strerror}); use --data") from None
    if folder == SAMPLE_DATA and dist.is_initialized():
        dist.barrier()  # until rank 0 has made the folder
    return TokenData(folder, seq_len, seed, alpha)
