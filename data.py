"""Text to tokenizer and token shards (a command), and from the shards a deterministic multilingual stream of rows.

    python data.py TEXT_DIR DATA_DIR --vocab-size 150000

TEXT_DIR holds <lang>.<ext> or <lang>/*, ext being txt (documents parted by blank lines), jsonl or json (one object a
line with its text under "text", as mC4 is released), each also .gz or .xz. DATA_DIR gets tokenizer.model, shards
<lang>.<split>.<number>.bin and, last of all, meta.json: a folder without it is not finished. With --part i/n each of
n machines encodes its share of the files; their shards and metas, in one folder, are the same data.

The stream: languages are sampled in proportion to tokens ** alpha (Soltan et al. 2022: 0.5), rows are packed full and
documents closed by </s>. Sample i is a pure function of (seed, i).
"""

import argparse
import gzip
import io
import json
import lzma
import os
import random
import re
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from hashlib import blake2b, sha256
from heapq import heappop, heappush
from pathlib import Path
from types import ModuleType

import numpy as np
import sentencepiece as spm
from tqdm import tqdm

from cli import InputError, OneProcessError, run_command
from objectives import ORDER, SpecialIds, sample_rng

HERE = Path(__file__).resolve().parent
SAMPLE_TEXT, SAMPLE_DATA = HERE / "sample" / "text", HERE / "sample" / "data"  # the embedded corpus, and its shards
SAMPLE_OPTIONS = dict(vocab_size=2000, valid_fraction=0.15, seed=0)

EXTENSIONS = tuple(f".{kind}{packed}" for kind in ("txt", "jsonl", "json") for packed in ("", ".gz", ".xz"))
TOKENIZER_CHARS = 8_000_000  # characters the tokenizer is trained on, in equal shares of the languages
BLOCK_BYTES = 1 << 19  # text handed to a worker at a time
MAX_DOCUMENT = 1 << 20  # bytes; a longer run of lines without a blank one is cut, so that memory stays constant
MAX_LINE = 1 << 24  # bytes; JSON parsed takes up to 25 times its size
MAX_MODEL = 1 << 26  # bytes of a tokenizer.model
MIN_VOCAB, MAX_VOCAB = 400, 2_000_000  # special tokens and bytes take 362
SHARD_TOKENS = 1 << 28
MAGIC = b"tokens01"
HEADER = 32  # bytes: the magic, 16 of the tokenizer's sha256, the number of tokens


# Text --------------------------------------------------------------------------------------------------------------


