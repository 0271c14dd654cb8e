"""Turns text into a tokenizer and token shards (a command), and shards into a deterministic, multilingual row stream.

    python data.py TEXT DATA --vocab-size 150000                  a new data folder
    python data.py TEXT DATA --tokenizer DATA/tokenizer.model     continue a killed run; add languages

TEXT is what text.py reads. DATA gets tokenizer.model and, for each language, shards <lang>.<split>.<number>.bin and
their description <lang>.json, which is empty until they are finished. Several machines may encode different languages
into one folder, with one tokenizer. In the stream, languages are sampled in proportion to tokens ** alpha (Soltan et
al. 2022: 0.5), rows are packed full, and </s> ends each document. Sample i is a pure function of (seed, i).
"""

import argparse
import json
import mmap
import os
import shutil
import tempfile
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from hashlib import blake2b, sha256
from itertools import accumulate
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread

import numpy as np
from tqdm import tqdm

from cli import InputError, lock_file, run_command, say
from objectives import ORDER, sample_rng
from text import LAYOUT, Document, find_text, print_text, read_documents, text_lines
from tokenizer import SpecialIds, adopt_tokenizer, load_tokenizer, train_tokenizer

HERE = Path(__file__).resolve().parent
SAMPLE_TEXT, SAMPLE_DATA = HERE / "sample" / "text", HERE / "sample" / "data"  # the embedded corpus, and its shards
SAMPLE_OPTIONS = dict(vocab_size=2000, valid_fraction=0.15, seed=0)

BLOCK_BYTES = 1 << 19  # text handed to a worker at a time
SHARD_TOKENS = 1 << 28
MAGIC, HEADER = b"tokens01", 32  # bytes: the magic, 16 of the tokenizer's sha256, the number of tokens
ENTRY = {"documents", "bytes", "words", "train", "valid", "seed", "valid_fraction", "text_field", "files"}
AGAIN = "run data.py again with --tokenizer {}/tokenizer.model, without --vocab-size"
FEW_TOKENS, LONG_ROW = 100_000, 512  # a language with less to train on, or less held out, gets a warning


# Shards ------------------------------------------------------------------------------------------------------------


