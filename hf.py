"""Models to and from transformers 4.57 and 5, for `extract.py --to-hf` and `--from-hf`.

An encoder loads as EsmForMaskedLM, or as XLMRobertaXLForMaskedLM if its positions are learned; a seq2seq model with
learned positions loads as BlenderbotForConditionalGeneration. All are Pre-LN with no LayerNorm on the embeddings, as
ours are. transformers has no such seq2seq model with rotary positions, so its folder carries its code (hf_seq2seq.py).
"""

import inspect
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import model as model_code
from checkpoint import MODELS, as_checkpoint, load_model
from cli import InputError
from model import ModelConfig
from tokenizer import SpecialIds, load_tokenizer

try:
    import transformers
    from safetensors import SafetensorError
except ImportError:
    raise InputError("--to-hf and --from-hf need transformers: pip install transformers") from None
import hf_seq2seq
from hf_tokenizer import hf_tokenizer, save_tokenizer

transformers.utils.logging.disable_progress_bar()

# What transformers calls our models, their settings and their tensors ----------------------------------------------


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
XLM_FIXED = ENCODER_FIXED | dict(hidden_act="gelu", type_vocab_size=1)
ESM_FIXED = ENCODER_FIXED | dict(
    position_embedding_type="rotary", emb_layer_norm_before=False, token_dropout=False, mask_token_id=SpecialIds.mask
)
SEQ2SEQ_FIXED = ALL_FIXED | dict(is_encoder_decoder=True, decoder_start_token_id=SpecialIds.bos)
BLENDERBOT_FIXED = SEQ2SEQ_FIXED | dict(
    activation_function="gelu", attention_dropout=0.0, activation_dropout=0.0, scale_embedding=False,
    forced_eos_token_id=None, encoder_no_repeat_ngram_size=0,
)  # fmt: skip

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
POSITIONS = "roberta.embeddings.position_embeddings.weight"  # row 0 is for padding; ours have no such row
TYPES = "roberta.embeddings.token_type_embeddings.weight"  # [1, D], added at every position
BIAS = "final_logits_bias"
ZEROS = TYPES, BIAS, "esm.contact_head.regression.weight", "esm.contact_head.regression.bias"  # ours have none of them
COPIES = "lm_head.decoder.weight", "lm_head.weight", "embed_tokens.weight"  # of the embedding

XLM, ESM, BLENDERBOT, SEQUENTIAL = "xlm-roberta-xl", "esm", "blenderbot", "sequential-seq2seq"
FAMILIES = {  # by the `model_type` of a configuration
    XLM: Family(transformers.XLMRobertaXLForMaskedLM, "encoder", "learned", ENCODER_SETTINGS, XLM_FIXED, XLM_TENSORS),
    ESM: Family(transformers.EsmForMaskedLM, "encoder", "rotary", ENCODER_SETTINGS, ESM_FIXED, ESM_TENSORS),
    BLENDERBOT: Family(
        transformers.BlenderbotForConditionalGeneration, "seq2seq", "learned",
        BLENDERBOT_SETTINGS, BLENDERBOT_FIXED, BLENDERBOT_TENSORS,
    ),
    SEQUENTIAL: Family(
        hf_seq2seq.Seq2SeqLM, "seq2seq", "rotary",
        SEQUENTIAL_SETTINGS, SEQ2SEQ_FIXED | dict(fusion=False), SEQUENTIAL_TENSORS,
    ),
}  # fmt: skip
# Settings that do not affect what a model computes.
NOT_COMPARED = {"transformers_version", "architectures", "dtype", "use_cache", "initializer_range", "init_std"}


def tensor_names(family: str, name: str) -> list[str]:
    """A family's names for our tensor: one, or two where ours holds keys and values and theirs are separate."""
    split = ".kv." in name and family != SEQUENTIAL
    names = [name.replace(".kv.", f".{part}.") for part in "kv"] if split else [name]
    for ours, theirs in FAMILIES[family].tensors.items():
        names = [name.replace(ours, theirs) for name in names]
    return names


