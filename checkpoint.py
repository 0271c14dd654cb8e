"""Checkpoints: one zip archive that torch.load reads, written whole or not at all, trusted only after it was checked.

    enc.pt   kind, config, weights (bare names), tokenizer, and the history of its stages: steps, tokens, FLOPs, seconds

A checkpoint to resume from has the optimizers' state besides (trainer.py). Tensors are whole, whatever was split over
processes, so that any number of them may go on.
"""

import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from cli import InputError, rank, say
from data import load_tokenizer
from model import MaskedLM, ModelConfig, Seq2Seq

MODELS = {"encoder": MaskedLM, "seq2seq": Seq2Seq}


def as_checkpoint(
    kind: str, cfg: ModelConfig, weights: dict[str, Tensor], tokenizer: bytes, history: list[dict]
) -> dict:
    """What a checkpoint to hand on holds."""
    return dict(kind=kind, config=asdict(cfg), weights=weights, tokenizer=tokenizer, history=history)


def _map(content: object, f: Callable[[Tensor], object]) -> object:
    """The content with f(x) in place of each tensor x."""
    if isinstance(content, Tensor):
        return f(content)
    if isinstance(content, dict):
        return {key: _map(value, f) for key, value in content.items()}
    return [_map(value, f) for value in content] if isinstance(content, (list, tuple)) else content


def _whole(x: Tensor) -> Tensor:
    """A tensor on the CPU, put together from its shards where processes share it: a collective call."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().cpu()


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes to a temporary name, flushes to the disk, renames: at any instant `path` is the old file or the new one.

    Rank 0 writes; with shared tensors every process must call it. Tensors are gathered and written one by one, so that
    no process ever holds a second copy of the model: torch.save lays out the archive without the tensors' data, which
    then go to their places. Raises InputError when the file cannot be written; what was there before is untouched.
    """
    tensors: list[Tensor] = []
    empty = _map(content, lambda x: (tensors.append(x), torch.empty(x.shape, dtype=x.dtype))[1])
    if rank() != 0:
        for x in tensors:
            if hasattr(x, "full_tensor"):
                x.full_tensor()
        return
    part = path.with_name(path.name + ".part")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as layout, open(part, "wb") as file:  # layout: a sparse file
            with torch.serialization.skip_data():
                torch.save(empty, layout)
            with zipfile.ZipFile(layout) as frame, zipfile.ZipFile(file, "w") as archive:
                entries = {entry.filename: entry for entry in frame.infolist()}
                records = {name for name in entries if name.rpartition("/")[0].endswith("/data")}
                stem = next(iter(records)).rpartition("/")[0] if records else ""
                for name in entries.keys() - records:
                    archive.writestr(name, frame.read(name))
                for i, x in enumerate(tensors):
                    data = _whole(x).contiguous().flatten().view(torch.uint8).numpy()
                    with archive.open(f"{stem}/{i}", "w", force_zip64=True) as record:
                        record.write(data.data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself lives in the folder
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise InputError(
            f"{path}: cannot be written ({reason}); make room or name another --out; a run goes on with --resume"
        ) from None


def load_checkpoint(path: Path, *kinds: str) -> dict:
    """A checkpoint of one of the kinds ("encoder", "seq2seq"), on the CPU.

    Raises InputError for a file that is missing, damaged, of another kind, not what it says it is, or holds anything
    but tensors and plain values: such a file could run code when loaded, and is refused.
    """
    _check_archive(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        unsafe = "weights_only" in str(error).lower() or "unsupported" in str(error).lower()
        reason = "it holds more than tensors and plain values" if unsafe else "damaged or not a checkpoint"
        raise InputError(f"{path}: refused, {reason}; fetch or make it anew") from None
    if not isinstance(checkpoint, dict) or not {"kind", "config", "weights", "tokenizer", "history"} <= set(checkpoint):
        raise InputError(f"{path}: not a checkpoint of this project; train_encoder.py writes one")
    if kinds and checkpoint["kind"] not in kinds:
        remedy = "take its encoder out with extract.py" if "encoder" in kinds else "train one with train_seq2seq.py"
        raise InputError(f"{path}: a checkpoint of kind {checkpoint['kind']!r}, not {' or '.join(kinds)}; {remedy}")
    if isinstance(checkpoint["config"], dict):  # those of before there was a choice have learned positions
        checkpoint["config"] = {"positions": "learned"} | checkpoint["config"]
    check_content(path, checkpoint)
    return checkpoint


def _check_archive(path: Path) -> None:
    """Every byte of the archive against its checksums, which torch.load does not look at; nothing may be compressed."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(None, "not a file")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries)
            if packed or sum(e.file_size for e in entries) > path.stat().st_size or archive.testzip():
                raise zipfile.BadZipFile
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run the command that writes it first") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:  # zipfile raises many kinds for a damaged file
        raise InputError(f"{path}: refused, damaged or not a checkpoint; fetch or make it anew") from None


def check_content(path: Path, checkpoint: dict) -> None:
    """Config, weights, tokenizer and history against each other, before anything is built as large as they claim.

    Raises InputError, naming `path`.
    """
    try:
        weights, cfg = checkpoint["weights"], ModelConfig(**checkpoint["config"])
        _map(checkpoint, _check_tensor)
        with torch.device("meta"):
            own = MODELS[checkpoint["kind"]](cfg).state_dict()
        for name in own.keys() | weights.keys():
            if name not in own or name not in weights or weights[name].shape != own[name].shape:
                raise ValueError(f"{name} is missing, of another shape, or one too many")
            if weights[name].dtype != torch.float32:
                raise ValueError(f"{name} is {weights[name].dtype}, not float32")
        for stage in checkpoint["history"]:
            numbers = [stage[key] + 0 for key in ("steps", "tokens", "flops", "seconds")]
            sound = isinstance(stage["stage"], str) and isinstance(stage["settings"], dict)
            seq_len = stage["settings"].get("seq_len", 1)
            sound &= type(seq_len) is int and 1 <= seq_len <= cfg.max_len
            sound &= isinstance(stage["settings"].get("data", ""), str)
            if not sound or not all(0 <= number < 1e30 for number in numbers):
                raise ValueError("its history is not one")
        n_pieces = load_tokenizer(checkpoint["tokenizer"], path).vocab_size()
        if n_pieces != cfg.vocab_size:
            raise ValueError(f"{n_pieces} pieces for {cfg.vocab_size} embeddings")
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path}: its parts do not fit each other ({reason}); make it anew") from None


def _check_tensor(x: Tensor) -> None:
    """A tensor can claim any shape over few bytes."""
    if not x.is_contiguous() or x.layout != torch.strided or x.untyped_storage().nbytes() < x.numel() * x.itemsize:
        raise ValueError("a tensor claims more than there is")


def load_model(path: Path, *kinds: str) -> tuple[nn.Module, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint. Raises InputError as load_checkpoint does."""
    checkpoint = load_checkpoint(path, *kinds)
    with torch.device("meta"):
        model = MODELS[checkpoint["kind"]](ModelConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["weights"], assign=True)
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
    counts = [
        f"{title} {len(names)} tensors ({', '.join(sorted({part[name] for name in names})) or '-'})"
        for title, names in {"loaded": loaded, **rest}.items()
    ]
    say(f"{path}: {', '.join(counts)}")
