"""Reads documents from text files in the usual formats; data.py turns them into tokens.

TEXT holds <lang>.<ext> or <lang>/*. ext is txt (a document ends at a blank line, or after 64 kB), jsonl, ndjson or json
(one object a line, its text under "text", else "content"), each also as .gz, .xz, .bz2 or .zst, or parquet. Files and
folders may be named as Wikipedia, C4, mC4, OSCAR, MADLAD-400 and FineWeb-2 name them. What is not read is printed.
"""

import bz2
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cli import InputError

MAX_DOCUMENT = 64 << 10  # bytes of .txt, so that text without blank lines also becomes many documents, some held out
MAX_LINE = 1 << 24  # bytes; parsed JSON takes up to 25 times its size
PACKED = r"(\.(gz|xz|bz2|zst))?"
FORMAT = re.compile(rf"((?P<stem>.+?)\.(?P<kind>txt|jsonl|ndjson|json|parquet)|wiki_\d+){PACKED}", re.I)
LAYOUT = "<lang>.<ext> or <lang>/*.<ext>, ext being txt, jsonl, ndjson, json (and .gz, .xz, .bz2, .zst) or parquet"
CODE = re.compile(r"[a-z]{2,3}([-_]([a-z]{3}|[A-Z][a-z]{3}|[A-Z]{2}|\d{3}))*")  # of a language, by BCP 47
ADDED = re.compile(r"^\d{8}\.|_meta$|\.no(clean|blocklist)$")  # what Wikipedia, OSCAR and C4's variants add to the code
MC4, MADLAD = re.compile(r"c4-(.+?)\.tfrecord-.*"), re.compile(r".+_(clean|noisy)_\d{4}\.jsonl\.gz")  # their files
NOT_READ = {  # reason: names
    "hidden": r"(^|/)\.",
    "about the corpus": r"(^|/)(readme|licen[cs]e|dataset_info)[^/]*$",
    "filtered out by FineWeb-2": r"^[^/]+_removed/",
    "held out by the corpus": r"(^|[-./])(dev|valid|validation|test)[-./]",
}
REFUSED = {  # beginning of a file: what is wrong, and the remedy
    rb"version https://git-lfs": "a git-lfs pointer, not the file; run `git lfs pull`",
    rb"<doc ": "has the tags of WikiExtractor; run it again with --json",
    rb"1\t.*(\n\d+\t.*)+\n?\d*$": "every line begins with its number; `cut -f2 FILE` removes the numbers",
}
ONE_A_LINE = "write one object per line: `jq -c '.[]' FILE` from an array, `jq -c . FILE` from objects over many lines"


def unpacked(path: Path) -> Path:
    """A path without its compression suffix (.gz ...)."""
    return Path(re.sub(PACKED + "$", "", str(path), flags=re.I))


def refuse_packed_twice(files: list[Path]) -> None:
    """Raises InputError if a file is there both packed and unpacked: its text would count twice."""
    seen: dict[Path, Path] = {}
    for path in files:
        if (other := seen.setdefault(unpacked(path), path)) is not path:
            raise InputError(f"{other} and {path.name}: the same file, packed and unpacked; remove one")


