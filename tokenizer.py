"""Tokenizers: SentencePiece unigram models (Kudo 2018) with our special ids, trained here or adopted from elsewhere."""

import io
import random
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from types import ModuleType

import sentencepiece as spm

from cli import InputError
from text import read_documents, text_lines


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens, the same in every tokenizer of this project; ordinary pieces follow them."""

    vocab_size: int
    pad: int = 0
    bos: int = 1  # <s>, starts the decoder
    eos: int = 2  # </s>, closes a document
    unk: int = 3
    mask: int = 4
    clm: int = 5  # [CLM], prefix of causal rows in AlexaTM 20B
    sentinel: int = 6  # <extra_id_0>; <extra_id_k> is sentinel + k
    n_sentinels: int = 100
    ordinary: int = sentinel + n_sentinels  # the first id that stands for text; so do all ids after it


TOKENIZER_CHARS = 8_000_000  # characters the tokenizer is trained on, in equal shares of the languages
SPECIAL_PIECES = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "[CLM]"]  # in the order of their ids in SpecialIds
SPECIAL_PIECES += [f"<extra_id_{k}>" for k in range(SpecialIds.n_sentinels)]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def sample_lines(files: list[Path], n_chars: int, seed: int, text_field: str = "") -> list[str]:
    """A uniform sample of lines: about n_chars characters out of 32 times as many (at least 1 MB of each file)."""
    rng, kept, size, seen = random.Random(seed), [], 0, 0
    files = rng.sample(files, len(files))
    share = max(1 << 20, 32 * n_chars // len(files))
    for path in files:
        read = 0
        for document in read_documents(path, text_field):
            for line in text_lines(document.text()):
                line = line[:4000]  # the trainer's limit is in bytes, of which a character has at most four
                seen, size = seen + 1, size + len(line)
                heappush(kept, (-rng.random(), seen, line))
                while size > n_chars:  # the lines with the smallest random keys stay
                    size -= len(heappop(kept)[-1])
            read += len(document.raw)
            if read > share:
                break
    return [line for *_, line in sorted(kept)]


def train_tokenizer(text: dict[str, list[Path]], vocab_size: int, seed: int, text_field: str = "") -> bytes:
    """A SentencePiece unigram model (Kudo 2018) in which every Unicode text survives encoding and decoding.

    It does not normalise, keeps spaces, and writes characters outside the vocabulary as bytes. Only U+2581,
    SentencePiece's sign for a space, comes back as another one. Raises InputError if vocab_size does not fit the text.
    """
    share = TOKENIZER_CHARS // len(text)
    lines = [line for files in text.values() for line in sample_lines(files, share, seed, text_field)]
    if not lines:
        raise InputError("no text to train a tokenizer on: every file is empty")
    random.Random(seed).shuffle(lines)
    ids, model = SpecialIds(vocab_size), io.BytesIO()
    special = dict(pad_id=ids.pad, bos_id=ids.bos, eos_id=ids.eos, unk_id=ids.unk, pad_piece="<pad>")
    special["control_symbols"] = SPECIAL_PIECES[ids.mask :]  # text never becomes one of them, whatever it says
    lossless = dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
    other = dict(model_type="unigram", max_sentence_length=1 << 16, minloglevel=2, num_threads=8)  # result depends on 8
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, **special, **lossless, **other
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("] ")[-1] or "too small"
        raise InputError(f"--vocab-size {vocab_size} does not fit this text: {reason}") from None
    return model.getvalue()


def _unigram_model(model: bytes, name: object) -> tuple[spm.SentencePieceProcessor, list[str]]:
    """The tokenizer and its pieces. Raises InputError, naming `name`, unless it is a SentencePiece unigram model."""
    tokenizer = spm.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(model)
        tokenizer.nbest_encode_as_ids("a", 1)  # only a unigram model can do this
        return tokenizer, tokenizer.id_to_piece(list(range(tokenizer.vocab_size())))
    except (RuntimeError, UnicodeDecodeError):
        remedy = "BPE, word and char models are not read; `python data.py` trains one"
        raise InputError(f"{name}: not a SentencePiece unigram model; {remedy}") from None


def load_tokenizer(model: bytes, name: object) -> spm.SentencePieceProcessor:
    """Loads a tokenizer. Raises InputError, naming `name`, unless it is a unigram model with our special ids."""
    tokenizer, pieces = _unigram_model(model, name)
    if pieces[: len(SPECIAL_PIECES)] != SPECIAL_PIECES:
        raise InputError(f"{name}: its special tokens are not this project's; give it to data.py with --tokenizer")
    return tokenizer


def sentencepiece_messages(name: object) -> ModuleType:
    """The protobuf classes of a SentencePiece model. Raises InputError, naming the model, if protobuf is missing."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise InputError(f"{name}: a tokenizer not trained here needs protobuf: pip install protobuf") from None
    return sentencepiece_model_pb2


def adopt_tokenizer(model: bytes, name: object) -> bytes:
    """Gives a SentencePiece unigram model (yours or another project's) our special ids; prints what has changed.

    Our special pieces come first, then the 256 bytes, then its ordinary and user-defined pieces in their order, with
    their scores. Its normalisation stays, and text in characters that it knows is split into the same pieces as before.
    Other characters become bytes, so that they are not lost. Its control and unused pieces are dropped, and so is a
    piece spelled like one of ours. A model with our special ids is returned unchanged.
    Raises InputError, naming `name`, for anything but a unigram model, and if protobuf is missing.
    """
    _, pieces = _unigram_model(model, name)
    if pieces[: len(SPECIAL_PIECES)] == SPECIAL_PIECES:
        return model
    Model = sentencepiece_messages(name).ModelProto
    Piece, proto = Model.SentencePiece, Model.FromString(model)
    ours = [Piece(piece=text, score=0, type=Piece.CONTROL) for text in SPECIAL_PIECES]
    ours[SpecialIds.unk].type = Piece.UNKNOWN
    ours += [Piece(piece=text, score=0, type=Piece.BYTE) for text in BYTE_PIECES]
    is_text, spellings = lambda x: x.type in (Piece.NORMAL, Piece.USER_DEFINED), {x.piece for x in ours}
    kept = [x for x in proto.pieces if is_text(x) and x.piece not in spellings]
    dropped = [x.piece for x in proto.pieces if is_text(x) == (x.piece in spellings)]  # the others are replaced by ours
    spec = proto.trainer_spec
    spec.byte_fallback, spec.vocab_size = True, len(ours + kept)
    spec.pad_id, spec.bos_id, spec.eos_id, spec.unk_id = range(4)  # as SpecialIds has them
    spec.pad_piece, spec.bos_piece, spec.eos_piece, spec.unk_piece = SPECIAL_PIECES[:4]
    spec.control_symbols[:] = SPECIAL_PIECES[SpecialIds.mask :]
    ids = f"ids {len(ours)} to {spec.vocab_size - 1:,}, after {len(SPECIAL_PIECES)} special pieces and 256 bytes"
    said = f"; dropped: {' '.join(dropped[:10])}{' ...' * (len(dropped) > 10)} ({len(dropped):,})" if dropped else ""
    print(f"{name}: {len(kept):,} of its {len(pieces):,} pieces are kept, in their order, as {ids}{said}")
    proto.ClearField("pieces")
    proto.pieces.extend(ours + kept)
    return proto.SerializeToString()
