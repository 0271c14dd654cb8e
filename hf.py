"""Models to and from transformers 4.57 and 5, for `extract.py --to-hf` and `--from-hf`.

An encoder loads as EsmForMaskedLM, or as XLMRobertaXLForMaskedLM if its positions are learned; a seq2seq model with
learned positions loads as BlenderbotForConditionalGeneration. All are Pre-LN with no LayerNorm on the embeddings, as
ours are. transformers has no such seq2seq model with rotary positions, so its folder carries its code (hf_seq2seq.py).
"""

import inspect
import json
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

import model as model_code
from checkpoint import MODELS, as_checkpoint, load_model
from cli import InputError
from model import ModelConfig
from tokenizer import load_tokenizer, read_tokenizer

try:
    import transformers
    from safetensors import SafetensorError
except ImportError:
    raise InputError("--to-hf and --from-hf need transformers: pip install transformers") from None
import hf_names
import hf_seq2seq
from hf_names import FAMILIES
from hf_tokenizer import hf_tokenizer, save_tokenizer

transformers.utils.logging.disable_progress_bar()


def hf_config(cfg: ModelConfig) -> transformers.PretrainedConfig:
    """The transformers configuration of our model."""
    family = FAMILIES[hf_names.family_of(cfg)]
    settings = {theirs: getattr(cfg, ours) for theirs, ours in family.settings.items()}
    if hf_names.family_of(cfg) == hf_names.XLM:
        settings["max_position_embeddings"] += 1  # one more, for padding
    return family.model_class.config_class(**settings, **family.fixed)


def hf_model(model: nn.Module) -> transformers.PreTrainedModel:
    """Our model as a model of transformers, with the same tensors. Only ESM has no dropout on its embeddings."""
    family, ours = hf_names.family_of(model.cfg), model.state_dict()
    theirs = FAMILIES[family].model_class(hf_config(model.cfg))
    initial = theirs.state_dict()
    weights = {x: torch.zeros_like(initial[x]) for x in hf_names.ZEROS if x in initial}
    weights |= {x: ours["embed.weight"] for x in initial if x.endswith(hf_names.COPIES)}
    weights |= {x: rates for x, rates in initial.items() if x.endswith(".inv_freq")}  # constants of ESM's positions
    for name, tensor in ours.items():
        names = hf_names.tensor_names(family, name)
        weights |= zip(names, tensor.chunk(len(names)))
    if family == hf_names.XLM:
        weights[hf_names.POSITIONS] = nn.functional.pad(weights[hf_names.POSITIONS], (0, 0, 1, 0))
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
        if theirs.config.model_type == hf_names.SEQUENTIAL:
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
        shape["max_len"] -= name == hf_names.XLM  # one position is for padding
        cfg = ModelConfig(**shape | dict(positions=family.positions))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a shape that our models have: {error}") from None
    for key, value in hf_config(cfg).to_dict().items():
        if key not in hf_names.NOT_COMPARED and (theirs := getattr(config, key, value)) != value:
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
    if family == hf_names.XLM:
        tensors[hf_names.POSITIONS] = tensors[hf_names.POSITIONS][1:] + tensors[hf_names.TYPES]
    if family == hf_names.BLENDERBOT and tensors[hf_names.BIAS].any():
        raise InputError(f"{folder}: its {hf_names.BIAS} is not 0, which our models do not have")
    return tensors


def from_hf(folder: Path) -> dict:
    """Makes a checkpoint from a folder of one of the families; code in the folder is not run.

    Raises InputError for any other folder, naming what differs.
    """
    family, cfg, history = _read_config(folder)
    path = folder / "tokenizer.model"
    tokenizer = read_tokenizer(path)
    vocab_size = load_tokenizer(tokenizer, path).vocab_size()
    if cfg.vocab_size != vocab_size:
        raise InputError(f"{folder}: {cfg.vocab_size} embeddings, but {vocab_size} pieces in its tokenizer.model")
    tensors, kind = _read_tensors(folder, family), FAMILIES[family].kind
    with torch.device("meta"):
        names = MODELS[kind](cfg).state_dict()
    weights = {name: torch.cat([tensors[x] for x in hf_names.tensor_names(family, name)]) for name in names}
    return as_checkpoint(kind, cfg, weights, tokenizer, history)
