"""The encoder out of a trained seq2seq model (Soltan et al. 2023, Recipe 1), and models to and from transformers.

    python extract.py seq2seq.pt --out enc-extracted.pt
    torchrun train_encoder.py --init enc-extracted.pt --steps 30 --out enc-mlm.pt    # a short MLM continuation

The encoder and the embedding are the seq2seq model's own tensors; the MLM head is new and untrained.

    python extract.py enc.pt --to-hf HF-ENC            # loads as EsmForMaskedLM
    python extract.py seq2seq.pt --to-hf HF-SEQ2SEQ    # loads with trust_remote_code=True: its code is in the folder
    python extract.py --from-hf HF-ENC --out again.pt

Models with learned positions load as XLMRobertaXLForMaskedLM and BlenderbotForConditionalGeneration. All these families
are Pre-LN with no LayerNorm on the embeddings, as ours are; for a rotary seq2seq model transformers has none. The
folders load in transformers 4.57 and 5. These two options need `pip install transformers`.
"""

import argparse
import inspect
import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from checkpoint import as_checkpoint, load_model, save_checkpoint, warm_start
from cli import InputError, flag, run_command
from data import load_tokenizer, read_tokenizer
from model import MaskedLM, ModelConfig, Seq2Seq
from objectives import IGNORE, SpecialIds

OURS = "sequential-seq2seq"
FAMILIES = {  # of transformers, by its name there; its class; whether it is a seq2seq model; its positions
    "xlm-roberta-xl": ("XLMRobertaXLForMaskedLM", False, "learned"),
    "esm": ("EsmForMaskedLM", False, "rotary"),
    "blenderbot": ("BlenderbotForConditionalGeneration", True, "learned"),
    OURS: ("Seq2SeqLM", True, "rotary"),  # hf_seq2seq.py
}
# Our name of a setting to theirs.
ENCODER_SETTINGS = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "n_encoder_layers": "num_hidden_layers",
    "max_len": "max_position_embeddings",
    "dropout": "hidden_dropout_prob",
}
HF_SETTINGS = {
    "xlm-roberta-xl": ENCODER_SETTINGS,
    "esm": ENCODER_SETTINGS,
    "blenderbot": {
        "d_model": "d_model",
        "n_heads": "encoder_attention_heads",
        "d_ff": "encoder_ffn_dim",
        "n_encoder_layers": "encoder_layers",
        "n_decoder_layers": "decoder_layers",
        "max_len": "max_position_embeddings",
        "dropout": "dropout",
    },
    OURS: {field.name: field.name for field in fields(ModelConfig) if field.name != "fusion"},
}
# Our name of a tensor to theirs: one replacement after the other. KV stands for two tensors, ours holds both.
HF_NAMES = {
    "xlm-roberta-xl": {
        "embed.": "roberta.embeddings.word_embeddings.",
        "encoder.positions.": "roberta.embeddings.position_embeddings.",
        "encoder.norm.": "roberta.encoder.LayerNorm.",
        "encoder.blocks.": "roberta.encoder.layer.",
        ".attn_norm.": ".attention.self_attn_layer_norm.",
        ".attn.q.": ".attention.self.query.",
        ".attn.kv.": ".attention.self.KV.",
        ".attn.out.": ".attention.output.dense.",
        ".ffn_norm.": ".LayerNorm.",
        ".ffn.0.": ".intermediate.dense.",
        ".ffn.2.": ".output.dense.",
        "head.0.": "lm_head.dense.",
        "head.2.": "lm_head.layer_norm.",
        "head_bias": "lm_head.bias",
    },
    "blenderbot": {
        "embed.": "model.shared.",
        "encoder.": "model.encoder.",
        "decoder.": "model.decoder.",
        ".blocks.": ".layers.",
        ".positions.": ".embed_positions.",
        ".norm.": ".layer_norm.",
        ".attn_norm.": ".self_attn_layer_norm.",
        ".attn.": ".self_attn.",
        ".cross_norm.": ".encoder_attn_layer_norm.",
        ".cross.": ".encoder_attn.",
        ".q.": ".q_proj.",
        ".kv.": ".KV_proj.",
        ".out.": ".out_proj.",
        ".ffn_norm.": ".final_layer_norm.",
        ".ffn.0.": ".fc1.",
        ".ffn.2.": ".fc2.",
    },
    OURS: {"embed.": "model.embed.", "encoder.": "model.encoder.", "decoder.": "model.decoder."},
}
HF_NAMES["esm"] = HF_NAMES["xlm-roberta-xl"] | {
    "embed.": "esm.embeddings.word_embeddings.",
    "encoder.norm.": "esm.encoder.emb_layer_norm_after.",
    "encoder.blocks.": "esm.encoder.layer.",
    ".attn_norm.": ".attention.LayerNorm.",
}
KV = {"xlm-roberta-xl": ("key", "value"), "esm": ("key", "value"), "blenderbot": ("k", "v")}
TIED = ("lm_head.decoder.weight", "lm_head.weight", "embed_tokens.weight")  # copies of the embedding
POSITIONS = "roberta.embeddings.position_embeddings.weight"  # row 0 of theirs is that of padding
# Settings of theirs that say nothing about what a model computes.
ASIDE = {"transformers_version", "architectures", "dtype", "use_cache", "initializer_range", "init_std"}