def refuse_outside(path: Path, folder: Path) -> None:
    """Raises InputError if a path in a folder is a symbolic link that leads out of it: a folder may be a stranger's."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise InputError(f"{path}: a symbolic link out of {folder}; copy the file there instead")


def unpacked(path: Path) -> str:
    """A path without .gz or .xz."""
    return str(path).removesuffix(".gz").removesuffix(".xz")


def refuse_packed_twice(files: list[Path]) -> None:
    """Raises InputError where a file is there packed and unpacked: its text would count twice."""
    seen: dict[str, Path] = {}
    for path in files:
        if (other := seen.setdefault(unpacked(path), path)) is not path:
            raise InputError(f"{other} and {path.name}: one file, packed and not; remove either")


def find_text(folder: Path) -> dict[str, list[Path]]:
    """The text files of every language in a folder, in a fixed order.

    Raises InputError if there are none, or for a symbolic link to something outside the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; it should hold <lang>.txt or <lang>/*.txt (also jsonl, .gz, .xz)")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        inside = sorted(path.rglob("*")) if path.is_dir() else []
        for entry in (path, *inside):
            refuse_outside(entry, folder)
        files = [p for p in (path, *inside) if p.name.endswith(EXTENSIONS) and p.is_file()]
        if files and not path.name.startswith("."):
            if not path.name.isprintable():  # no JSON holds a name that is not UTF-8
                raise InputError(f"{folder}/{path.name!r}: a name that is not UTF-8, or not printable; rename it")
            found.setdefault(path.name.split(".")[0], []).extend(files)
    for files in found.values():
        refuse_packed_twice(files)
    if not found:
        raise InputError(f"{folder}: no text in it; it should hold <lang>.txt or <lang>/*.txt (also jsonl, .gz, .xz)")
    return found


def _is_text(path: Path) -> bool:
    return unpacked(path).endswith(".txt")


def raw_documents(path: Path, progress: Callable[[int], None] = lambda n: None) -> Iterator[tuple[int, bytes]]:
    """Undecoded documents of a file as (number of the first line, bytes); progress is told of bytes read from disk.

    Raises InputError for a damaged archive or a line over 16 MB.
    """
    is_text = _is_text(path)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, lambda raw: raw)
    number, first, size, lines, seen = 0, 1, 0, [], 0
    try:
        with open(path, "rb") as raw, io.BufferedReader(opener(raw), 1 << 20) as file:
            while line := file.readline(MAX_LINE):
                number += 1
                if len(line) == MAX_LINE:
                    raise InputError(f"{path}:{number}: a line of over {MAX_LINE >> 20} MB; break it up")
                blank = not line.strip()
                if lines and (not is_text or blank or size + len(line) > MAX_DOCUMENT):
                    yield first, b"".join(lines)
                    lines, size = [], 0
                if not blank:
                    first = first if lines else number
                    lines.append(line)
                    size += len(line)
                if raw.tell() != seen:
                    progress(raw.tell() - seen)
                    seen = raw.tell()
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: a damaged archive after line {number} ({error}); fetch it again") from None
    except MemoryError:
        raise InputError(f"{path}: its archive asks for more memory than there is; pack it anew") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if lines:
        yield first, b"".join(lines)


def document_text(path: Path, number: int, raw: bytes) -> str:
    """The text of a raw document. Raises InputError with file and line for bad UTF-8, JSON or a missing "text"."""
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        if _is_text(path):
            return text
        text = json.loads(text)["text"]
        if not isinstance(text, str):
            raise TypeError
        text.encode()  # JSON can spell half a surrogate pair, which no file can hold
        return text
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}: not UTF-8 (byte {raw[error.start]:#04x}); convert the file") from None
    except UnicodeEncodeError:
        raise InputError(f"{path}:{number}: half a surrogate pair in the text; repair or remove the line") from None
    except (ValueError, RecursionError):
        raise InputError(f'{path}:{number}: not JSON; each line must be one object with a "text"') from None
    except (KeyError, TypeError):
        raise InputError(f'{path}:{number}: no "text" string in this line\'s object') from None


def text_lines(text: str) -> list[str]:
    """The lines of a document that hold anything; a document's tokens are those of its lines, one after the other."""
    return [line for line in (part.strip("\r") for part in text.split("\n")) if line.strip()]


# Tokenizer ---------------------------------------------------------------------------------------------------------

SPECIAL_PIECES = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "[CLM]"]  # by their ids, as SpecialIds has them
SPECIAL_PIECES += [f"<extra_id_{k}>" for k in range(SpecialIds.n_sentinels)]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def sample_lines(files: list[Path], n_chars: int, seed: int) -> list[str]:
    """A uniform sample of about n_chars characters of lines, spread over files: from 32 times as much text, or 1 MB of
    each where that is more.
    """
    rng, kept, size, seen = random.Random(seed), [], 0, 0
    files = rng.sample(files, len(files))
    share = max(1 << 20, 32 * n_chars // len(files))
    for path in files:
        read = 0
        for number, raw in raw_documents(path):
            for line in text_lines(document_text(path, number, raw)):
                line = line[:4000]  # the trainer's limit is in bytes, of which a character has at most four
                seen, size = seen + 1, size + len(line)
                heappush(kept, (-rng.random(), seen, line))
                while size > n_chars:  # the lines with the smallest random keys stay
                    size -= len(heappop(kept)[-1])
            read += len(raw)
            if read > share:
                break
    return [line for *_, line in sorted(kept)]


def train_tokenizer(text: dict[str, list[Path]], vocab_size: int, seed: int) -> bytes:
    """A SentencePiece unigram model (Kudo 2018) in which every Unicode text survives encoding and decoding.

    No normalisation, spaces kept, bytes for characters outside the vocabulary; U+2581, SentencePiece's own sign for a
    space, is the one character that comes back as another. Raises InputError where the text cannot fill vocab_size, or
    it is out of range.
    """
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise InputError(f"--vocab-size {vocab_size}: it must be from {MIN_VOCAB} to {MAX_VOCAB:,}")
    lines = [line for files in text.values() for line in sample_lines(files, TOKENIZER_CHARS // len(text), seed)]
    if not lines:
        raise InputError("no text to train a tokenizer on: every file is empty")
    random.Random(seed).shuffle(lines)
    ids, model = SpecialIds(vocab_size), io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            pad_id=ids.pad,
            bos_id=ids.bos,
            eos_id=ids.eos,
            unk_id=ids.unk,
            pad_piece="<pad>",
            control_symbols=SPECIAL_PIECES[ids.mask :],  # text never becomes one of them, whatever it says
            max_sentence_length=1 << 16,
            num_threads=8,  # a constant: the result depends on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"--vocab-size {vocab_size} does not fit this text: {str(error).split('] ')[-1]}") from None
    return model.getvalue()


def read_tokenizer(path: Path) -> bytes:
    """Raises InputError unless the file can be read and is no larger than a tokenizer may be."""
    try:
        if path.stat().st_size <= MAX_MODEL and path.is_file():
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a tokenizer.model") from None
    raise InputError(f"{path}: not a file of at most {MAX_MODEL >> 20} MB; name a tokenizer.model")


def _unigram_model(model: bytes, name: object) -> tuple[spm.SentencePieceProcessor, list[str]]:
    """The tokenizer and its pieces. Raises InputError, naming `name`, unless it is a SentencePiece unigram model."""
    tokenizer = spm.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(model)
        pieces = tokenizer.id_to_piece(list(range(tokenizer.vocab_size())))
    except (RuntimeError, UnicodeDecodeError):
        raise InputError(f"{name}: not a SentencePiece model; train one with `python data.py`") from None
    try:
        tokenizer.nbest_encode_as_ids("a", 1)
    except RuntimeError:  # no other kind of model can do this
        raise InputError(f"{name}: a BPE, word or char model; take a unigram model or train one here") from None
    return tokenizer, pieces


def load_tokenizer(model: bytes, name: object) -> spm.SentencePieceProcessor:
    """Raises InputError, naming `name`, unless `model` is a SentencePiece unigram model with our special ids."""
    tokenizer, pieces = _unigram_model(model, name)
    if pieces[: len(SPECIAL_PIECES)] != SPECIAL_PIECES:
        raise InputError(f"{name}: its special tokens are not this project's; give it to data.py with --tokenizer")
    return tokenizer


def sentencepiece_messages(name: object) -> ModuleType:
    """The classes of a SentencePiece model's parts. Raises InputError, naming the model, if protobuf is missing."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise InputError(f"{name}: a tokenizer not trained here needs protobuf: pip install protobuf") from None
    return sentencepiece_model_pb2


def adopt_tokenizer(model: bytes, name: object) -> bytes:
    """A SentencePiece unigram model (mT5's, XLM-R's, one's own) with our special ids; prints what has changed.

    Our special pieces come first, then the 256 bytes, then its ordinary and user-defined pieces in their order, with
    their scores. Its normalisation stays, and text in characters that it knows is cut into the same pieces as before.
    Other characters become bytes, even if they were <unk> before, so that they are not lost. Its control and unused
    pieces are dropped, and so is a piece spelled like one of ours. A model with our special ids is returned unchanged.
    Raises InputError, naming `name`, for anything but a unigram model, and if protobuf is missing.
    """
    _, pieces = _unigram_model(model, name)
    if pieces[: len(SPECIAL_PIECES)] == SPECIAL_PIECES:
        return model
    messages = sentencepiece_messages(name)
    Piece, proto = messages.ModelProto.SentencePiece, messages.ModelProto.FromString(model)
    ours = [Piece(piece=text, score=0, type=Piece.CONTROL) for text in SPECIAL_PIECES]
    ours[SpecialIds.unk].type = Piece.UNKNOWN
    ours += [Piece(piece=text, score=0, type=Piece.BYTE) for text in BYTE_PIECES]
    spellings, stands_for_text = {x.piece for x in ours}, (Piece.NORMAL, Piece.USER_DEFINED)
    kept, dropped = [], []
    for x in proto.pieces:
        if x.type in stands_for_text and x.piece not in spellings:
            kept.append(x)
        elif x.type in stands_for_text or x.piece not in spellings:  # the others are replaced by ours
            dropped.append(x.piece)
    adopted = messages.ModelProto.FromString(model)
    del adopted.pieces[:]
    adopted.pieces.extend(ours + kept)
    spec = adopted.trainer_spec
    spec.byte_fallback, spec.vocab_size = True, len(adopted.pieces)
    spec.pad_id, spec.bos_id, spec.eos_id, spec.unk_id = range(4)  # as SpecialIds has them
    spec.pad_piece, spec.bos_piece, spec.eos_piece, spec.unk_piece = SPECIAL_PIECES[:4]
    spec.control_symbols[:] = SPECIAL_PIECES[SpecialIds.mask :]
    print(
        f"{name}: {len(kept):,} of its {len(pieces):,} pieces are kept, in their order, as ids {len(ours)} to "
        f"{len(adopted.pieces) - 1:,}, after {len(SPECIAL_PIECES)} special pieces and 256 bytes"
        + (f"; dropped: {' '.join(dropped[:10])}{' ...' * (len(dropped) > 10)} ({len(dropped):,})" if dropped else "")
    )
    return adopted.SerializeToString()


# Shards ------------------------------------------------------------------------------------------------------------


def _token_type(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _header(model: bytes, n_tokens: int) -> bytes:
    return MAGIC + sha256(model).digest()[:16] + n_tokens.to_bytes(8, "little")


class _ShardWriter:
    """Appends tokens to <name>.<number>.bin, starting another file at SHARD_TOKENS; `shards` lists [file, tokens]."""

    def __init__(self, folder: Path, name: str, model: bytes):
        self.folder, self.name, self.model, self.shards, self.file = folder, name, model, [], None

    def write(self, tokens: np.ndarray) -> None:  # [N]
        """Appends tokens, all of them to one shard."""
        if self.file is None or self.shards[-1][1] >= SHARD_TOKENS:
            self.close()
            self.shards.append([f"{self.name}.{len(self.shards):03d}.bin", 0])
            self.file = open(self.folder / self.shards[-1][0], "wb")
            self.file.write(_header(self.model, 0))
        self.file.write(tokens.tobytes())
        self.shards[-1][1] += len(tokens)

    def close(self) -> None:
        """Ends a shard: only now its header says how many tokens it has."""
        if self.file is not None:
            self.file.seek(0)
            self.file.write(_header(self.model, self.shards[-1][1]))
            self.file.close()
            self.file = None


_worker: dict = {}  # what a worker process keeps between blocks


def _start_worker(model: bytes, seed: int, valid_fraction: float) -> None:
    tokenizer = load_tokenizer(model, "tokenizer")
    _worker.update(tokenizer=tokenizer, seed=seed.to_bytes(8, "little"), valid_fraction=valid_fraction)


def _encode_block(path: Path, block: list[tuple[int, bytes]]) -> tuple[dict[str, np.ndarray], int, int, int]:
    """Tokens of a block of raw documents by split, and how many documents, bytes and words they have.

    The split is decided by a hash of the document's text: it does not depend on how the text is spread over files,
    and a document that occurs twice is never on both sides.
    """
    tokenizer, tokens, n_documents, n_bytes, n_words = _worker["tokenizer"], {"train": [], "valid": []}, 0, 0, 0
    type_ = _token_type(tokenizer.vocab_size())
    for number, raw in block:
        text = document_text(path, number, raw)
        lines = text_lines(text)
        if not lines:
            continue
        key = blake2b(text.strip().encode(), digest_size=8, key=_worker["seed"]).digest()
        split = "valid" if int.from_bytes(key, "little") < _worker["valid_fraction"] * 2**64 else "train"
        for line in tokenizer.encode(lines):
            tokens[split].append(np.array(line, type_))
        tokens[split].append(np.array([SpecialIds.eos], type_))
        n_documents += 1
        n_bytes += len(raw)
        n_words += len(text.split())
    return {split: np.concatenate(parts) for split, parts in tokens.items() if parts}, n_documents, n_bytes, n_words


def _blocks(files: list[Path], progress: Callable[[int], None]) -> Iterator[tuple[Path, list[tuple[int, bytes]]]]:
    """Raw documents of the files, in order, in blocks of about BLOCK_BYTES."""
    for path in files:
        block, size = [], 0
        for document in raw_documents(path, progress):
            block.append(document)
            size += len(document[1])
            if size > BLOCK_BYTES:
                yield path, block
                block, size = [], 0
        if block:
            yield path, block


def _encode(n_workers: int, start_worker: tuple, blocks: Iterator[tuple]) -> Iterator[tuple]:
    """_encode_block of each block, in order, on n_workers processes, with a bounded number under way."""
    if n_workers == 1:
        _start_worker(*start_worker)
        yield from (_encode_block(*block) for block in blocks)
        return
    with ProcessPoolExecutor(n_workers, initializer=_start_worker, initargs=start_worker) as pool:
        under_way: deque = deque()
        for block in blocks:
            under_way.append(pool.submit(_encode_block, *block))
            if len(under_way) > 4 * n_workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _share(text: dict[str, list[Path]], part: int, n_parts: int) -> dict[str, list[Path]]:
    """The files of a part: consecutive ones, of about as many bytes as any other part's."""
    sizes = [(language, path, path.stat().st_size) for language, files in text.items() for path in files]
    total, before, share = max(1, sum(size for *_, size in sizes)), 0, {}
    for language, path, size in sizes:
        if (2 * before + size) * n_parts // (2 * total + 1) == part - 1:  # the part that the file's middle falls in
            share.setdefault(language, []).append(path)
        before += size
    return share


def _refuse_occupied(data_dir: Path, part: int, n_parts: int) -> None:
    """Raises InputError if a data folder holds anything but the other parts of the same text."""
    names = [path.name for path in data_dir.iterdir()] if data_dir.is_dir() else []
    if n_parts > 1:
        if mine := [name for name in names if f".{part}of{n_parts}." in name]:
            raise InputError(
                f"{data_dir / min(mine)}: there already; remove *.{part}of{n_parts}.* to make the part again"
            )
        names = [x for x in names if x != "tokenizer.model" and f"of{n_parts}." not in x and not x.endswith(".tmp")]
    if names or (data_dir.exists() and not data_dir.is_dir()):
        raise InputError(f"{data_dir}: exists and is not an empty folder; remove it or name another")


def prepare(
    text_dir: Path,
    data_dir: Path,
    vocab_size: int,
    tokenizer: Path | None = None,
    valid_fraction: float = 0.01,
    seed: int = 0,
    n_workers: int = 1,
    part: tuple[int, int] = (1, 1),
) -> dict:
    """Text to tokenizer and shards; returns what it wrote to meta.json. Raises InputError and leaves no meta.json.

    part: (i, n) encodes the i-th of n shares of the files, with a tokenizer that all the shares have in common.
    """
    text = find_text(text_dir)
    _refuse_occupied(data_dir, *part)
    infix = "" if part[1] == 1 else f".{part[0]}of{part[1]}"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        model = read_tokenizer(tokenizer) if tokenizer else train_tokenizer(text, vocab_size, seed)
        text = _share(text, *part)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read or made ({error.strerror}); name another") from None
    model = adopt_tokenizer(model, tokenizer)
    there = data_dir / "tokenizer.model"
    if there.exists() and there.read_bytes() != model:
        raise InputError(f"{there}: another part's, not that of --tokenizer {tokenizer}; use one for all parts")
    meta = dict(seed=seed, valid_fraction=valid_fraction, languages={})
    total = sum(path.stat().st_size for files in text.values() for path in files)
    try:
        _write(there, model)
        with tqdm(total=total, unit="B", unit_scale=True, desc="encoding", disable=None) as bar:
            for language, files in text.items():
                bar.set_postfix_str(language)
                writers = {
                    split: _ShardWriter(data_dir, f"{language}.{split}{infix}", model) for split in ("train", "valid")
                }
                totals, start_worker = np.zeros(3, np.int64), (model, seed, valid_fraction)
                for tokens, *figures in _encode(n_workers, start_worker, _blocks(files, bar.update)):
                    totals += figures
                    for split, piece in tokens.items():
                        writers[split].write(piece)
                for writer in writers.values():
                    writer.close()
                if not writers["train"].shards and part[1] == 1:
                    raise InputError(
                        f"{text_dir}: no text for {language!r}, or all of it held out; add text or remove it"
                    )
                meta["languages"][language] = dict(
                    zip(("documents", "bytes", "words"), totals.tolist()),
                    **{split: writer.shards for split, writer in writers.items()},
                )
        _write(data_dir / f"meta{infix}.json", json.dumps(meta, indent=1).encode())
    except BrokenProcessPool:
        raise InputError(
            f"{data_dir}: a worker process died (out of memory?); remove the folder and try again"
        ) from None
    except OSError as error:
        raise InputError(f"{data_dir}: cannot be written ({error.strerror}); make room, remove it, try again") from None
    return meta


def _write(path: Path, content: bytes) -> None:
    """Writes a whole file or none: other parts may be reading it, or writing the same."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # two containers may be process 7 both
    temporary.write_bytes(content)
    temporary.rename(path)


def read_meta(folder: Path) -> dict:
    """What data.py wrote about a data folder, the parts of several machines put together in their order.

    Raises InputError for a missing or damaged part, or parts made with different options.
    """
    names = sorted(path.name for path in folder.glob("meta*.json"))
    if not names:
        if not folder.is_dir():  # that a checkpoint names counts from the folder it was trained in
            raise InputError(f"{folder}: no such folder; name one made by data.py with --data")
        if not (folder / "tokenizer.model").exists():
            raise InputError(f"{folder}: no meta.json in it; `python data.py {folder} DATA` makes a folder of its text")
        raise InputError(f"{folder}: no meta.json in it, data.py did not finish; remove it and run that again")
    several = re.fullmatch(r"meta\.[0-9]+of([0-9]{1,4})\.json", names[0])
    expected = [f"meta.{i}of{several[1]}.json" for i in range(1, int(several[1]) + 1)] if several else ["meta.json"]
    if missing := [name for name in expected if name not in names]:
        raise InputError(f"{folder}: no {missing[0]}: run that part of data.py, or copy its files here")
    if odd := [name for name in names if name not in expected]:
        raise InputError(f"{folder}: {odd[0]} is not of the same parts as {names[0]}; remove one of them")
    meta: dict = dict(languages={})
    for name in expected:
        try:
            if (folder / name).stat().st_size > MAX_LINE or not (folder / name).is_file():
                raise ValueError
            part = json.loads((folder / name).read_bytes())
            options = dict(seed=part["seed"], valid_fraction=part["valid_fraction"])
            for language, entry in part["languages"].items():
                sums = meta["languages"].setdefault(language, dict(documents=0, bytes=0, words=0, train=[], valid=[]))
                for key in sums:
                    sums[key] = sums[key] + entry[key]
                for shard, n in entry["train"] + entry["valid"]:
                    if Path(shard).name != shard or type(n) is not int or not 0 < n < 1 << 48:
                        raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{folder / name}: damaged; run data.py again") from None
        if {**options, **meta} != {**meta, **options}:
            raise InputError(f"{folder / name}: its part has {options}, others not; run it again with theirs")
        meta.update(options)
    if not meta["languages"]:
        raise InputError(f"{folder}: no text in any part of it; run data.py again")
    return meta


def shares(tokens: dict[str, int], alpha: float) -> dict[str, float]:
    """Sampling probability of each language: proportional to tokens ** alpha (Soltan et al. 2022)."""
    weights = {language: n**alpha for language, n in tokens.items()}
    total = sum(weights.values()) or 1  # a part may hold no text
    return {language: weight / total for language, weight in weights.items()}


def n_tokens(meta: dict, split: str) -> dict[str, int]:
    """Tokens of each language in a split of a data folder."""
    return {language: sum(n for _, n in entry[split]) for language, entry in meta["languages"].items()}


def print_table(meta: dict) -> None:
    """Prints what a data folder holds of each language, and its sampling share at the default exponent of 0.5."""
    train, valid = n_tokens(meta, "train"), n_tokens(meta, "valid")
    share = shares(train, 0.5)
    print("language  documents      tokens    held out         bytes  tokens/word  share")
    for language, entry in meta["languages"].items():
        tokens = train[language] + valid[language]
        print(
            f"{language:8} {entry['documents']:10,} {train[language]:11,} {valid[language]:11,} {entry['bytes']:13,}"
            f" {tokens / max(1, entry['words']):12.2f} {share[language]:6.1%}"
        )


# The stream --------------------------------------------------------------------------------------------------------


class _Tokens:
    """The tokens of several shards as one sequence, read through memory maps."""

    def __init__(self, folder: Path, shards: list, model: bytes, vocab_size: int):
        self.folder, self.maps, self.vocab_size, type_ = folder, [], vocab_size, _token_type(vocab_size)
        for name, n in shards:
            path = folder / name
            refuse_outside(path, folder)
            try:
                if not path.is_file():  # a pipe would wait for ever
                    raise FileNotFoundError(None, "no such file")
                size = path.stat().st_size
                with open(path, "rb") as file:
                    header = file.read(HEADER)
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror}); run data.py again") from None
            if header[:8] != MAGIC or header[8:24] != _header(model, n)[8:24]:
                raise InputError(f"{path}: not a shard of this folder's tokenizer; run data.py again")
            if header != _header(model, n) or size != HEADER + n * type_.itemsize:
                raise InputError(
                    f"{path}: {size} bytes, not the {HEADER + n * type_.itemsize} of {n} tokens; run data.py again"
                )
            self.maps.append(np.memmap(path, type_, "r", HEADER))
        self.ends = np.cumsum([0] + [len(m) for m in self.maps])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, length: int) -> np.ndarray:  # [length]
        """Tokens from `start` on. Raises OneProcessError for one that the vocabulary does not have."""
        parts = []
        while length:
            shard = int(np.searchsorted(self.ends, start, "right")) - 1
            part = self.maps[shard][start - self.ends[shard] :][:length]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        tokens = np.concatenate(parts).astype(np.int64)
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise OneProcessError(
                f"{self.folder}: a shard holds token {tokens.max()}, over the vocabulary; run data.py again"
            )
        return tokens


class TokenData:
    """Rows of seq_len tokens from a data folder: `row(i)` to train on, `valid_row(language, j)` held out.

    Over any number of whole blocks of samples each language gets its share to within one row; within a language every
    row comes once before any comes twice, in an order that is new each time round. Finding a row takes constant time
    and memory.
    Raises InputError for a folder that is unfinished, damaged, or too small for a single row.
    """

    BLOCK = 1024  # samples among which the languages are shuffled

    def __init__(self, folder: Path, seq_len: int, seed: int = 0, alpha: float = 0.5):
        self.meta, path = read_meta(folder), folder / "tokenizer.model"
        refuse_outside(path, folder)
        self.tokenizer_model = read_tokenizer(path)
        self.tokenizer = load_tokenizer(self.tokenizer_model, path)
        self.ids = SpecialIds(self.tokenizer.vocab_size())
        self.seq_len, self.seed = seq_len, seed
        self.languages = sorted(self.meta["languages"])
        self.train, self.valid = (
            {
                x: _Tokens(folder, self.meta["languages"][x][split], self.tokenizer_model, self.ids.vocab_size)
                for x in self.languages
            }
            for split in ("train", "valid")
        )
        sizes = [[x, len(self.train[x]), len(self.valid[x])] for x in self.languages]
        self.fingerprint = sha256(json.dumps(sizes).encode() + self.tokenizer_model).hexdigest()
        for language, tokens in self.train.items():
            if len(tokens) < seq_len:
                raise InputError(
                    f"{folder}: {language!r} has {len(tokens)} tokens to train on, a row takes {seq_len}: "
                    "add text, remove the language, or lower --seq-len"
                )
        share = shares({language: len(tokens) for language, tokens in self.train.items()}, alpha)
        self._below = np.concatenate([[0.0], np.cumsum([share[x] for x in self.languages])[:-1], [1.0]])
        self._block_size = max(self.BLOCK, int(2 / min(share.values())))

    def _quota(self, n: int) -> np.ndarray:
        """How many of the first n samples (n a multiple of the block) are of each language: its share, rounded."""
        return np.diff(np.floor(n * self._below + 0.5).astype(np.int64))

    @lru_cache(maxsize=2)
    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each sample of a block its language, and how many samples of that language came before it."""
        before, after = self._quota(block * self._block_size), self._quota((block + 1) * self._block_size)
        languages = np.repeat(np.arange(len(before)), after - before)
        ranks = np.concatenate([np.arange(a, b) for a, b in zip(before, after)])
        order = sample_rng(self.seed, ORDER, block).random(len(languages)).argsort(kind="stable")
        ranks_in_order = np.empty_like(ranks)
        ranks_in_order[languages[order].argsort(kind="stable")] = ranks
        return languages[order], ranks_in_order

    def locate(self, i: int) -> tuple[str, int]:
        """Language of sample i, and which of that language's rows it is."""
        languages, ranks = self._block(i // self._block_size)
        language, before = self.languages[languages[i % self._block_size]], int(ranks[i % self._block_size])
        n_rows = len(self.train[language]) // self.seq_len
        key = _mix(_mix(_mix(self.seed) ^ zlib.crc32(language.encode())) ^ before // n_rows)
        return language, permuted(before % n_rows, n_rows, key)

    def row(self, i: int) -> np.ndarray:  # [L]
        """The tokens of sample i. Raises OneProcessError for a damaged shard."""
        language, row = self.locate(i)
        return self.train[language].read(row * self.seq_len, self.seq_len)

    def unigram_entropy(self, language: str) -> float:
        """Entropy in nats of a language's token counts (of its first 4M): the loss of a model that ignores context."""
        tokens = self.train[language].read(0, min(len(self.train[language]), 1 << 22))
        p = np.unique(tokens, return_counts=True)[1] / len(tokens)
        return float(-(p * np.log(p)).sum())

    def n_valid_rows(self, language: str) -> int:
        """Held-out rows of a language. Raises InputError if there is not one."""
        tokens = self.valid[language]
        if len(tokens) < self.seq_len:
            raise InputError(
                f"{language!r} has {len(tokens)} tokens held out, a row takes {self.seq_len}: "
                "prepare the data with a larger --valid-fraction (whole documents are held out; blank lines part them) "
                "or lower --seq-len"
            )
        return len(tokens) // self.seq_len

    def valid_row(self, language: str, j: int) -> np.ndarray:  # [L]
        """The tokens of held-out row j of a language. Raises OneProcessError for a damaged shard."""
        return self.valid[language].read(j * self.seq_len, self.seq_len)


def _mix(x: int) -> int:
    """A 64-bit integer to another that looks unrelated (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def permuted(i: int, n: int, key: int) -> int:
    """Where i stands in an order of 0..n-1 that depends on key; needs no table (a Feistel network, cycle-walked).

    Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    while True:
        left, right = i >> half, i & (1 << half) - 1
        for round_ in range(4):
            left, right = right, left ^ _mix(key ^ _mix(right << 2 | round_)) & (1 << half) - 1
        i = left << half | right
        if i < n:
            return i


def main() -> None:
    parser = argparse.ArgumentParser(description="Text to tokenizer and token shards.")
    parser.add_argument("text_dir", type=Path, help="folder with <lang>.txt or <lang>/* (txt, jsonl, json; .gz, .xz)")
    parser.add_argument("data_dir", type=Path, help="folder to write, must not exist or be empty")
    parser.add_argument(
        "--vocab-size", type=int, default=150_000, help="pieces, special ones included (default %(default)s)"
    )
    parser.add_argument("--tokenizer", type=Path, help="use this SentencePiece unigram model instead of training one")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="encode the I-th of N shares of the files (default %(default)s)"
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.01, help="share of documents held out (default %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the tokenizer's sample and of the split (default %(default)s)"
    )
    args = parser.parse_args()
    if not 0 <= args.valid_fraction < 1:
        raise InputError(f"--valid-fraction {args.valid_fraction}: it must be in [0, 1)")
    if not 0 <= args.seed < 1 << 64:
        raise InputError(f"--seed {args.seed}: it must be from 0 to 2**64 - 1")
    part = re.fullmatch("([0-9]{1,4})/([0-9]{1,4})", args.part)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        raise InputError(f"--part {args.part}: it must be I/N with I from 1 to N, N at most 9999")
    args.part = int(part[1]), int(part[2])
    if args.part[1] > 1 and not args.tokenizer:
        raise InputError(f"--part {part[0]}: the parts need one tokenizer; add --tokenizer FILE")
    print_table(prepare(**vars(args), n_workers=os.cpu_count() or 1))


if __name__ == "__main__":
    run_command(main)
