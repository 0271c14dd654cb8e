"""What transformers calls our models, their settings and their tensors, for hf.py."""

from dataclasses import fields
from typing import NamedTuple

import transformers

import hf_seq2seq
from model import ModelConfig
from objectives import SpecialIds


class Family(NamedTuple):
    """The transformers counterpart of our models of one kind with one sort of positions."""

    model_class: type
    kind: str  # of our checkpoint
    positions: str  # of our model
    settings: dict[str, str]  # their name of a setting -> ours
    fixed: dict[str, object]  # settings that all our models share
    tensors: dict[str, str]  # part of our tensor name -> theirs, replaced in this order


ENCODER_SETTINGS = dict(
    vocab_size="vocab_size", hidden_size="d_model", num_attention_heads="n_heads", intermediate_size="d_ff",
    num_hidden_layers="n_encoder_layers", max_position_embeddings="max_len", hidden_dropout_prob="dropout",
)  # fmt: skip
BLENDERBOT_SETTINGS = dict(
    vocab_size="vocab_size", d_model="d_model", max_position_embeddings="max_len", dropout="dropout",
    encoder_attention_heads="n_heads", encoder_ffn_dim="d_ff", encoder_layers="n_encoder_layers",
    decoder_attention_heads="n_heads", decoder_ffn_dim="d_ff", decoder_layers="n_decoder_layers",
)  # fmt: skip
SEQUENTIAL_SETTINGS = {field.name: field.name for field in fields(ModelConfig) if field.name != "fusion"}

ALL_FIXED = dict(
    tie_word_embeddings=True, pad_token_id=SpecialIds.pad, bos_token_id=SpecialIds.bos, eos_token_id=SpecialIds.eos
)
ENCODER_FIXED = ALL_FIXED | dict(attention_probs_dropout_prob=0.0, layer_norm_eps=1e-5)
SEQ2SEQ_FIXED = ALL_FIXED | dict(is_encoder_decoder=True, decoder_start_token_id=SpecialIds.bos)
SEQUENTIAL_FIXED = SEQ2SEQ_FIXED | dict(fusion=False)
XLM_FIXED = ENCODER_FIXED | dict(hidden_act="gelu", type_vocab_size=1)
ESM_FIXED = ENCODER_FIXED | dict(
    position_embedding_type="rotary", emb_layer_norm_before=False, token_dropout=False, mask_token_id=SpecialIds.mask
)
BLENDERBOT_FIXED = SEQ2SEQ_FIXED | dict(
    activation_function="gelu", attention_dropout=0.0, activation_dropout=0.0, scale_embedding=False,
    forced_eos_token_id=None, encoder_no_repeat_ngram_size=0,
)  # fmt: skip

POSITIONS = "roberta.embeddings.position_embeddings.weight"  # row 0 is for padding; ours have no such row
TYPES = "roberta.embeddings.token_type_embeddings.weight"  # [1, D], added at every position
BIAS = "final_logits_bias"
ZEROS = TYPES, BIAS, "esm.contact_head.regression.weight", "esm.contact_head.regression.bias"  # ours have none of them
COPIES = "lm_head.decoder.weight", "lm_head.weight", "embed_tokens.weight"  # of the embedding
XLM_TENSORS = {
    "embed.": "roberta.embeddings.word_embeddings.", "encoder.positions.": "roberta.embeddings.position_embeddings.",
    "encoder.norm.": "roberta.encoder.LayerNorm.", "encoder.blocks.": "roberta.encoder.layer.",
    ".attn_norm.": ".attention.self_attn_layer_norm.", ".attn.out.": ".attention.output.dense.",
    ".attn.q.": ".attention.self.query.", ".attn.k.": ".attention.self.key.", ".attn.v.": ".attention.self.value.",
    ".ffn_norm.": ".LayerNorm.", ".ffn.0.": ".intermediate.dense.", ".ffn.2.": ".output.dense.",
    "head.0.": "lm_head.dense.", "head.2.": "lm_head.layer_norm.", "head_bias": "lm_head.bias",
}  # fmt: skip
ESM_TENSORS = XLM_TENSORS | {
    "embed.": "esm.embeddings.word_embeddings.", "encoder.norm.": "esm.encoder.emb_layer_norm_after.",
    "encoder.blocks.": "esm.encoder.layer.", ".attn_norm.": ".attention.LayerNorm.",
}  # fmt: skip
BLENDERBOT_TENSORS = {
    "embed.": "model.shared.", "encoder.": "model.encoder.", "decoder.": "model.decoder.", ".blocks.": ".layers.",
    ".positions.": ".embed_positions.", ".norm.": ".layer_norm.", ".attn_norm.": ".self_attn_layer_norm.",
    ".attn.": ".self_attn.", ".cross_norm.": ".encoder_attn_layer_norm.", ".cross.": ".encoder_attn.",
    ".q.": ".q_proj.", ".k.": ".k_proj.", ".v.": ".v_proj.", ".out.": ".out_proj.",
    ".ffn_norm.": ".final_layer_norm.", ".ffn.0.": ".fc1.", ".ffn.2.": ".fc2.",
}  # fmt: skip
SEQUENTIAL_TENSORS = {part: f"model.{part}" for part in ("embed.", "encoder.", "decoder.")}

XLM, ESM, BLENDERBOT, SEQUENTIAL = "xlm-roberta-xl", "esm", "blenderbot", "sequential-seq2seq"
FAMILIES = {  # by the `model_type` of a configuration
    XLM: Family(transformers.XLMRobertaXLForMaskedLM, "encoder", "learned", ENCODER_SETTINGS, XLM_FIXED, XLM_TENSORS),
    ESM: Family(transformers.EsmForMaskedLM, "encoder", "rotary", ENCODER_SETTINGS, ESM_FIXED, ESM_TENSORS),
    BLENDERBOT: Family(
        transformers.BlenderbotForConditionalGeneration, "seq2seq", "learned",
        BLENDERBOT_SETTINGS, BLENDERBOT_FIXED, BLENDERBOT_TENSORS,
    ),
    SEQUENTIAL: Family(
        hf_seq2seq.Seq2SeqLM, "seq2seq", "rotary", SEQUENTIAL_SETTINGS, SEQUENTIAL_FIXED, SEQUENTIAL_TENSORS
    ),
}  # fmt: skip
# Settings that do not affect what a model computes.
NOT_COMPARED = {"transformers_version", "architectures", "dtype", "use_cache", "initializer_range", "init_std"}


def family_of(cfg: ModelConfig) -> str:
    """The family of our models of this shape."""
    shape = "seq2seq" if cfg.n_decoder_layers else "encoder", cfg.positions
    return next(name for name, family in FAMILIES.items() if (family.kind, family.positions) == shape)


def tensor_names(family: str, name: str) -> list[str]:
    """A family's names for our tensor: one, or two where ours holds keys and values and theirs are separate."""
    split = ".kv." in name and family != SEQUENTIAL
    names = [name.replace(".kv.", f".{part}.") for part in "kv"] if split else [name]
    for ours, theirs in FAMILIES[family].tensors.items():
        names = [name.replace(ours, theirs) for name in names]
    return names
