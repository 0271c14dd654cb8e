"""The settings of a run: the training flags, and how flags, a preset and a checkpoint become one Run."""

import argparse
import math
import tempfile
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch.distributed as dist

from checkpoint import load_checkpoint
from cli import InputError, build, flag, flag_name, rank, say
from data import SAMPLE_DATA, SAMPLE_OPTIONS, SAMPLE_TEXT, TokenData, prepare
from model import ModelConfig

SAMPLE = "sample/data"  # how a checkpoint's settings name the embedded corpus, wherever the code lies


# paper: 12 layers; width 1024, 16 heads, FFN 4096, dropout 0.1 and learned positions as in AlexaTM 20B's code. With
# learned positions an encoder stays far longer at the loss of single pieces (results/README.md). The others are ours:
# micro suits the embedded corpus, tiny some MB of text on a CPU. Neither has dropout: such short runs do not overfit.
PRESETS: dict[str, dict] = {
    "micro": dict(d_model=128, n_heads=4, d_ff=512, n_encoder_layers=4, n_decoder_layers=4, dropout=0.0),
    "tiny": dict(d_model=256, n_heads=4, d_ff=1024, n_encoder_layers=4, n_decoder_layers=4, dropout=0.0),
    "small": dict(d_model=512, n_heads=8, d_ff=2048, n_encoder_layers=6, n_decoder_layers=6, dropout=0.1),
    "base": dict(d_model=768, n_heads=12, d_ff=3072, n_encoder_layers=12, n_decoder_layers=12, dropout=0.1),
    "paper": dict(
        d_model=1024, n_heads=16, d_ff=4096, n_encoder_layers=12, n_decoder_layers=12, dropout=0.1, positions="learned"
    ),
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults suit the embedded corpus. The paper's (recalled): 1M tokens a batch, 500k updates."""

    data: str = flag(SAMPLE, "data folder written by data.py (sample/data: the embedded corpus); with --init: its data")
    steps: int = flag(400, "updates; 0 writes an initialised checkpoint", least=0)
    batch_size: int = flag(32, "rows per update, over all processes", least=1)
    micro_batch_size: int = flag(0, "rows that a process takes at a time; 0: its whole share", least=0)
    seq_len: int = flag(64, "tokens per row, special ones included; default with --init: its max_len", least=1)
    lr: float = flag(0.0, "peak learning rate of AdamW, 0 for 0.016 / sqrt(d_model)", least=0)
    embed_lr: float = flag(0.0, "peak learning rate of the embedding, 0 for 3 times --lr", least=0)
    muon_lr: float = flag(0.02, "peak learning rate of Muon", least=0)
    optimizer: str = flag("muon", "what trains the blocks' matrices; AdamW trains the rest", choices=("muon", "adamw"))
    warmup: float = flag(0.02, "share of the steps over which the learning rate rises from 0", least=0, most=1)
    schedule: str = flag("wsd", "how the rate falls; wsd: in the last fifth only", choices=("wsd", "linear"))
    weight_decay: float = flag(0.1, "decoupled weight decay, for matrices only", least=0)
    alpha: float = flag(0.5, "languages are sampled in proportion to tokens ** alpha", least=0, most=1)
    seed: int = flag(0, "seed for rows, noise, initial weights and dropout", least=0, below=1 << 64)
    dtype: str = flag("bf16", "of matrix products; bf16 only if the processor has it", choices=("bf16", "fp32"))
    save_every: int = flag(500, "steps between checkpoints to resume from; one is always written at the end", least=1)
    eval_every: int = flag(500, "steps between held-out losses; they are always computed at the end", least=1)
    log_every: int = flag(10, "steps between lines of metrics.jsonl", least=1)
    keep: int = flag(1, "how many checkpoints to resume from are kept", least=1)
    parallel: str = flag("ddp", "ddp: each process holds the whole model; fsdp: a shard", choices=("ddp", "fsdp"))
    compile: bool = flag(False, "compile the layers: slower to start, faster after that")
    workers: int = flag(0, "processes that prepare rows for each training process; 0: it does so itself", least=0)
    timeout: int = flag(600, "seconds to wait for an unresponsive process before the run ends", least=1)
    first_steps: int = 0  # the original --steps of an extended run, which shares of the steps still refer to

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


def default_lr(d_model: int) -> float:
    """AdamW's peak rate if none is given: 1e-3 at width 256, 5e-4 at 1024."""
    return 0.016 / math.sqrt(max(1, d_model))


def settings_of(checkpoint: dict) -> dict:
    """The settings that a checkpoint was trained with; those of a later stage win."""
    # a model from elsewhere has no history, and the last stage of an extracted encoder has no settings
    settings = {"data": SAMPLE, "dtype": "fp32", "seq_len": checkpoint["config"]["max_len"]}
    for stage in checkpoint["history"]:
        settings |= stage["settings"]
    return settings


def parse_flags(description: str, kind: str, objective: type) -> dict:
    """The flags that were given on the command line, and `out`."""
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
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
    if kind == "encoder":
        flags["n_decoder_layers"] = 0
    flags = {name: x for name, x in flags.items() if x or name not in ("lr", "embed_lr", "max_len")}  # 0: the default
    newest = max(run_checkpoints(out.with_suffix(".run")), default=None)
    init = state = None
    if resume and newest:
        state = load_checkpoint(newest, kind)
        settings = _resumed(out, newest, state, preset, flags)
    else:
        init, settings = _fresh(out, newest, preset, flags)
        if resume:
            say(f"{out.with_suffix('.run')}: nothing to resume; starting a new run")
    configs = (TrainConfig, ModelConfig, objective)
    settings = {f.name: f.default for c in configs for f in fields(c) if f.default is not MISSING} | settings
    settings["max_len"] = settings["max_len"] or settings["seq_len"]
    settings["lr"] = settings["lr"] or default_lr(settings["d_model"])
    settings["embed_lr"] = settings["embed_lr"] or 3 * settings["lr"]
    train = build(TrainConfig, settings)
    data = open_data(train.data, train.seq_len, train.seed, train.alpha)
    if state and state["data"] != data.fingerprint:
        remedy = "give that with --data or, if languages were added to it, move their <lang>.* away"
        raise InputError(f"{train.data}: not the data that {newest} was trained on; {remedy}")
    if init and init["tokenizer"] != data.tokenizer_model:
        raise InputError(f"{train.data}: its tokenizer is not that of {settings['init']}; use --tokenizer there")
    settings["vocab_size"] = data.ids.vocab_size
    model = build(ModelConfig, settings)
    if train.seq_len > model.max_len:
        raise InputError(f"--seq-len {train.seq_len}: the model has {model.max_len} positions; lower it")
    if state and train.steps > state["settings"]["steps"]:
        extended = f"extended from {state['settings']['steps']:,} to {train.steps:,} steps"
        say(f"{out}: {extended}; the learning rate follows the longer schedule")
    return Run(kind, out, settings, train, model, build(objective, settings), data, init, state)


def _resumed(out: Path, newest: Path, state: dict, preset: dict, flags: dict) -> dict:
    """The settings of a run's newest checkpoint, updated by the flags that may change. Other flags must agree."""
    stored = state["config"] | state["settings"]
    free = {name: flags.pop(name) for name in FREE_ON_RESUME & flags.keys()}
    if flags.get("steps", 0) > stored["steps"]:
        free["steps"] = flags.pop("steps")
        free["first_steps"] = stored.get("first_steps") or stored["steps"] or free["steps"]  # 0: was initialised only
    if out.exists() and state["spent"]["steps"] < stored["steps"] and not stored.get("first_steps"):
        raise InputError(f"{out}: exists but is not the result of this run, which is unfinished; move it away")
    _must_agree(preset | {"dropout": stored["dropout"]} | flags, stored, newest)  # --init's, whatever the preset's
    return stored | free


def _fresh(out: Path, newest: Path | None, preset: dict, flags: dict) -> tuple[dict | None, dict]:
    """The checkpoint of --init and the settings of a new run, which must not overwrite another run's files."""
    for path in (out, newest):
        if path and path.exists():
            raise InputError(f"{path}: exists; give another --out, or --resume if its run still has a checkpoint")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder to write {out.name} to; create it")
    if "init" not in flags:
        return None, {"init": ""} | (preset or PRESETS["micro"]) | flags
    init = load_checkpoint(Path(flags["init"]), "encoder")
    shape = {name: value for name, value in init["config"].items() if name not in ("n_decoder_layers", "fusion")}
    given = {name: value for name, value in (preset | flags).items() if name in shape and name != "dropout"}
    _must_agree(given, shape, flags["init"])
    default = {"n_decoder_layers": shape["n_encoder_layers"], "seq_len": shape["max_len"]}
    default["data"] = settings_of(init)["data"]
    if "data" not in flags and default["data"] != SAMPLE:
        say(f"{flags['init']} was trained on {default['data']}: so is this model; --data names another folder")
    return init, default | preset | shape | flags


def _must_agree(given: dict, fixed: dict, source: object) -> None:
    """Raises InputError for the first given value that differs from the fixed one."""
    for name, value in given.items():
        if fixed.get(name) != value:
            remedy = "leave the flag or --preset out, or start another run"
            raise InputError(f"{flag_name(name)} {value}: {source} has {fixed.get(name)}; {remedy}")


def open_data(name: str, seq_len: int, seed: int = 0, alpha: float = 0.5) -> TokenData:
    """Opens a data folder. Encodes the embedded corpus on first use; raises InputError if that fails."""
    folder = SAMPLE_DATA if name == SAMPLE else Path(name)
    if name == SAMPLE and (own := Path(name).resolve()).is_dir() and own != SAMPLE_DATA:
        raise InputError(f"--data {name}: means the embedded corpus; to use the folder {own}, give its whole path")
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
