"""A tokenizer of this project as a fast one of transformers, for hf.py."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from data import load_tokenizer
from objectives import SpecialIds


def hf_tokenizer(model: bytes, max_len: int) -> PreTrainedTokenizerFast:
    """A tokenizer with our ids and a closing </s>, for a line of text that does not begin with a space.

    As everywhere in transformers, text that spells a special token becomes that token.
    """
    ours = load_tokenizer(model, "tokenizer")
    ids, pieces = SpecialIds(ours.vocab_size()), ours.id_to_piece(list(range(ours.vocab_size())))
    scores = [ours.get_score(i) for i in range(len(pieces))]
    fast = Tokenizer(models.Unigram(list(zip(pieces, scores)), unk_id=ids.unk, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated"),  # text that spells a byte piece is text
        ]
    )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
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


def save_tokenizer(model: bytes, max_len: int, folder: Path) -> None:
    """Writes the tokenizer for transformers 4.57 and 5, and our tokenizer.model, into a folder."""
    hf_tokenizer(model, max_len).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_bytes())
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")  # as 4.57 calls them
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2), "utf-8")
    (folder / "tokenizer.model").write_bytes(model)
