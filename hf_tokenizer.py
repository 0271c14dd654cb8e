"""Turns a tokenizer of this project into a fast one of transformers, for hf.py."""

import json
from pathlib import Path

import sentencepiece as spm
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cli import say
from tokenizer import SpecialIds, load_tokenizer, sentencepiece_messages

GAP = "\ufdd0"  # no text may hold this code point


def _rules(model: bytes) -> list[tuple[str, str]]:
    """A tokenizer's normalisation rules: a string and its replacement. How it treats spaces is not among them."""
    try:
        return spm.SentencePieceNormalizer(model_proto=model).decompile()
    except RuntimeError:  # it has none
        return []


def _any_of(chars: set[str]) -> str:
    """The inside of a regular expression's [ ]."""
    return "".join(f"\\x{{{ord(char):x}}}" for char in sorted(chars))


def _rule_steps(model: bytes, rules: list[tuple[str, str]]) -> list[normalizers.Normalizer]:
    """Steps that apply the rules as SentencePiece does: from left to right, the longest one that fits.

    Precompiled does so for single characters only: for a letter with marks it may take a shorter rule and lose marks,
    or find none. So a GAP separates each mark from what is before it, and NFC joins letters and marks afterwards, as
    the rules for several characters do. NFC joins and sorts more than they do, so elsewhere the GAP stays until then.
    """
    charsmap = sentencepiece_messages("tokenizer").ModelProto.FromString(model).normalizer_spec.precompiled_charsmap
    mark = _any_of({char for source, _ in rules for char in source[1:]})
    letter = _any_of({source[0] for source, _ in rules if len(source) > 1} - {source for source, _ in rules})
    steps = [
        normalizers.Replace(Regex(rf"(?!\A)(?=[\p{{M}}\x{{200c}}\x{{200d}}\n{mark}])"), GAP),
        normalizers.Precompiled(charsmap),
    ]
    if mark and letter:
        before = f"[{letter}]|[{letter}]{GAP}[{mark}]|[{letter}]{GAP}[{mark}]{GAP}[{mark}]"
        steps += [normalizers.Replace(Regex(f"(?<={before}){GAP}(?=[{mark}])"), ""), normalizers.NFC()]
    return [*steps, normalizers.Replace(GAP, "")]


def _fast(model: bytes, ours: spm.SentencePieceProcessor, rules: list[tuple[str, str]]) -> Tokenizer:
    """The tokenizer without its special tokens."""
    prefix, keeps_spaces = ours.normalize("a").startswith("▁"), ours.normalize("a ").endswith("▁")
    steps = _rule_steps(model, rules) if rules else []
    if keeps_spaces:
        steps += [normalizers.Replace(" ", "▁")]
    else:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex(r"[ ▁]+\z"), "")]
        steps += [] if prefix else [normalizers.Replace(Regex(r"\A +"), "")]
    # The first Metaspace puts a space before a text that does not begin with one: if spaces are kept, before any text.
    spaces = [pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False)] if prefix else []
    spaces += [pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False)]
    # <0x41> in a text is text. "isolated" would also split the < from a space before it, and "▁<" may be a piece.
    bytes_as_text = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous")
    pieces = [(ours.id_to_piece(i), ours.get_score(i)) for i in range(ours.vocab_size())]
    has_bytes = any(ours.is_byte(i) for i in range(ours.vocab_size()))
    fast = Tokenizer(models.Unigram(pieces, unk_id=SpecialIds.unk, byte_fallback=has_bytes))
    fast.normalizer = normalizers.Sequence(steps)
    fast.pre_tokenizer = pre_tokenizers.Sequence([*spaces, bytes_as_text])
    strip = [] if keeps_spaces and not prefix else [decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return fast


def hf_tokenizer(model: bytes, max_len: int) -> PreTrainedTokenizerFast:
    """A tokenizer with our ids and a closing </s>. Prints how many pieces and rules get different ids, if any do.

    As everywhere in transformers, text that spells a special token becomes that token. Ids may also differ where two
    ways to split a text are equally probable, as for "....". If there are rules, they may differ for a letter whose
    marks are not in Unicode's order and for a mark after a letter that a rule has produced.
    """
    ours, rules = load_tokenizer(model, "tokenizer"), _rules(model)
    fast, ids = _fast(model, ours, rules), SpecialIds(ours.vocab_size())
    pieces = ours.id_to_piece(list(range(ours.vocab_size())))
    texts = [piece.replace("▁", " ") for piece in pieces[ids.ordinary :]] + [source for source, _ in rules]
    if differ := [x for x, a, b in zip(texts, ours.encode(texts), fast.encode_batch(texts)) if a != b.ids]:
        share = f"{len(differ):,} of {len(texts):,} pieces and rules of normalisation"
        say(f"tokenizer: {share} get other ids in transformers, such as {differ[0]!r}")
    eos = ("</s>", ids.eos)
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[eos])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        **{f"{name}_token": pieces[getattr(ids, name)] for name in ("pad", "bos", "eos", "unk")},
        mask_token=AddedToken("<mask>", lstrip=True, special=True),  # it stands for a word and the space before it
        additional_special_tokens=pieces[ids.clm : ids.ordinary],
        model_max_length=max_len,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the tokenizer into a folder, for transformers 4.57 and 5."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_bytes())
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")  # as 4.57 calls them
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2), "utf-8")