def _token_type(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _header(model: bytes, n_tokens: int) -> bytes:
    return MAGIC + sha256(model).digest()[:16] + n_tokens.to_bytes(8, "little")


def _append(folder: Path, name: str, shards: dict[str, int], tokens: np.ndarray) -> None:  # [any length]
    """Appends tokens to the last <name>.<number>.bin, or to a new one after SHARD_TOKENS; counts them in `shards`."""
    last = next(reversed(shards), "")
    if not shards or shards[last] >= SHARD_TOKENS:
        last = f"{name}.{len(shards):03d}.bin"
        (folder / last).write_bytes(bytes(HEADER))
    with open(folder / last, "ab") as file:
        file.write(tokens.tobytes())
    shards[last] = shards.get(last, 0) + len(tokens)


_worker: dict = {}  # what a worker process keeps between blocks


def _start_worker(model: bytes, seed: int, valid_fraction: float) -> None:
    _worker.update(tokenizer=load_tokenizer(model, "tokenizer"), key=seed.to_bytes(8, "little"), share=valid_fraction)
    if parent := parent_process():  # a worker whose parent is killed would wait for ever
        Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def _encode_block(block: list[Document]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tokens of a block by split, and its numbers of documents, bytes and words.

    A hash of a document's text decides its split: wherever and however often it occurs, it is always in the same one.
    """
    tokenizer, tokens, counts = _worker["tokenizer"], {"train": [], "valid": []}, np.zeros(3, np.int64)
    type_ = _token_type(tokenizer.vocab_size())
    for document in block:
        text = document.text()
        if lines := text_lines(text):
            digest = blake2b(text.replace("\r\n", "\n").strip().encode(), digest_size=8, key=_worker["key"]).digest()
            split = "valid" if int.from_bytes(digest, "little") < _worker["share"] * 2**64 else "train"
            encoded = map(tokenizer.encode, lines)  # of a list SentencePiece makes threads, which cost a fifth
            tokens[split] += [np.array(line, type_) for line in (*encoded, [SpecialIds.eos])]
            counts += 1, len(document.raw), len(text.split())
    return {split: np.concatenate(parts) for split, parts in tokens.items() if parts}, counts


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents, in order, in blocks of about BLOCK_BYTES."""
    block, size = [], 0
    for document in documents:
        block.append(document)
        size += len(document.raw)
        if size > BLOCK_BYTES:
            yield block
            block, size = [], 0
    yield block


def _encode(blocks: Iterable[list[Document]], n_workers: int, start_worker: tuple) -> Iterator[tuple]:
    """Runs _encode_block on each block, in order, in n_workers processes, with a bounded number of blocks waiting."""
    if n_workers == 1:
        _start_worker(*start_worker)
        yield from map(_encode_block, blocks)
        return
    with ProcessPoolExecutor(n_workers, initializer=_start_worker, initargs=start_worker) as pool:
        waiting: deque = deque()
        for block in blocks:
            waiting.append(pool.submit(_encode_block, block))
            if len(waiting) > 4 * n_workers:
                yield waiting.popleft().result()
        yield from (result.result() for result in waiting)


# Data folders ------------------------------------------------------------------------------------------------------


def read_meta(folder: Path) -> dict[str, dict]:
    """Language -> its numbers of documents, bytes and words, train and valid (shard -> tokens), seed, valid_fraction,
    text_field and the files it was made from (name -> bytes); {} for a language that is not finished.
    Raises InputError for a folder that data.py did not make.
    """
    if not folder.is_dir():  # a checkpoint's relative path starts where it was trained
        raise InputError(f"{folder}: no such folder; name one made by data.py with --data")
    if not (folder / "tokenizer.model").exists():
        raise InputError(f"{folder}: no tokenizer.model in it; `python data.py {folder} DATA` makes shards of its text")
    meta = {}
    for path in sorted(folder.glob("*.json")):
        try:
            meta[path.stem] = json.loads(path.read_bytes() or "{}")
            if meta[path.stem].keys() not in (ENTRY, set()):
                raise ValueError
        except (ValueError, AttributeError):
            raise InputError(f"{path}: not a description of a language by data.py; remove it or the folder") from None
    return meta


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    with tempfile.TemporaryDirectory(suffix=".tmp", dir=path.parent) as folder:
        (Path(folder) / path.name).write_bytes(content)
        (Path(folder) / path.name).rename(path)


def _write_language(data_dir: Path, language: str, encoded: Iterator[tuple], model: bytes, origin: dict) -> None:
    """Writes a language's shards, then <lang>.json, which also holds `origin`: how they were made. It stays empty if no
    text is left to train on, or if none is held out though some should be.
    """
    description = data_dir / f"{language}.json"
    busy = f"{data_dir}: another data.py is encoding {language!r}; wait for it, or give each other languages"
    shards, totals, prefix = {"train": {}, "valid": {}}, np.zeros(3, np.int64), f"{language}."
    with lock_file(description, busy), tempfile.TemporaryDirectory(".tmp", prefix, data_dir) as folder:
        for leftover in {*data_dir.glob(f"{language}.*.tmp")} - {Path(folder)}:  # of a killed run
            shutil.rmtree(leftover, ignore_errors=True)
        for tokens, counts in encoded:
            totals += counts
            for split, piece in tokens.items():
                _append(Path(folder), f"{language}.{split}", shards[split], piece)
        if not shards["train"] or (origin["valid_fraction"] and not shards["valid"]):
            return
        for shard, n in (shards["train"] | shards["valid"]).items():
            with open(Path(folder) / shard, "r+b") as file:
                file.write(_header(model, n))
            (Path(folder) / shard).rename(data_dir / shard)
        counts = dict(zip(("documents", "bytes", "words"), totals.tolist()))
        _write_whole(description, json.dumps(counts | shards | origin, indent=1).encode())


def _open_folder(data_dir: Path, given: Path | None, train: Callable[[], bytes]) -> bytes:
    """Makes a data folder; returns its tokenizer, given or trained. Raises InputError if the folder has another one."""
    there = data_dir / "tokenizer.model"
    data_dir.mkdir(parents=True, exist_ok=True)
    if any(path.suffix != ".tmp" for path in data_dir.iterdir()) and not (given and there.exists()):
        remedy = f"to continue it or add languages, give --tokenizer {there}" if there.exists() else "name another"
        raise InputError(f"{data_dir}: not empty; {remedy}")
    model = adopt_tokenizer(given.read_bytes(), given) if given else train()
    if not there.exists():
        _write_whole(there, model)
    if there.read_bytes() != model:
        raise InputError(f"{given or 'a new tokenizer'}: not that of {data_dir}; give --tokenizer {there}")
    return model


def _to_encode(data_dir: Path, files: dict[str, dict[str, int]], text_field: str) -> list[str]:
    """The languages that a data folder lacks; prints those it has. Raises InputError if one comes from other text."""
    done = {language: entry for language, entry in read_meta(data_dir).items() if entry and language in files}
    for language, entry in done.items():
        change = f"another --text-field, {entry['text_field']!r}" if entry["text_field"] != text_field else ""
        if changed := entry["files"].items() ^ files[language].items():
            change = f"other files ({min(changed)[0]} is new, gone or of another size)"
        if change:
            remedy = f"remove {data_dir / language}.* to encode it again"
            raise InputError(f"{data_dir}: {language!r} was made from {change}; {remedy}")
        say(f"{language}: already encoded, with --seed {entry['seed']} --valid-fraction {entry['valid_fraction']}")
    return [language for language in files if language not in done]


def prepare(
    text_dir: Path,
    data_dir: Path,
    vocab_size: int,
    tokenizer: Path | None = None,
    valid_fraction: float = 0.01,
    seed: int = 0,
    text_field: str = "",
    n_workers: int = 1,
) -> dict[str, dict]:
    """Turns text into a tokenizer and shards; returns what read_meta does, for the languages that are finished.

    Keeps a language that the folder already has from the same files. However this ends, each language is complete, or
    its <lang>.json is empty and the same call with the folder's tokenizer encodes it. Raises InputError for a mistake
    in the text or the arguments, and for a full disk.
    """
    text, _ = find_text(text_dir)
    if data_dir.resolve().is_relative_to(text_dir.resolve()):
        raise InputError(f"{data_dir}: inside {text_dir}, where it would be taken for text; name another folder")
    model = _open_folder(data_dir, tokenizer, lambda: train_tokenizer(text, vocab_size, seed, text_field))
    files = {x: {str(path.relative_to(text_dir)): path.stat().st_size for path in text[x]} for x in text}
    languages = _to_encode(data_dir, files, text_field)
    try:
        for language in languages:
            (data_dir / f"{language}.json").touch()
        total = sum(sum(files[language].values()) for language in languages)
        with tqdm(total=total, unit="B", unit_scale=True, desc="encoding", disable=None) as bar:
            for language in languages:
                bar.set_postfix_str(language)
                documents = (x for path in text[language] for x in read_documents(path, text_field, bar.update))
                encoded = _encode(_blocks(documents), n_workers, (model, seed, valid_fraction))
                origin = dict(seed=seed, valid_fraction=valid_fraction, text_field=text_field, files=files[language])
                _write_language(data_dir, language, encoded, model, origin)
    except (OSError, BrokenProcessPool) as error:
        raise InputError(f"{data_dir}: {error}; make room (disk, memory), then {AGAIN.format(data_dir)}") from None
    meta = read_meta(data_dir)
    if lacking := ", ".join(x for x in languages if not meta[x]):
        lack = f"{lacking}: no document to train on, or none held out (a blank line ends a document)"
        raise InputError(f"{text_dir}: {lack}; add text or change --valid-fraction, then {AGAIN.format(data_dir)}")
    if unfinished := ", ".join(x for x in meta if not meta[x]):
        say(f"{data_dir}: not finished: {unfinished}; another data.py is still working on it, or was killed")
    return {language: entry for language, entry in meta.items() if entry}


def shares(tokens: dict[str, int], alpha: float) -> dict[str, float]:
    """Sampling probability of each language: proportional to tokens ** alpha (Soltan et al. 2022)."""
    weights = {language: n**alpha for language, n in tokens.items()}
    return {language: weight / sum(weights.values()) for language, weight in weights.items()}


def print_table(meta: dict[str, dict]) -> None:
    """Prints what a data folder holds, its shares at the default alpha of 0.5, and which languages have too little."""
    train, valid = ({x: sum(entry[split].values()) for x, entry in meta.items()} for split in ("train", "valid"))
    share = shares(train, 0.5)
    print("language  documents      tokens    held out         bytes  tokens/word  share")
    for x, entry in meta.items():
        per_word = (train[x] + valid[x]) / max(1, entry["words"])
        counts = f"{entry['documents']:10,} {train[x]:11,} {valid[x]:11,} {entry['bytes']:13,}"
        print(f"{x:8} {counts} {per_word:12.2f} {share[x]:6.1%}")
    if few := ", ".join(x for x in meta if train[x] < FEW_TOKENS):
        print(f"warning: under {FEW_TOKENS:,} tokens to train on, which a model will memorise: {few}; add text")
    if few := ", ".join(f"{x} {valid[x]}" for x in meta if valid[x] < LONG_ROW):
        remedy = "add text, or remove <lang>.* and encode it again with a larger --valid-fraction"
        print(f"warning: few tokens held out, which limits --seq-len too: {few}; {remedy}")


# The stream --------------------------------------------------------------------------------------------------------


class _Tokens:
    """The tokens of a language's shards as one sequence, read through memory maps."""

    def __init__(self, folder: Path, language: str, shards: dict[str, int], model: bytes, vocab_size: int):
        self.maps, type_ = [], _token_type(vocab_size)
        self.remedy = f"remove {folder / language}.* and {AGAIN.format(folder)}"
        for path, n in ((folder / shard, n) for shard, n in shards.items()):
            if not path.exists() or path.stat().st_size != HEADER + n * type_.itemsize:
                raise InputError(f"{path}: missing, or not of {n} tokens; {self.remedy}")
            with open(path, "rb") as file:
                map_ = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if map_[:HEADER] != _header(model, n):
                raise InputError(f"{path}: not a shard of this folder's tokenizer; {self.remedy}")
            map_.madvise(mmap.MADV_RANDOM)  # else each row that is not in memory yet costs a read of 128 kB
            self.maps.append(np.frombuffer(map_, type_, offset=HEADER))
        self.ends = [0, *accumulate(shards.values())]

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, start: int, length: int) -> np.ndarray:  # [length]
        """Tokens from `start` on."""
        shard = bisect_right(self.ends, start) - 1
        tokens = self.maps[shard][start - self.ends[shard] :][:length].astype(np.int64)
        if len(tokens) < length:  # the rest is in the next shards
            tokens = np.concatenate([tokens, self.read(start + len(tokens), length - len(tokens))])
        return tokens


class TokenData:
    """Rows of seq_len tokens from a data folder: `row(i)` to train on, `valid_row(language, j)` held out.

    Over any number of whole blocks of samples, each language gets its share to within one row. Within a language, every
    row comes once before any comes twice, in a new order each time. Finding a row takes constant time and memory.
    Raises InputError for a folder that is unfinished, damaged, or too small for a single row.
    """

    BLOCK = 1024  # samples among which the languages are shuffled

    def __init__(self, folder: Path, seq_len: int, seed: int = 0, alpha: float = 0.5):
        meta, path = read_meta(folder), folder / "tokenizer.model"
        if not (meta and all(meta.values())):
            names = ", ".join(x for x in meta if not meta[x]) or "every language"
            raise InputError(f"{folder}: not finished: {names}; {AGAIN.format(folder)}, or remove their <lang>.json")
        self.languages, self.seq_len, self.seed = list(meta), seq_len, seed
        self.tokenizer_model = model = path.read_bytes()
        self.tokenizer = load_tokenizer(model, path)
        self.ids = SpecialIds(self.tokenizer.vocab_size())
        tokens = lambda split: {x: _Tokens(folder, x, meta[x][split], model, self.ids.vocab_size) for x in meta}
        self.train, self.valid = tokens("train"), tokens("valid")
        sizes = [[x, len(self.train[x]), len(self.valid[x])] for x in meta]
        self.fingerprint = sha256(json.dumps(sizes).encode() + model).hexdigest()
        for x, n, _ in sizes:
            if n < seq_len:
                lack = f"{x!r} has {n} tokens to train on, but a row needs {seq_len}"
                raise InputError(f"{folder}: {lack}: add text, remove {x}.*, or lower --seq-len")
        share = [*shares({x: n for x, n, _ in sizes}, alpha).values()]
        self._below = np.array([0.0, *np.cumsum(share)[:-1], 1.0])
        self._block_size = max(self.BLOCK, int(2 / min(share)))

    @lru_cache(maxsize=2)
    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each sample of a block its language, and how many samples of that language came before it."""
        ends = (np.floor((block + k) * self._block_size * self._below + 0.5).astype(np.int64) for k in (0, 1))
        before, after = map(np.diff, ends)  # each language has its share, rounded, of the first n samples
        languages = np.repeat(np.arange(len(before)), after - before)
        order = sample_rng(self.seed, ORDER, block).random(len(languages)).argsort(kind="stable")
        ranks, by_language = np.empty_like(languages), languages[order].argsort(kind="stable")
        ranks[by_language] = np.concatenate([np.arange(a, b) for a, b in zip(before, after)])
        return languages[order], ranks

    def locate(self, i: int) -> tuple[str, int]:
        """Language of sample i, and which of that language's rows it is."""
        languages, ranks = self._block(i // self._block_size)
        language, rank = self.languages[languages[i % self._block_size]], int(ranks[i % self._block_size])
        n_rows = len(self.train[language]) // self.seq_len
        key = _hash64(_hash64(_hash64(self.seed) ^ zlib.crc32(language.encode())) ^ rank // n_rows)
        return language, permuted(rank % n_rows, n_rows, key)

    def row(self, i: int) -> np.ndarray:  # [L]
        """The tokens of sample i."""
        language, row = self.locate(i)
        return self.train[language].read(row * self.seq_len, self.seq_len)

    def n_valid_rows(self, language: str) -> int:
        """Number of held-out rows of a language. Raises InputError if there are none."""
        tokens = self.valid[language]
        if len(tokens) < self.seq_len:
            lack = f"{language!r} has {len(tokens)} tokens held out, but a row needs {self.seq_len}"
            raise InputError(f"{lack}: lower --seq-len, add text, or {tokens.remedy} and a larger --valid-fraction")
        return len(tokens) // self.seq_len

    def valid_row(self, language: str, j: int) -> np.ndarray:  # [L]
        """The tokens of held-out row j of a language."""
        return self.valid[language].read(j * self.seq_len, self.seq_len)

    def unigram_entropy(self, language: str) -> float:
        """Entropy in nats of a language's token counts (of its first 4M): the loss of a model that ignores context."""
        tokens = self.train[language].read(0, min(len(self.train[language]), 1 << 22))
        p = np.unique(tokens, return_counts=True)[1] / len(tokens)
        return float(-(p * np.log(p)).sum())


def _hash64(x: int) -> int:
    """Maps a 64-bit integer to another that looks unrelated (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def permuted(i: int, n: int, key: int) -> int:
    """Element i of the permutation of 0..n-1 that the key selects, without a table: a Feistel network, applied again
    while the result is n or more (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, (n - 1).bit_length() + 1 >> 1)  # bits of each half of i
    while True:
        left, right = i >> half, i & (1 << half) - 1
        for round_ in range(4):
            left, right = right, left ^ _hash64(key ^ _hash64(right << 2 | round_)) & (1 << half) - 1
        i = left << half | right
        if i < n:
            return i


def main() -> None:
    parser = argparse.ArgumentParser(description="Turns text into a tokenizer and token shards.")
    flag = parser.add_argument
    flag("text_dir", type=Path, help=f"folder with {LAYOUT}")
    flag("data_dir", type=Path, help="folder to write: a new one or, with --tokenizer, one to continue or add to")
    flag("--vocab-size", type=int, default=150_000, help="pieces, special ones included (default %(default)s)")
    flag("--tokenizer", type=Path, help="use this SentencePiece unigram model instead of training one")
    flag("--text-field", default="", help="field with the text in JSON lines or parquet (default text, else content)")
    flag("--valid-fraction", type=float, default=0.01, help="share of documents held out (default %(default)s)")
    flag("--seed", type=int, default=0, help="seed for the tokenizer's sample and the split (default %(default)s)")
    args = parser.parse_args()
    if not (0 <= args.valid_fraction < 1 and 0 <= args.seed < 1 << 64):
        raise InputError("--valid-fraction must be at least 0 and below 1, --seed from 0 to 2**64 - 1")
    if args.tokenizer and args.vocab_size != parser.get_default("vocab_size"):
        raise InputError("--vocab-size does nothing with --tokenizer; leave it out")
    print_text(*find_text(args.text_dir), args.text_field)
    print_table(prepare(**vars(args), n_workers=len(os.sched_getaffinity(0))))


if __name__ == "__main__":
    run_command(main)