def hf_config(cfg: ModelConfig) -> transformers.PretrainedConfig:
    """The transformers configuration of our model."""
    shape = "seq2seq" if cfg.n_decoder_layers else "encoder", cfg.positions
    family = next(family for family in FAMILIES.values() if (family.kind, family.positions) == shape)
    settings = {theirs: getattr(cfg, ours) for theirs, ours in family.settings.items()}
    config = family.model_class.config_class(**settings, **family.fixed)
    if config.model_type == XLM:
        config.max_position_embeddings += 1  # one more, for padding
    return config


# To transformers ----------------------------------------------------------------------------------------------------


def hf_model(model: nn.Module) -> transformers.PreTrainedModel:
    """Our model as a model of transformers, with the same tensors. Only ESM has no dropout on its embeddings."""
    config, ours = hf_config(model.cfg), model.state_dict()
    theirs = FAMILIES[config.model_type].model_class(config)
    initial = theirs.state_dict()
    weights = {name: rates for name, rates in initial.items() if name.endswith(".inv_freq")}  # of ESM's positions
    weights |= {name: torch.zeros_like(initial[name]) for name in ZEROS if name in initial}
    weights |= {name: ours["embed.weight"] for name in initial if name.endswith(COPIES)}
    for name, tensor in ours.items():
        names = tensor_names(config.model_type, name)
        weights |= zip(names, tensor.chunk(len(names)))
    if config.model_type == XLM:
        weights[POSITIONS] = nn.functional.pad(weights[POSITIONS], (0, 0, 1, 0))
        weights["lm_head.decoder.bias"] = weights["lm_head.bias"]
    theirs.load_state_dict(weights, assign=True)
    theirs.tie_weights()
    return theirs


def modelling_file() -> str:
    """The code of a rotary seq2seq model for transformers: model.py and hf_seq2seq.py, as one file.

    What model.py imports from our other files replaces the import.
    """
    code, wrapper = inspect.getsource(model_code), inspect.getsource(hf_seq2seq)
    for line, names in re.findall(r"^(from (?:cli|objectives) import (.+)\n)", code, re.MULTILINE):
        values = {name: getattr(model_code, name) for name in names.split(", ")}
        parts = [inspect.getsource(x) if callable(x) else f"\n{name} = {x!r}\n" for name, x in values.items()]
        code = code.replace(line, "\n\n".join(["", *parts]))
    both = "from dataclasses import dataclass, field, fields"  # model.py needs the first, cli.py the others
    code = re.sub(r"^from dataclasses import .*", both, code, count=1, flags=re.MULTILINE)
    return code + re.sub(r"^from model import .*\n", "", wrapper, flags=re.MULTILINE)


