"""What every command shares: one-line errors, the exit status, the process's rank, and flags made from dataclasses."""

import contextlib
import fcntl
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm


class InputError(ValueError):
    """A user's mistake: one line that says what is wrong and how to fix it. Commands exit with status 2."""


class OneProcessError(InputError):
    """An error that only one of several processes may see, such as a bad row that it alone reads."""


def rank() -> int:
    """Number of this process among those that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def say(line: str) -> None:
    """Prints a line from rank 0 without breaking a progress bar. A run outlives a closed terminal or a full disk."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            tqdm.write(line)


def out_of_memory(error: Exception) -> bool:
    """Whether memory is what lacked: torch says so by a RuntimeError."""
    return isinstance(error, MemoryError) or re.search("(out of|allocate) memory", str(error)) is not None


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function and exits: 0, or 2 with one line on stderr, or 130 after Ctrl-C.

    An error that is a bug keeps its traceback. With several processes, each exits at once and skips the interpreter's
    tear-down: a thread of the process group that frees a tensor during it would abort the process
    (github.com/pytorch/pytorch/issues/190489).
    """
    name, status = Path(sys.argv[0]).name, 0
    for stream in (sys.stdout, sys.stderr):  # an ASCII terminal or log gets \u escapes instead of a traceback
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if isinstance(error, InputError):
            line = f"{name}: {' '.join(str(error).split())}"
        elif isinstance(error, OSError):
            where, reason = error.filename or f"{name}: its output", (error.strerror or str(error)).lower()
            line = f"{where}: {reason}; change its permissions, make room or choose another"
            if error.filename is None:  # stdout is gone: drop what is still buffered
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        elif out_of_memory(error):
            reason = str(error).split("\n")[0][:200]
            line = f"{name}: out of memory ({reason}); use smaller micro-batches or a smaller model"
        else:
            raise
        status = 2
        if isinstance(error, BrokenPipeError):  # the reader of the output, such as `head`, has quit
            status = 128 + signal.SIGPIPE
        elif isinstance(error, OneProcessError) or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(line, file=sys.stderr)
        elif not isinstance(error, InputError):  # a user's mistake is the same for all processes of a machine
            print(f"process {rank()}: {line}", file=sys.stderr)
    if world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def cannot_write(path: Path, error: Exception) -> InputError:
    """What to raise if a run cannot write a file: the error of a full disk does not name it."""
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    remedy = "make room (or its folder) or give another --out; a training run continues with --resume"
    return InputError(f"{path}: cannot be written ({reason}); {remedy}")


def append_json(path: Path, *rows: dict) -> None:
    """Appends JSON lines to a file, at once: other runs may write there too. Raises InputError if it cannot."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise cannot_write(path, error) from None


def lock_file(path: Path, busy: str) -> BinaryIO:
    """Opens a file, or makes it, and locks it until it is closed; a killed process releases it, after 5 s at most.

    Raises InputError with what `busy` says if another process has locked it.
    """
    file = open(path, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(busy) from None
    except OSError as error:  # network file systems that cannot lock
        say(f"{path}: cannot be locked ({error.strerror}); make sure that nothing else writes there")
    return file


def flag(default: object, text: str, **more: object) -> object:
    """A dataclass field that is also a command-line flag.

    `more` may hold bounds (`least`, `most`, `above`, `below`), `choices`, `from_preset` (a preset sets its default) and
    `decoder_only`.
    """
    return field(default=default, metadata={"help": text, **more})


def check_bounds(config: object) -> None:
    """Raises ValueError for the first field of a config whose value its flag does not allow."""
    bounds = {
        "least": (lambda x, bound: x >= bound, "at least"),
        "most": (lambda x, bound: x <= bound, "at most"),
        "above": (lambda x, bound: x > bound, "above"),
        "below": (lambda x, bound: x < bound, "below"),
    }
    for f in fields(config):
        value = getattr(config, f.name)
        for key, (holds, words) in bounds.items():
            if key in f.metadata and not holds(value, f.metadata[key]):
                raise ValueError(f"{f.name} is {value}: it must be {words} {f.metadata[key]}")
        if value not in (f.metadata.get("choices") or [value]):
            raise ValueError(f"{f.name} is {value!r}: it must be one of {', '.join(f.metadata['choices'])}")


def build(config: type, settings: dict) -> object:
    """Builds a config dataclass from the settings it has fields for. Raises InputError, naming the wrong flag."""
    try:
        built = config(**{f.name: settings[f.name] for f in fields(config) if f.name in settings})
        check_bounds(built)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise InputError(f"{flag_name(name)} {rest}") from None
    return built


def flag_name(name: str) -> str:
    """The command-line flag of a config's field."""
    return "--" + (name.removeprefix("n_") if name.endswith("_layers") else name).replace("_", "-")
