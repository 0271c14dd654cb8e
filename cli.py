"""What every command shares: its mistakes in one line, its exit status, its processes, and flags out of dataclasses."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path

from tqdm import tqdm


class InputError(ValueError):
    """A mistake of the user's: one line that names what is wrong and the remedy; the commands exit with status 2."""


class OneProcessError(InputError):
    """A fault that only one of several processes may see: that of a row, say, which one of them alone reads."""


def rank() -> int:
    """Number of this process among those that torchrun started; 0 alone."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes torchrun started; 1 alone."""
    return int(os.environ.get("WORLD_SIZE", 1))


def say(line: str) -> None:
    """Prints a line once, however many processes there are, and leaves a progress bar whole.

    A run outlives its terminal, or the disk that takes what it prints: what cannot be written is let go.
    """
    if rank() == 0:
        with contextlib.suppress(OSError):
            tqdm.write(line)


def out_of_memory(error: Exception) -> bool:
    """Whether it says so: numpy by a MemoryError, torch by a RuntimeError."""
    signs = ("out of memory", "allocate memory", "size calculation overflowed")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function; an InputError becomes one line on stderr and exit status 2.

    One process of several ends at once, without the interpreter's tear-down: a thread of the process group that lets go
    of a tensor in that moment would abort it, its work all done (github.com/pytorch/pytorch/issues/190489).
    """
    status = 0
    name = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        if rank() == 0 or isinstance(error, OneProcessError):  # under torchrun every process finds the same mistake
            print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except OSError as error:
        if error.filename is None:  # of what it prints: the rest has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 2
        if isinstance(error, BrokenPipeError):  # whoever read it, `head` for one, is gone
            status = 128 + signal.SIGPIPE
        else:
            where, reason = error.filename or f"{name}: what it writes", (error.strerror or str(error)).lower()
            print(f"{where}: {reason}; change its permissions, make room or name another", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).split("\n")[0][:200]
        print(f"{name}: out of memory ({reason}); smaller micro-batches or a smaller model need less", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    if world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def flag(default: object, text: str, **more: object) -> object:
    """A dataclass field that is also a command-line flag; `more` may hold `choices`, `from_preset`, `decoder_only`."""
    return field(default=default, metadata={"help": text, **more})


def build(config: type, settings: dict) -> object:
    """A config dataclass from the settings that it has fields for. Raises InputError naming the flag that is off."""
    given = {f.name: settings[f.name] for f in fields(config) if f.name in settings}
    for f in fields(config):
        if f.name in given and not isinstance(given[f.name], (int, float) if f.type is float else f.type):
            raise InputError(f"{flag_name(f.name)} {given[f.name]!r}: a {f.type.__name__} is needed")
    try:
        return config(**given)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise InputError(f"{flag_name(name)} {rest}") from None


def flag_name(name: str) -> str:
    """The command-line flag of a config's field."""
    short = {"n_decoder_layers": "decoder_layers", "n_encoder_layers": "encoder_layers"}.get(name, name)
    return f"--{short.replace('_', '-')}"
