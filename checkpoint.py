"""Checkpoints: written whole or not at all, read without running code, and used to start new models.

    enc.pt   kind, config, weights (bare names), tokenizer, and the history of its stages: steps, tokens, FLOPs, seconds

A checkpoint to resume from also has the optimizer state (trainer.py). Tensors are stored whole, even if they were
sharded, so any number of processes can continue the run.
"""

import contextlib
import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from cli import InputError, cannot_write, out_of_memory, rank, say
from model import MaskedLM, ModelConfig, Seq2Seq

MODELS = {"encoder": MaskedLM, "seq2seq": Seq2Seq}


def as_checkpoint(
    kind: str, cfg: ModelConfig, weights: dict[str, Tensor], tokenizer: bytes, history: list[dict]
) -> dict:
    """The content of a finished checkpoint, without optimizer state."""
    return dict(kind=kind, config=asdict(cfg), weights=weights, tokenizer=tokenizer, history=history)


def _gathered(content: object) -> object:
    """Gathers every tensor of the content on the CPU of rank 0; other ranks get None. Every process must call this."""
    if isinstance(content, Tensor):
        whole = content.full_tensor() if hasattr(content, "full_tensor") else content
        return whole.detach().cpu() if rank() == 0 else None
    if isinstance(content, dict):
        return {key: _gathered(value) for key, value in content.items()}
    return [_gathered(value) for value in content] if isinstance(content, list) else content


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes to a temporary name, flushes to disk, renames: at any instant `path` is the old file or the new one.

    Rank 0 writes, but with sharded tensors every process must call it. If the file cannot be written, raises InputError
    and leaves the old file untouched.
    """
    content = _gathered(content)
    if rank() != 0:
        return
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's, on a full disk
        part.unlink(missing_ok=True)
        raise cannot_write(path, error) from None
    folder = os.open(path.parent, os.O_RDONLY)  # the rename changed the folder: flush it too
    with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
        os.fsync(folder)
    os.close(folder)


def load_checkpoint(path: Path, *kinds: str) -> dict:
    """Reads a checkpoint of one of the kinds ("encoder", "seq2seq") onto the CPU.

    Raises InputError for a file that is missing, damaged, of another kind, or that could run code when loaded because
    it holds more than tensors and plain values.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run the command that writes it first") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # torch raises many kinds for such a file
        if out_of_memory(error):
            raise
        reason = "damaged, not a checkpoint, or one with more than tensors and plain values in it"
        raise InputError(f"{path}: refused: {reason}; fetch or make it again") from None
    if not isinstance(checkpoint, dict) or not {"kind", "config", "weights", "tokenizer", "history"} <= set(checkpoint):
        raise InputError(f"{path}: not a checkpoint of this project; train_encoder.py writes one")
    if kinds and checkpoint["kind"] not in kinds:
        remedy = "take its encoder out with extract.py" if "encoder" in kinds else "train one with train_seq2seq.py"
        raise InputError(f"{path}: a checkpoint of kind {checkpoint['kind']!r}, not {' or '.join(kinds)}; {remedy}")
    checkpoint["config"] = {"positions": "learned"} | checkpoint["config"]  # all that older versions had
    return checkpoint


def load_model(path: Path, *kinds: str) -> tuple[nn.Module, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint. Raises InputError as load_checkpoint does."""
    checkpoint = load_checkpoint(path, *kinds)
    with torch.device("meta"):
        model = MODELS[checkpoint["kind"]](ModelConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["weights"], assign=True)
    return model.eval(), checkpoint


def warm_start(model: nn.Module, path: object, weights: dict[str, Tensor]) -> None:
    """Copies a checkpoint's weights into the model and prints what was loaded, what is new and what was unused.

    Raises InputError unless each part (embed, encoder, decoder, head ...) loads whole or not at all, and embed and
    encoder do load. A model that silently lacks half of its weights looks much like one that trains badly.
    """
    random = model.state_dict()
    loaded = {name for name in random if name in weights and random[name].shape == weights[name].shape}
    found = {"loaded": loaded, "new": random.keys() - loaded, "unused": weights.keys() - loaded}
    part = {name: "cross-attention" if ".cross" in name else name.split(".")[0] for name in random | weights}
    whole = {part[name] for name in loaded} | {"embed", "encoder"}
    if unfit := sorted(name for name in found["new"] | found["unused"] if part[name] in whole):
        raise InputError(f"{path}: does not fit this model: {unfit[0]} is missing, unexpected or of another shape")
    model.load_state_dict({name: weights[name] for name in loaded}, strict=False)
    parts = {title: ", ".join(sorted({part[name] for name in names})) or "-" for title, names in found.items()}
    say(f"{path}: " + ", ".join(f"{title} {len(found[title])} tensors ({parts[title]})" for title in found))
