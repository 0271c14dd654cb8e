"""Tokenizers that others trained: what `data.py --tokenizer` makes of them."""

import re

import pytest
import sentencepiece as spm
from foreign import FOREIGN, ODD_LINES, foreign, train, without

from cli import InputError
from data import SAMPLE_TEXT, TokenData, prepare
from tokenizer import BYTE_PIECES, SPECIAL_PIECES, SpecialIds, adopt_tokenizer, load_tokenizer

FIRST = len(SPECIAL_PIECES + BYTE_PIECES)
LINES = [line for path in sorted(SAMPLE_TEXT.glob("*.txt")) for line in path.read_text("utf-8").splitlines()]


OUR_IDS = dict(
    pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="<pad>", control_symbols=SPECIAL_PIECES[SpecialIds.mask :]
)


def pieces(tokenizer: spm.SentencePieceProcessor) -> list[str]:
    return tokenizer.id_to_piece(list(range(tokenizer.vocab_size())))


@pytest.mark.parametrize("name", FOREIGN)
def test_text_is_cut_into_the_same_pieces(name, capsys):
    theirs = spm.SentencePieceProcessor(model_proto=foreign(name))
    ours = load_tokenizer(adopt_tokenizer(foreign(name), "theirs.model"), "theirs.model")
    kept = [i for i, piece in enumerate(pieces(theirs)) if piece not in SPECIAL_PIECES + BYTE_PIECES]
    new_id = {i: FIRST + k for k, i in enumerate(kept)}
    assert pieces(ours) == SPECIAL_PIECES + BYTE_PIECES + [theirs.id_to_piece(i) for i in kept]
    assert [ours.get_score(new_id[i]) for i in kept] == [theirs.get_score(i) for i in kept]
    said = (
        f"theirs.model: {len(kept):,} of its 2,000 pieces are kept, in their order, as ids 362 to {361 + len(kept):,}"
    )
    assert capsys.readouterr().out == f"{said}, after 106 special pieces and 256 bytes\n"
    n_known = 0
    for line in LINES + ODD_LINES:
        before, after = theirs.encode(line), ours.encode(line)
        assert ours.normalize(line) == theirs.normalize(line) and ours.unk_id() not in after
        if all(i in new_id for i in before):
            n_known += 1
            assert after == [new_id[i] for i in before], line
            assert ours.decode(after) == theirs.decode(before)
        else:  # what was <unk> is bytes, and nothing of it is lost
            assert "".join(ours.decode(after).split()) == "".join(ours.normalize(line).replace("▁", " ").split()), line
    assert 100 < n_known < len(LINES)


def test_a_model_with_our_ids_stays_as_it_is(data_dir, capsys):
    adopted = adopt_tokenizer(foreign("nmt_nfkc"), "x")
    capsys.readouterr()
    for model in ((data_dir / "tokenizer.model").read_bytes(), adopted, train(**OUR_IDS)):
        assert adopt_tokenizer(model, "x") is model
    assert capsys.readouterr().out == ""


def test_pieces_that_are_dropped_are_named(capsys):
    model = train(control_symbols=["[CLS]"], user_defined_symbols=["<mask>", "<b>"])
    ours = load_tokenizer(adopt_tokenizer(model, "x"), "x")
    assert capsys.readouterr().out.endswith("and 256 bytes; dropped: [CLS] <mask> (2)\n")
    assert "[CLS]" not in pieces(ours) and pieces(ours).count("<mask>") == 1 and ours.is_control(4)
    assert min(ours.encode("a <mask> and <b>")) >= len(SPECIAL_PIECES) and ours.piece_to_id("<b>") == FIRST


@pytest.mark.parametrize("model_type, vocab_size", [("bpe", 2000), ("word", 800), ("char", 300)])
def test_other_kinds_of_model_are_refused(text_dir, tmp_path, model_type, vocab_size):
    (tmp_path / "other.model").write_bytes(train(model_type, vocab_size))
    with pytest.raises(InputError, match="other.model: not a SentencePiece unigram model; BPE, word and char models"):
        prepare(text_dir, tmp_path / "out", 0, tmp_path / "other.model")
    with pytest.raises(InputError, match="not a SentencePiece unigram model"):
        adopt_tokenizer(train(model_type, vocab_size, **OUR_IDS), "x")


def test_data_made_with_a_foreign_tokenizer(text_dir, tmp_path):
    (tmp_path / "theirs.model").write_bytes(foreign("nmt_nfkc"))
    for out in ("one", "two"):
        prepare(text_dir, tmp_path / out, 0, tmp_path / "theirs.model", valid_fraction=0.2)
    assert (tmp_path / "one/tokenizer.model").read_bytes() == (tmp_path / "two/tokenizer.model").read_bytes()
    stream = TokenData(tmp_path / "one", 64)
    text = " ".join((text_dir / "en.txt").read_text("utf-8").split())
    sentence = stream.tokenizer.decode(stream.train["en"].read(0, 64).tolist()).split(".")[1].strip()
    assert len(sentence) > 10 and sentence in text


def test_without_protobuf_the_pip_command_is_named(data_dir, monkeypatch):
    without("sentencepiece_model_pb2", monkeypatch)
    with pytest.raises(InputError, match=re.escape("x: a tokenizer not trained here needs protobuf: pip install")):
        adopt_tokenizer(foreign("nmt_nfkc"), "x")
    own = (data_dir / "tokenizer.model").read_bytes()
    assert adopt_tokenizer(own, "x") is own
