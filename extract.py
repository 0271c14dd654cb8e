"""The encoder out of a trained seq2seq model (Soltan et al. 2023, Recipe 1), and models to and from transformers.

    python extract.py seq2seq.pt --out enc-extracted.pt
    torchrun train_encoder.py --init enc-extracted.pt --steps 30 --out enc-mlm.pt    # a short MLM continuation

The encoder and the embedding are the seq2seq model's own tensors; the MLM head is new and untrained.

    python extract.py enc.pt --to-hf HF-ENC            # loads as XLMRobertaXLForMaskedLM
    python extract.py seq2seq.pt --to-hf HF-SEQ2SEQ    # loads as BlenderbotForConditionalGeneration
    python extract.py --from-hf HF-ENC --out again.pt

Both families are Pre-LN with learned positions and no LayerNorm on the embeddings, as ours are. These two options need
`pip install transformers`.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from checkpoint import as_checkpoint, check_content, load_model, save_checkpoint, warm_start
from data import load_tokenizer, read_tokenizer, run_command
from model import MaskedLM, ModelConfig, Seq2Seq
from objectives import InputError, SpecialIds

# Our name of a tensor to theirs: one replacement after the other. KV stands for two tensors, ours holds both.
HF_NAMES = {
    "encoder": {
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
    "seq2seq": {
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
}
KV = {"encoder": ("key", "value"), "seq2seq": ("k", "v")}
POSITIONS = "roberta.embeddings.position_embeddings.weight"  # row 0 of theirs is that of padding


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


def _hf_names(kind: str, name: str) -> list[str]:
    for ours, theirs in HF_NAMES[kind].items():
        name = name.replace(ours, theirs)
    return [name.replace("KV", part) for part in KV[kind]] if "KV" in name else [name]


def hf_config(cfg: ModelConfig, ids: SpecialIds) -> object:
    """Their configuration (a PretrainedConfig) of our model."""
    common = dict(pad_token_id=ids.pad, bos_token_id=ids.bos, eos_token_id=ids.eos, tie_word_embeddings=True)
    if cfg.n_decoder_layers == 0:
        return _transformers().XLMRobertaXLConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.d_model,
            num_hidden_layers=cfg.n_encoder_layers,
            num_attention_heads=cfg.n_heads,
            intermediate_size=cfg.d_ff,
            max_position_embeddings=cfg.max_len + 1,
            hidden_dropout_prob=cfg.dropout,
            attention_probs_dropout_prob=0.0,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
            type_vocab_size=1,
            **common,
        )
    return _transformers().BlenderbotConfig(
        vocab_size=cfg.vocab_size,
        d_model=cfg.d_model,
        encoder_layers=cfg.n_encoder_layers,
        decoder_layers=cfg.n_decoder_layers,
        encoder_attention_heads=cfg.n_heads,
        decoder_attention_heads=cfg.n_heads,
        encoder_ffn_dim=cfg.d_ff,
        decoder_ffn_dim=cfg.d_ff,
        max_position_embeddings=cfg.max_len,
        dropout=cfg.dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        activation_function="gelu",
        scale_embedding=False,
        decoder_start_token_id=ids.bos,
        forced_eos_token_id=None,
        encoder_no_repeat_ngram_size=0,
        **common,
    )


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
    """The same model, of the same tensors, as transformers has it."""
    hf, kind, cfg = _transformers(), "seq2seq" if hasattr(model, "decoder") else "encoder", model.cfg
    make = hf.XLMRobertaXLForMaskedLM if kind == "encoder" else hf.BlenderbotForConditionalGeneration
    theirs = make(hf_config(cfg, SpecialIds(cfg.vocab_size)))
    weights: dict[str, Tensor] = {}
    for name, x in model.state_dict().items():
        names = _hf_names(kind, name)
        weights |= zip(names, x.chunk(len(names)))
    if kind == "encoder":
        weights[POSITIONS] = nn.functional.pad(weights[POSITIONS], (0, 0, 1, 0))
        weights["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, cfg.d_model)
        weights["lm_head.decoder.weight"] = weights["roberta.embeddings.word_embeddings.weight"]
        weights["lm_head.decoder.bias"] = weights["lm_head.bias"]
    else:
        weights["final_logits_bias"] = torch.zeros(1, cfg.vocab_size)
        for name in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
            weights[f"{name}.weight"] = weights["model.shared.weight"]
    theirs.load_state_dict(weights, assign=True)
    theirs.tie_weights()
    return theirs


def to_hf(model: nn.Module, checkpoint: dict, folder: Path) -> None:
    """Writes a folder that transformers loads unchanged: weights, config, fast tokenizer, and our tokenizer.model.

    Raises InputError when it cannot be written, and leaves nothing behind.
    """
    theirs = hf_model(model)
    from safetensors import SafetensorError

    theirs.config.history = checkpoint["history"]
    try:
        theirs.save_pretrained(folder)
        hf_tokenizer(checkpoint["tokenizer"], model.cfg.max_len).save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes(checkpoint["tokenizer"])
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(f"{folder}: cannot be written ({error}); make room or name another") from None


def from_hf(folder: Path) -> dict:
    """The checkpoint of a folder of one of the two families. Raises InputError for any other, naming what differs."""
    hf = _transformers()
    try:
        config = hf.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of several libraries' own kinds
        raise InputError(f"{folder / 'config.json'}: missing or damaged ({str(error).splitlines()[0]})") from None
    tokenizer = read_tokenizer(folder / "tokenizer.model")
    if config.model_type == "xlm-roberta-xl":
        kind, load = "encoder", hf.XLMRobertaXLForMaskedLM
        shape = dict(d_model=config.hidden_size, n_heads=config.num_attention_heads, d_ff=config.intermediate_size)
        shape |= dict(n_encoder_layers=config.num_hidden_layers, max_len=config.max_position_embeddings - 1)
        shape |= dict(dropout=config.hidden_dropout_prob)
    elif config.model_type == "blenderbot":
        kind, load = "seq2seq", hf.BlenderbotForConditionalGeneration
        shape = dict(d_model=config.d_model, n_heads=config.encoder_attention_heads, d_ff=config.encoder_ffn_dim)
        shape |= dict(n_encoder_layers=config.encoder_layers, n_decoder_layers=config.decoder_layers)
        shape |= dict(max_len=config.max_position_embeddings, dropout=config.dropout)
    else:
        raise InputError(f"{folder}: of family {config.model_type}; only xlm-roberta-xl and blenderbot have our shape")
    vocab_size = load_tokenizer(tokenizer, folder / "tokenizer.model").vocab_size()
    if config.vocab_size != vocab_size:
        raise InputError(f"{folder}: {config.vocab_size} embeddings, but {vocab_size} pieces in its tokenizer.model")
    try:
        cfg = ModelConfig(vocab_size, **shape)
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'}: not a shape that our models have: {error}") from None
    for name, value in hf_config(cfg, SpecialIds(vocab_size)).to_diff_dict().items():
        if name not in ("transformers_version", "architectures", "dtype") and getattr(config, name, None) != value:
            raise InputError(f"{folder}: its {name} is {getattr(config, name, None)}, our models have {value}")
    try:
        options = dict(local_files_only=True, use_safetensors=True, output_loading_info=True)  # no pickles
        model, seen = load.from_pretrained(folder, dtype=torch.float32, **options)
    except Exception as error:  # of several libraries' own kinds
        raise InputError(f"{folder}: its weights cannot be read ({str(error).splitlines()[0]})") from None
    if off := sorted(str(x) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for x in seen[key]):
        raise InputError(f"{folder}: {len(off)} tensors are missing or too many, {off[0]} is the first")
    theirs = model.state_dict()
    if kind == "encoder":
        types = theirs["roberta.embeddings.token_type_embeddings.weight"]  # [1, D], added at every position
        theirs[POSITIONS] = theirs[POSITIONS][1:] + types
    elif theirs["final_logits_bias"].any():
        raise InputError(f"{folder}: its final_logits_bias is not 0, which our models do not have")
    with torch.device("meta"):
        names = (MaskedLM if kind == "encoder" else Seq2Seq)(cfg).state_dict()
    weights = {name: torch.cat([theirs[x] for x in _hf_names(kind, name)]) for name in names}
    content = as_checkpoint(kind, cfg, weights, tokenizer, getattr(config, "history", []))
    check_content(folder, content)
    return content


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