def extract(seq2seq: Seq2Seq, source: Path) -> MaskedLM:
    """An MLM model whose encoder output equals the seq2seq model's bit for bit; source names it in what is printed."""
    torch.manual_seed(0)  # of the new head
    encoder = MaskedLM(replace(seq2seq.cfg, n_decoder_layers=0, fusion=False))
    warm_start(encoder, source, seq2seq.state_dict())
    return encoder


# transformers ------------------------------------------------------------------------------------------------------


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise InputError("--to-hf and --from-hf need transformers: pip install transformers") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _family(cfg: ModelConfig) -> str:
    """The family whose models compute what ours of this shape do."""
    shape = cfg.n_decoder_layers > 0, cfg.positions
    return next(name for name, (_, *its) in FAMILIES.items() if tuple(its) == shape)


def _hf_class(family: str) -> type:
    hf = _transformers()
    if family == OURS:
        import hf_seq2seq as hf
    return getattr(hf, FAMILIES[family][0])


def _hf_names(family: str, name: str) -> list[str]:
    for ours, theirs in HF_NAMES[family].items():
        name = name.replace(ours, theirs)
    return [name.replace("KV", part) for part in KV[family]] if "KV" in name else [name]


def hf_config(cfg: ModelConfig, ids: SpecialIds) -> object:
    """Their configuration (a PretrainedConfig) of our model."""
    family = _family(cfg)
    settings = {theirs: getattr(cfg, ours) for ours, theirs in HF_SETTINGS[family].items()}
    settings |= dict(vocab_size=cfg.vocab_size, tie_word_embeddings=True)
    settings |= dict(pad_token_id=ids.pad, bos_token_id=ids.bos, eos_token_id=ids.eos)
    if cfg.n_decoder_layers:
        settings |= dict(is_encoder_decoder=True, decoder_start_token_id=ids.bos)
    else:
        settings |= dict(attention_probs_dropout_prob=0.0, layer_norm_eps=1e-5)
    if family == "xlm-roberta-xl":
        settings |= dict(max_position_embeddings=cfg.max_len + 1, hidden_act="gelu", type_vocab_size=1)
    if family == "esm":
        settings |= dict(position_embedding_type="rotary", emb_layer_norm_before=False)
        settings |= dict(token_dropout=False, mask_token_id=ids.mask)
    if family == "blenderbot":
        settings |= dict(decoder_attention_heads=cfg.n_heads, decoder_ffn_dim=cfg.d_ff, activation_function="gelu")
        settings |= dict(attention_dropout=0.0, activation_dropout=0.0, scale_embedding=False)
        settings |= dict(forced_eos_token_id=None, encoder_no_repeat_ngram_size=0)
    if family == OURS:
        settings |= dict(fusion=False)
    return _hf_class(family).config_class(**settings)