def _entries(path: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file at or below a path, through links, and why it is not read, or ""; a skipped folder is one entry."""
    name = path.relative_to(folder).as_posix() + "/" * path.is_dir()
    why = next((why for why, names in NOT_READ.items() if re.search(names, name, re.I)), "")
    clean = path.with_name(re.sub(r"_noisy_\d{4}", "_clean_0000", path.name))
    if clean != path and clean.exists():
        why = "MADLAD-400 before cleaning; the clean files are read"
    if path.is_dir() and not why:
        for inside in sorted(path.iterdir()):
            yield from _entries(inside, folder)
    else:
        yield path, why or ("" if FORMAT.fullmatch(path.name) else "not a format that data.py reads")


def _language(top: Path, path: Path) -> str:
    """The language of a file: its folder's name, or its own name up to the format, without what corpora add."""
    name = ADDED.sub("", top.name if top.is_dir() else FORMAT.fullmatch(top.name)["stem"] or top.name)
    if not CODE.fullmatch(name) and (mc4 := MC4.fullmatch(path.name)):  # all its languages are in one folder
        return mc4[1]
    return "en" if name == "realnewslike" else name  # a variant of C4, as en.noclean is


def find_text(folder: Path) -> tuple[dict[str, list[Path]], list[tuple[Path, str]]]:
    """The files of every language in TEXT, in a fixed order, and every file that is not read with the reason.

    Raises InputError if nothing in TEXT or in one of its folders is read, or if text would count twice.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; it should hold {LAYOUT}")
    if snapshots := [*folder.glob("snapshots/*"), *folder.glob("datasets--*/snapshots/*")]:
        raise InputError(f"{folder}: a cache of the Hugging Face hub; name a snapshot in it, like {min(snapshots)}")
    found, skipped, folders = {}, [], {}
    for top in sorted({*folder.iterdir(), *folder.glob("data/*")} - {folder / "data"}):  # data/: as on the hub
        entries = list(_entries(top, top.parent))
        skipped += [entry for entry in entries if entry[1]]
        if top.is_dir() and top not in dict(entries) and all(why for _, why in entries):
            example = "".join(f" ({path.relative_to(top)}: {why})" for path, why in entries[:1])
            raise InputError(f"{top}: nothing in it is read{example}; remove it, or rename its files: {LAYOUT}")
        for path in [path for path, why in entries if not why]:
            language = _language(top, path)
            if top.is_dir() and (other := folders.setdefault(language, top)) != top:
                raise InputError(f"{other} and {top.name}: two folders for {language!r}; remove or merge one")
            found.setdefault(language, []).append(path)
    if not found:
        raise InputError(f"{folder}: no text in it; it should hold {LAYOUT}")
    for files in found.values():
        refuse_packed_twice(files)
    return dict(sorted(found.items())), skipped


def print_text(found: dict[str, list[Path]], skipped: list[tuple[Path, str]], text_field: str = "") -> None:
    """Prints files, bytes and first words of each language, what is guessed or cut, and what is not read.

    Opens every file, so that one that cannot be read is refused now and not after hours of work.
    """
    said = [(path, f"not read ({why})") for path, why in skipped]
    print("language    files             bytes  begins")
    for language, files in found.items():
        firsts = [document for path in files for document in islice(read_documents(path, text_field), 1)]
        words = " ".join(document.text()[:200] for document in firsts).split()
        print(f"{language:9} {len(files):7,} {sum(path.stat().st_size for path in files):17,}  {' '.join(words)[:60]}")
        for first in firsts:
            if _kind(first.path) == "txt" and len(first.raw) > MAX_DOCUMENT // 2:
                limit, is_line = f"{MAX_DOCUMENT >> 10} kB", len(first.raw) > MAX_DOCUMENT
                cut = f"few blank lines, cut into documents of {limit}"
                said.append((first.path, f"a line of over {limit} is one document; break it up" if is_line else cut))
        said += [(path, r"MADLAD-400, \n read as the end of a line") for path in files if MADLAD.fullmatch(path.name)]
    if odd := [language for language in found if not CODE.fullmatch(language)]:
        print(f"not a language code (such as hi, zh-Hans, als_Latn), rename: {', '.join(odd)}")
    groups: dict[tuple[Path, str], list[str]] = {}
    for path, what in said:
        groups.setdefault((path.parent, what), []).append(path.name)
    for (folder, what), names in groups.items():
        print(f"{folder / names[0]}{f' and {len(names) - 1:,} more' * (len(names) > 1)}: {what}")


def _kind(path: Path) -> str:
    """txt, parquet or a JSON lines format, to which WikiExtractor's wiki_00 also belongs."""
    return (FORMAT.fullmatch(path.name)["kind"] or "jsonl").lower()


def unpack(packed: io.BufferedReader) -> io.BufferedIOBase:
    """The contents of an open file, unpacked as its name says."""
    suffix = Path(packed.name).suffix.lower()
    if suffix == ".zst":
        try:
            from compression import zstd  # Python 3.14
        except ImportError:
            from backports import zstd  # not the package zstandard, which takes a truncated file for whole
        return zstd.open(packed, options={zstd.DecompressionParameter.window_log_max: 31})  # for `zstd --long=31`
    return {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix, lambda file: file)(packed)


class Document(NamedTuple):
    """A document as it lies in its file: lines of .txt, a line of JSON, or a value of parquet."""

    path: Path
    number: int  # of its first line, or its row
    raw: bytes
    text_field: str

    def text(self) -> str:
        """Its text. Raises InputError with file and line for bad UTF-8, JSON or a missing text."""
        place = f"{self.path}:{self.number}"
        try:
            text = self.raw.decode("utf-8-sig" if self.number == 1 else "utf-8")
            if _kind(self.path) in ("txt", "parquet"):
                return text
            row = json.loads(text)
            text = row[self.text_field or ("text" if "text" in row else "content")] or ""  # null is no text
            text.encode()  # JSON can spell half a surrogate pair
            return text.replace(r"\n" if MADLAD.fullmatch(self.path.name) else "\n", "\n")
        except UnicodeEncodeError:
            raise InputError(f"{place}: half a surrogate pair; fix or remove the line") from None
        except UnicodeDecodeError as error:
            line, byte = self.number + self.raw.count(b"\n", 0, error.start), self.raw[error.start]
            raise InputError(f"{self.path}:{line}: not UTF-8 (byte {byte:#04x}); convert the file") from None
        except (ValueError, TypeError):
            raise InputError(f"{place}: not a JSON object; {ONE_A_LINE}") from None
        except (KeyError, AttributeError):
            wanted = self.text_field or '"text" or "content"'
            raise InputError(f"{place}: no {wanted} string; name one with --text-field: {', '.join(row)}") from None


def read_documents(path: Path, text_field: str = "", progress: Callable = lambda n: None) -> Iterator[Document]:
    """The documents of a file, not yet decoded; progress gets the bytes of the file just read.

    Raises InputError for a file that is cut, damaged or not plain text, or if the package that reads it is missing.
    """
    is_parquet, number, seen = _kind(path) == "parquet", 0, 0
    try:
        with open(path, "rb", MAX_DOCUMENT) as packed, io.BufferedReader(unpack(packed), 1 << 20) as file:
            for reader in (packed, file):
                for beginning, remedy in REFUSED.items():
                    if re.match(beginning, reader.peek()[:MAX_DOCUMENT]):
                        raise InputError(f"{path}: {remedy}")
            for number, raw, position in _rows(path, text_field) if is_parquet else _lines(path, packed, file):
                yield Document(path, number, raw, text_field)
                progress(position - seen)
                seen = position
    except (InputError, MemoryError):
        raise
    except ImportError:
        raise InputError(f"{path}: to read it, pip install {'pyarrow' if is_parquet else 'backports.zstd'}") from None
    except Exception as error:  # each package raises its own for damage
        place = f"{'row' if is_parquet else 'line'} {number}"
        raise InputError(f"{path}: cut or damaged after {place} ({error}); fetch it again") from None


def _lines(path: Path, packed: io.BufferedReader, file: io.BufferedReader) -> Iterator[tuple[int, bytes, int]]:
    """Documents of a file of lines: each line of JSON, or the lines of .txt up to a blank one or to MAX_DOCUMENT."""
    is_text, first, document = _kind(path) == "txt", 1, bytearray()
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
        if len(line) == MAX_LINE:
            raise InputError(f"{path}:{number}: a line of over {MAX_LINE >> 20} MB; break it up, {ONE_A_LINE}")
        if document and (not is_text or line.isspace() or len(document) + len(line) > MAX_DOCUMENT):
            yield first, bytes(document), packed.tell()
            document.clear()
        if not line.isspace():
            first = first if document else number
            document += line
    if document:
        yield first, bytes(document), packed.tell()


def _rows(path: Path, text_field: str) -> Iterator[tuple[int, bytes, int]]:
    """The text of each row of a parquet file, in constant memory, however large its row groups."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        strings = [column.name for column in file.schema_arrow if str(column.type) in ("string", "large_string")]
        field = text_field or ("text" if "text" in strings else "content")
        if field not in strings:
            raise InputError(f"{path}: no {field!r} in it; name its text with --text-field: {', '.join(strings)}")
        batches = file.iter_batches(batch_size=64, columns=[field], use_threads=False)
        size, n_rows = path.stat().st_size, file.metadata.num_rows
        for row, value in enumerate((value for batch in batches for value in batch.column(0)), 1):
            yield row, bytes(value.as_buffer() or b""), size * row // n_rows


def text_lines(text: str) -> list[str]:
    """The lines of a document that are not blank; its tokens are those of these lines, in order."""
    return [line for line in (part.strip("\r") for part in text.split("\n")) if line.strip()]