def _tensors_to_save(theirs: nn.Module) -> dict[str, Tensor]:
    """Tensors under names that transformers 4 and 5 both read: 4 keeps the rotary rates in every layer of ESM."""
    weights = theirs.state_dict()
    if (rates := weights.pop("esm.rotary_embeddings.inv_freq", None)) is not None:
        for i in range(theirs.config.num_hidden_layers):
            weights[f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"] = rates.clone()
    return weights


def to_hf(path: Path, folder: Path) -> None:
    """Writes a checkpoint as a folder that transformers loads: weights, config, fast tokenizer, our tokenizer.model.

    For a rotary seq2seq model the folder also has its code, which transformers runs with `trust_remote_code=True`.
    Raises InputError for a model with fusion and for a folder that exists or cannot be written, and leaves no files.
    """
    part = Path(f"{folder}.part")
    for taken in (folder, part):
        if taken.exists():
            raise InputError(f"{taken}: exists; remove it or give another folder")
    model, checkpoint = load_model(path)
    if model.cfg.fusion:
        remedy = f"export its encoder: extract.py {path} --out enc.pt"
        raise InputError(f"{path}: no model of transformers has attention fusion; {remedy}")
    theirs, tokenizer = hf_model(model), hf_tokenizer(checkpoint["tokenizer"], model.cfg.max_len)
    theirs.config.history = checkpoint["history"]
    try:
        part.mkdir(parents=True)
        if theirs.config.model_type == SEQUENTIAL:
            names = {"AutoConfig": "Seq2SeqConfig", "AutoModelForSeq2SeqLM": "Seq2SeqLM"}
            theirs.config.auto_map = {auto: f"modeling_seq2seq.{name}" for auto, name in names.items()}
            (part / "modeling_seq2seq.py").write_text(modelling_file(), "utf-8")
        theirs.save_pretrained(part, state_dict=_tensors_to_save(theirs), save_original_format=False)
        save_tokenizer(tokenizer, part)
        (part / "tokenizer.model").write_bytes(checkpoint["tokenizer"])
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise InputError(f"{folder}: cannot be written ({error}); make room or name another") from None


# From transformers --------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> tuple[str, ModelConfig, list[dict]]:
    """A folder's family, the shape of our model that computes the same, and the history, if any.

    Raises InputError if we have no such model, naming what differs.
    """
    path = folder / "config.json"
    try:
        name = json.loads(path.read_bytes())["model_type"]
        family = FAMILIES.get(name)
        config = family and family.model_class.config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise many kinds
        raise InputError(f"{path}: missing or damaged ({str(error).splitlines()[0]})") from None
    if family is None:
        raise InputError(f"{folder}: of family {name}; only {', '.join(FAMILIES)} have our shape")
    try:
        shape = {ours: getattr(config, theirs) for theirs, ours in family.settings.items()}
        shape["max_len"] -= name == XLM  # one position is for padding
        cfg = ModelConfig(**shape | dict(positions=family.positions))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a shape that our models have: {error}") from None
    for key, value in hf_config(cfg).to_dict().items():
        if key not in NOT_COMPARED and (theirs := getattr(config, key, value)) != value:
            raise InputError(f"{folder}: its {key} is {theirs}, our models have {value}")
    return name, cfg, getattr(config, "history", [])


def _read_tensors(folder: Path, family: str) -> dict[str, Tensor]:
    """The tensors of a folder. Raises InputError unless they are those of its configuration."""
    options = dict(local_files_only=True, use_safetensors=True, output_loading_info=True)
    try:
        model, seen = FAMILIES[family].model_class.from_pretrained(folder, dtype=torch.float32, **options)
    except Exception as error:  # the libraries raise many kinds
        raise InputError(f"{folder}: its weights cannot be read ({str(error).splitlines()[0]})") from None
    if off := sorted(str(x) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for x in seen[key]):
        raise InputError(f"{folder}: {len(off)} tensors are missing or unexpected; the first is {off[0]}")
    tensors = model.state_dict()
    if family == XLM:
        tensors[POSITIONS] = tensors[POSITIONS][1:] + tensors[TYPES]
    if family == BLENDERBOT and tensors[BIAS].any():
        raise InputError(f"{folder}: its {BIAS} is not 0, which our models do not have")
    return tensors


def from_hf(folder: Path) -> dict:
    """Makes a checkpoint from a folder of one of the families; code in the folder is not run.

    Raises InputError for any other folder, naming what differs.
    """
    family, cfg, history = _read_config(folder)
    if not (path := folder / "tokenizer.model").exists():
        raise InputError(f"{path}: no such file; copy the one of the exported folder, or of the data folder, there")
    tokenizer = path.read_bytes()
    vocab_size = load_tokenizer(tokenizer, path).vocab_size()
    if cfg.vocab_size != vocab_size:
        raise InputError(f"{folder}: {cfg.vocab_size} embeddings, but {vocab_size} pieces in its tokenizer.model")
    tensors, kind = _read_tensors(folder, family), FAMILIES[family].kind
    with torch.device("meta"):
        names = MODELS[kind](cfg).state_dict()
    weights = {name: torch.cat([tensors[x] for x in tensor_names(family, name)]) for name in names}
    return as_checkpoint(kind, cfg, weights, tokenizer, history)