def hf_tokenizer(model: bytes, max_len: int) -> object:
    """A PreTrainedTokenizerFast with our ids and a closing </s>, for a line of text that does not begin with a space.

    As everywhere in transformers, text that spells a special token becomes that token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    ours = load_tokenizer(model, "tokenizer")
    ids, pieces = SpecialIds(ours.vocab_size()), [ours.id_to_piece(i) for i in range(ours.vocab_size())]
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
    mask = AddedToken("<mask>", lstrip=True, special=True)  # it stands for a word with the space before it
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=pieces[ids.pad],
        bos_token=pieces[ids.bos],
        eos_token=pieces[ids.eos],
        unk_token=pieces[ids.unk],
        mask_token=mask,
        additional_special_tokens=pieces[ids.clm : ids.ordinary],
        model_max_length=max_len,
        model_input_names=["input_ids", "attention_mask"],
    )


def hf_model(model: nn.Module) -> nn.Module:
    """The same model, of the same tensors, as transformers has it. ESM alone has no dropout on its embeddings."""
    cfg, family = model.cfg, _family(model.cfg)
    theirs = _hf_class(family)(hf_config(cfg, SpecialIds(cfg.vocab_size)))
    weights: dict[str, Tensor] = {}
    for name, x in model.state_dict().items():
        names = _hf_names(family, name)
        weights |= zip(names, x.chunk(len(names)))
    if family == "xlm-roberta-xl":
        weights[POSITIONS] = nn.functional.pad(weights[POSITIONS], (0, 0, 1, 0))
        weights["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, cfg.d_model)
        weights["lm_head.decoder.bias"] = weights["lm_head.bias"]
    if family == "esm":
        weights["esm.contact_head.regression.weight"] = torch.zeros(1, cfg.n_encoder_layers * cfg.n_heads)
        weights["esm.contact_head.regression.bias"] = torch.zeros(1)
        weights |= {name: x for name, x in theirs.state_dict().items() if name.endswith(".inv_freq")}
    if family == "blenderbot":
        weights["final_logits_bias"] = torch.zeros(1, cfg.vocab_size)
    embed = weights[_hf_names(family, "embed.weight")[0]]
    weights |= {name: embed for name in theirs.state_dict() if name.endswith(TIED)}
    theirs.load_state_dict(weights, assign=True)
    theirs.tie_weights()
    return theirs


def _modelling_file() -> str:
    """The code of a rotary seq2seq model for transformers: model.py, then hf_seq2seq.py, with no other file of ours."""
    model, wrapper = (Path(__file__).with_name(name).read_text("utf-8") for name in ("model.py", "hf_seq2seq.py"))
    imported = f"from dataclasses import field\n\nIGNORE = {IGNORE}\n\n\n{inspect.getsource(flag)}"
    model = model.replace("from cli import flag\nfrom objectives import IGNORE\n", imported)
    return model + re.sub(r"^from model import .*\n", "", wrapper, flags=re.MULTILINE)


def _older_names(theirs: nn.Module) -> dict[str, Tensor]:
    """Tensors by names that transformers 4 and 5 read: 4 has the rates of rotary positions in every layer of ESM."""
    weights = theirs.state_dict()
    if (rates := weights.pop("esm.rotary_embeddings.inv_freq", None)) is not None:
        for i in range(theirs.config.num_hidden_layers):
            weights[f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"] = rates.clone()
    return weights


def to_hf(model: nn.Module, checkpoint: dict, folder: Path) -> None:
    """Writes a folder that transformers loads unchanged: weights, config, fast tokenizer, and our tokenizer.model.

    A rotary seq2seq model has its code there, which transformers runs with `trust_remote_code=True`.
    Raises InputError when it cannot be written, and leaves nothing behind.
    """
    theirs = hf_model(model)
    from safetensors import SafetensorError

    theirs.config.history = checkpoint["history"]
    try:
        if theirs.config.model_type == OURS:
            names = {"AutoConfig": "Seq2SeqConfig", "AutoModelForSeq2SeqLM": "Seq2SeqLM"}
            theirs.config.auto_map = {auto: f"modeling_seq2seq.{name}" for auto, name in names.items()}
            folder.mkdir(parents=True)
            (folder / "modeling_seq2seq.py").write_text(_modelling_file(), "utf-8")
        theirs.save_pretrained(folder, state_dict=_older_names(theirs), save_original_format=False)
        hf_tokenizer(checkpoint["tokenizer"], model.cfg.max_len).save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_bytes())
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2), "utf-8")
        (folder / "tokenizer.model").write_bytes(checkpoint["tokenizer"])
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(f"{folder}: cannot be written ({error}); make room or name another") from None


def from_hf(folder: Path) -> dict:
    """The checkpoint of a folder of one of the families; code that lies in it is not run.

    Raises InputError for any other folder, naming what differs.
    """
    _transformers()
    try:
        family = json.loads((folder / "config.json").read_bytes())["model_type"]
        load = _hf_class(family) if family in FAMILIES else None
        config = load and load.config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of several libraries' own kinds
        raise InputError(f"{folder / 'config.json'}: missing or damaged ({str(error).splitlines()[0]})") from None
    if load is None:
        raise InputError(f"{folder}: of family {family}; only {', '.join(FAMILIES)} have our shape")
    tokenizer = read_tokenizer(folder / "tokenizer.model")
    vocab_size = load_tokenizer(tokenizer, folder / "tokenizer.model").vocab_size()
    if config.vocab_size != vocab_size:
        raise InputError(f"{folder}: {config.vocab_size} embeddings, but {vocab_size} pieces in its tokenizer.model")
    _, is_seq2seq, positions = FAMILIES[family]
    try:
        shape = {ours: getattr(config, theirs) for ours, theirs in HF_SETTINGS[family].items()}
        shape |= dict(vocab_size=vocab_size, positions=positions)
        shape["max_len"] -= family == "xlm-roberta-xl"  # it has one position more, that of padding
        cfg = ModelConfig(**shape)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'}: not a shape that our models have: {error}") from None
    for name, value in hf_config(cfg, SpecialIds(vocab_size)).to_dict().items():
        if name not in ASIDE and (its := getattr(config, name, value)) != value:
            raise InputError(f"{folder}: its {name} is {its}, our models have {value}")
    try:
        options = dict(local_files_only=True, use_safetensors=True, output_loading_info=True)  # no pickles
        model, seen = load.from_pretrained(folder, dtype=torch.float32, **options)
    except Exception as error:  # of several libraries' own kinds
        raise InputError(f"{folder}: its weights cannot be read ({str(error).splitlines()[0]})") from None
    if off := sorted(str(x) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for x in seen[key]):
        raise InputError(f"{folder}: {len(off)} tensors are missing or too many, {off[0]} is the first")
    theirs = model.state_dict()
    if family == "xlm-roberta-xl":
        types = theirs["roberta.embeddings.token_type_embeddings.weight"]  # [1, D], added at every position
        theirs[POSITIONS] = theirs[POSITIONS][1:] + types
    if family == "blenderbot" and theirs["final_logits_bias"].any():
        raise InputError(f"{folder}: its final_logits_bias is not 0, which our models do not have")
    with torch.device("meta"):
        names = (Seq2Seq if is_seq2seq else MaskedLM)(cfg).state_dict()
    weights = {name: torch.cat([theirs[x] for x in _hf_names(family, name)]) for name in names}
    kind = "seq2seq" if is_seq2seq else "encoder"
    return as_checkpoint(kind, cfg, weights, tokenizer, getattr(config, "history", []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="seq2seq.pt; with --to-hf of either kind")
    parser.add_argument("--to-hf", type=Path, metavar="DIR", help="write the whole model for transformers")
    parser.add_argument("--from-hf", type=Path, metavar="DIR", help="read a model that transformers wrote")
    parser.add_argument(
        "--out", type=Path, default=Path("enc-extracted.pt"), help="checkpoint to write (default %(default)s)"
    )
    args = parser.parse_args()
    if (args.checkpoint is None) != (args.from_hf is not None):
        raise InputError("name a checkpoint, or a folder with --from-hf; not both")
    if args.from_hf and args.to_hf:
        raise InputError("--from-hf and --to-hf: one at a time")
    if args.to_hf is None and args.out.exists():
        raise InputError(f"{args.out}: exists; give another --out")
    if args.to_hf is None and not args.out.parent.is_dir():
        raise InputError(f"{args.out.parent}: no such folder to write {args.out.name} to; create it")
    if args.from_hf:
        save_checkpoint(args.out, from_hf(args.from_hf))
        return
    part = args.to_hf and Path(f"{args.to_hf}.part")
    for folder in (args.to_hf, part):
        if folder and folder.exists():
            raise InputError(f"{folder}: exists; remove it or give another folder")
    model, checkpoint = load_model(args.checkpoint, *([] if args.to_hf else ["seq2seq"]))
    if args.to_hf:
        if model.cfg.fusion:
            remedy = f"export its encoder: extract.py {args.checkpoint} --out enc.pt"
            raise InputError(f"{args.checkpoint}: no model of transformers has attention fusion; {remedy}")
        to_hf(model, checkpoint, part)
        part.rename(args.to_hf)
        return
    encoder = extract(model, args.checkpoint)
    stage = {"stage": "extract", "steps": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "settings": {}}
    history = checkpoint["history"] + [stage]
    save_checkpoint(
        args.out, as_checkpoint("encoder", encoder.cfg, encoder.state_dict(), checkpoint["tokenizer"], history)
    )


if __name__ == "__main__":
    run_command(main)
