"""Numbered lines and rows of files in the formats that results and the tasks' data come in."""

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from cli import InputError

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def unpacked(path: Path) -> Path:
    """A path without .gz, .xz or .bz2."""
    return path.with_suffix("") if path.suffix in OPENERS else path


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, packed or not. Raises InputError with file and line."""
    number = 0
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: cannot be read ({error}); fetch the file again") from None


def parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Numbered rows of a parquet file; classes, which are numbers there, by their names in the schema."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise InputError(f"{path}: to read parquet files, pip install pyarrow") from None
    try:
        table = read_table(path)
    except (OSError, ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch the file again") from None
    info = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    features = {column: x.get("feature") or x for column, x in info.get("features", {}).items() if isinstance(x, dict)}
    classes = {column: dict(enumerate(x["names"])) for column, x in features.items() if x.get("_type") == "ClassLabel"}
    for number, row in enumerate(table.to_pylist(), 1):
        for column, names in classes.items():
            value = row[column]
            row[column] = [*map(names.get, value)] if isinstance(value, list) else names.get(value)
        yield number, row


def rows(path: Path) -> Iterator[tuple[int, dict | list[str]]]:
    """Numbered rows: named fields of a parquet or JSON file; else columns, which tabs separate.

    Raises InputError with file and line.
    """
    if path.suffix == ".parquet":
        yield from parquet_rows(path)
        return
    in_csv = re.compile(r'"([^"]|"")*""([^"]|"")*"')  # a field with quotes in it, as csv writers quote it
    for number, line in lines(path):
        if not line.strip():
            continue
        if unpacked(path).suffix not in (".json", ".jsonl"):
            yield number, [x[1:-1].replace('""', '"') if in_csv.fullmatch(x) else x for x in line.split("\t")]
            continue
        try:
            yield number, dict(json.loads(line))
        except (ValueError, TypeError):
            raise InputError(f"{path}:{number}: not a JSON object; write one a line") from None
