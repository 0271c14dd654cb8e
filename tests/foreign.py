"""SentencePiece models as others train them, on the embedded corpus, and lines that normalisation changes."""

import builtins
import io
from functools import cache

import pytest
import sentencepiece as spm

from data import SAMPLE_TEXT

KEEPS_SPACES = dict(remove_extra_whitespaces=False)
FOREIGN = {  # options of their training
    "nmt_nfkc": dict(normalization_rule_name="nmt_nfkc"),  # SentencePiece's own choice, that of mT5 and XLM-R
    "bytes": dict(normalization_rule_name="nmt_nfkc", byte_fallback=True, **KEEPS_SPACES),
    "no prefix": dict(normalization_rule_name="nfkc", add_dummy_prefix=False),
    "identity": dict(normalization_rule_name="identity", add_dummy_prefix=False, **KEEPS_SPACES),
    "symbols": dict(normalization_rule_name="nmt_nfkc_cf", user_defined_symbols=["<b>", "</b>", "ing"]),
}

ODD_LINES = [
    "", " ", "   ", "  two spaces  before,  between  and after  ", "tab\there", "\u3000全角\u3000スペース\u3000",
    "a\xa0b", "１２３ ＡＢＣ", "ｱｲｳ ｶﾞｷﾞ ﾊﾟ", "か\u3099 は\u309a", "ﬁnd ﬂat oﬃce", "½ ² ℃ ㍿ Ⅳ ①",
    "e\u0301 e\u0302\u0301 o\u031b\u0323", "²\u0301 x\u0323\u0301 ê\u0301",
    "\u1112\u1161\u11ab\u1100\u1173\u11af", "ொ கெ\u0bbe கே\u0bbe", "ऩ न\u093c क\u093c", "سَهَّلَ الشَّمْس", "ﷺ ﻻ",
    "a\u200db c\u200cd \u200bzero", "soft\xadhyphen", "\ufeffmark", "\x01control", "\u0301starts", "Ünïcödé 😀 ☃ 𝔘",
    "▁", "a▁", "▁a ▁ b▁", "<0x41> and <0xE2>", "<b>bold</b>", " <b> running </b> ", "x" * 300, "İstanbul ẞ ΑΣ",
]  # fmt: skip


def train(model_type: str = "unigram", vocab_size: int = 2000, **options: object) -> bytes:
    """A model of the embedded corpus; rare characters are unknown to it."""
    lines = [line for path in sorted(SAMPLE_TEXT.glob("*.txt")) for line in path.read_text("utf-8").splitlines()]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=model_type, vocab_size=vocab_size,
        character_coverage=0.99, minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


@cache
def foreign(name: str) -> bytes:
    """One of FOREIGN."""
    return train(**FOREIGN[name])


def without(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on an import of it, or from it, fails."""
    real = builtins.__import__

    def importing(name, scope=None, local=None, names=(), level=0):
        if module in (name, *(names or ())):
            raise ImportError(name)
        return real(name, scope, local, names, level)

    monkeypatch.setattr(builtins, "__import__", importing)
