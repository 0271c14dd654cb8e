"""Evaluation of a checkpoint of either kind.

python eval.py enc.pt                                            # held-out loss per language, and a sample
python eval.py seq2seq.pt --task loss --data DATA --out results.jsonl
python eval.py enc.pt --task fill "The river is <mask> in winter."
python eval.py seq2seq.pt --task generate "The river frozen in winter." --beams 4
python eval.py fused.pt --task fusion                            # what --fusion made of each encoder layer
python eval.py enc.pt seq2seq.pt --task cost                     # what they cost, and saved
python eval.py enc.pt --task slots                               # fine-tuned and scored (tasks.py); also nli pos ner
python eval.py seq2seq.pt --task parse --data DIR --seeds 3 --out results.jsonl    # also summ
python eval.py results.jsonl --report OUT                        # the tables of the paper, and figures; of many files
"""

import argparse
import json
import math
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

import task_data
import tasks
import trainer
from checkpoint import load_checkpoint, load_model
from cli import InputError, build, rank, run_command
from compute import batch_flops, paper_saving, saved
from data import HERE, TokenData, load_tokenizer
from generate import generate
from model import ModelConfig
from objectives import VALID_NOISE, SpecialIds, sample_rng
from report import report
from train_encoder import MLMConfig, encoder_objective
from train_seq2seq import DenoiseConfig, seq2seq_objective

OBJECTIVES = {"encoder": (MLMConfig, encoder_objective), "seq2seq": (DenoiseConfig, seq2seq_objective)}
FINE_TUNING = ("train_lang", "n_train", "seeds", "lr", "epochs", "batch_size", "freeze_encoder")
TAKES = {  # task -> the flags that do something in it; None: losses and samples
    None: ("data", "langs", "out", "beams"),
    "loss": ("data", "langs", "out"),
    "fusion": ("data", "langs"),
    "generate": ("beams",),
    "fill": (),
    "cost": (),
}
MARK = "\ufdd0"  # stands for <mask> while a sentence is encoded: no text may hold this code point


def encode_sentence(tokenizer: SentencePieceProcessor, ids: SpecialIds, text: str) -> Tensor:
    """Tokens [1, S] of a sentence and its closing </s>; each "<mask>" in it, with a space before it, is one token.

    Raises InputError for bytes of the command line that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{text!r}: not UTF-8; convert the sentence") from None
    mark = tokenizer.encode(MARK)[1:]  # bytes, behind the space that every encoding begins with
    space, tokens = tokenizer.piece_to_id("▁"), []
    for token in tokenizer.encode(text.replace("<mask>", MARK)):
        tokens.append(token)
        if tokens[-len(mark) :] == mark:
            del tokens[-len(mark) :]
            if tokens[-1:] == [space]:
                tokens.pop()
            tokens.append(ids.mask)
    return torch.tensor([tokens + [ids.eos]])


def show(tokenizer: SentencePieceProcessor, ids: SpecialIds, tokens: list[int]) -> str:
    """Text of tokens for a person to read: <mask> and sentinels by name, document ends as a bar, padding left out."""
    text, run = [], []
    for token in [*tokens, None]:
        if token is not None and token >= ids.ordinary:
            run.append(token)
            continue
        if run:
            text.append(tokenizer.decode(run))
            run = []
        if token not in (None, ids.pad, ids.bos):
            text.append("|" if token == ids.eos else tokenizer.id_to_piece(token))
    return " ".join(text)


def fill(
    model: nn.Module, tokenizer: SentencePieceProcessor, ids: SpecialIds, text: str, top: int = 5
) -> list[list[tuple[str, float]]]:
    """For each <mask> of a sentence the likeliest pieces and their probabilities. Raises InputError without one."""
    src = encode_sentence(tokenizer, ids, text).to(trainer.device())
    _check_length(src, model)
    at = (src[0] == ids.mask).nonzero().squeeze(1)
    if not len(at):
        raise InputError(f"{text!r}: no <mask> in the sentence to fill")
    with torch.no_grad():
        probabilities, pieces = model.logits(src)[0, at].softmax(-1).topk(top)
    return [
        [(tokenizer.id_to_piece(i).replace("▁", " "), p) for i, p in zip(row.tolist(), ps.tolist())]
        for row, ps in zip(pieces, probabilities)
    ]


def rebuild(model: nn.Module, ids: SpecialIds, src: Tensor, beams: int) -> list[int]:  # [1, S] -> [T]
    """What a seq2seq model makes of a source, by greedy or beam search."""
    _check_length(src, model)
    src = src.to(trainer.device())
    new = 2 * src.shape[1] + 10  # a rebuilt row is a fifth longer than its source: twice is room enough
    return generate(model, src, bos=ids.bos, eos=ids.eos, pad=ids.pad, max_new=new, beams=beams)[0].tolist()


def _check_length(src: Tensor, model: nn.Module) -> None:
    if src.shape[1] > model.cfg.max_len:
        raise InputError(f"the sentence has {src.shape[1]} tokens, the model {model.cfg.max_len} positions; shorten it")


def print_sample(
    kind: str, model: nn.Module, data: TokenData, languages: list[str], objective: trainer.Objective, beams: int
) -> None:
    """The start of one held-out row in each language: damaged, as the model repairs it, and as it was."""
    for language in languages:
        row = data.valid_row(language, 0)[:64]
        example = objective(row, sample_rng(0, VALID_NOISE, 0))
        src = torch.from_numpy(example["src"])[None].to(trainer.device())
        if kind == "encoder":
            with torch.no_grad():
                best = model.logits(src)[0].argmax(-1)
            asked = torch.from_numpy(example["labels"] != trainer.IGNORE)
            repaired = torch.where(asked, best.cpu(), src[0].cpu()).tolist()
        else:
            repaired = rebuild(model, data.ids, src, beams)[: len(row)]  # a row has no end to stop at
        print()
        for title, tokens in (("given", src[0].tolist()), ("model", repaired), ("text", row.tolist())):
            print(f"{language} {title:5}  {show(data.tokenizer, data.ids, tokens)}")


def print_losses(
    args: argparse.Namespace,
    checkpoint: dict,
    model: nn.Module,
    data: TokenData,
    languages: list[str],
    objective: trainer.Objective,
    dtype: str,
) -> None:
    """The held-out loss of each language; every number goes to --out."""
    append(args.out, [])  # better now than after all of it
    losses = trainer.held_out_loss(model, data, languages, objective, dtype)
    entropies = {language: data.unigram_entropy(language) for language in losses}
    print("language   rows   loss  perplexity  unigram entropy")
    for language, loss in losses.items():
        rows, entropy = data.n_valid_rows(language), entropies[language]
        perplexity = math.exp(loss) if loss < 700 else math.inf  # of a diverged model no double holds it
        print(f"{language:8} {rows:6} {loss:6.3f} {perplexity:11.1f} {entropy:16.3f}")
        about = {"checkpoint": str(args.checkpoint), "kind": checkpoint["kind"], "history": checkpoint["history"]}
        numbers = {"loss": loss, "unigram_entropy": entropy}
        append(args.out, [about | {"task": "loss", "language": language} | numbers])
    mean = sum(losses.values()) / len(losses)
    print(f"mean            {mean:6.3f} {'':11} {sum(entropies.values()) / len(losses):16.3f}")


@torch.no_grad()
def print_fusion(model: nn.Module, data: TokenData, languages: list[str], objective: trainer.Objective) -> None:
    """Mean share of each encoder layer in what the decoder sees, over the source tokens of held-out rows."""
    print("language  " + " ".join(f"layer {k + 1:2}" for k in range(model.cfg.n_encoder_layers)))
    for language in languages:
        batch = trainer.collate(trainer.valid_examples(data, language, objective, at_most=64), data.ids.pad)
        src, mask = batch["src"], batch.get("src_mask")
        weights = model.encoder(model.embed(src), mask, model.fusion.weights)  # [layers, B, S]
        real = torch.ones_like(src, dtype=torch.bool) if mask is None else mask  # [B, S]
        print(f"{language:8}  " + " ".join(f"{p:8.3f}" for p in weights[:, real].mean(1).tolist()))


# Cost --------------------------------------------------------------------------------------------------------------


def scratch_flops(kind: str, config: dict, settings: dict, ids: SpecialIds) -> float:
    """FLOPs of one update of a model of a kind trained from scratch with the given shape and settings."""
    cfg = ModelConfig(**config) if kind == "seq2seq" else ModelConfig(**config | {"n_decoder_layers": 0})
    make_config, make = OBJECTIVES[kind]
    objective = make(ids, build(make_config, settings))
    row = torch.full((settings["seq_len"],), ids.ordinary).numpy()
    n = min(settings["batch_size"], 64)  # a sample: only drop and MLM make every row of the same length
    examples = [objective(row, sample_rng(0, VALID_NOISE, i)) for i in range(n)]
    return batch_flops(cfg, trainer.collate(examples, ids.pad)) * settings["batch_size"] / n


def print_cost(paths: list[Path]) -> None:
    """What every stage behind each checkpoint cost, and what the pair of models in it saved."""
    for path in paths:
        checkpoint = load_checkpoint(path)
        history, stages = checkpoint["history"], {}
        print(f"{path}\n  stage        updates          tokens      FLOPs    hours")
        total = {"stage": "in all"} | {x: sum(s[x] for s in history) for x in ("steps", "tokens", "flops", "seconds")}
        for stage in [*history, total]:
            cost = f"{stage['tokens']:15,} {stage['flops']:10.3g} {stage['seconds'] / 3600:8.2f}"
            print(f"  {stage['stage']:10} {stage['steps']:9,} {cost}")
            stages.setdefault(stage["stage"], stage)
        if not {"encoder", "seq2seq"} <= stages.keys():
            print("  one model so far: nothing to save\n")
            continue
        ids = SpecialIds(checkpoint["config"]["vocab_size"])
        steps = sum(x["steps"] for x in takewhile(lambda x: x["stage"] == history[0]["stage"], history))
        config = ModelConfig.__dataclass_fields__.keys() & stages["seq2seq"]["settings"].keys()
        config = {name: stages["seq2seq"]["settings"][name] for name in config}
        try:
            per_update = {x: scratch_flops(x, config, stages[x]["settings"], ids) for x in ("encoder", "seq2seq")}
        except (KeyError, TypeError) as missing:
            raise InputError(f"{path}: its history lacks {missing}; only our training scripts' can be priced") from None
        both = steps * sum(per_update.values())
        share = saved(history, both) or 0.0
        print(f"  both from scratch at {steps:,} updates each: {both:.3g} FLOPs; saved {share:.1%}\n")
    print_paper_saving()


def print_paper_saving() -> None:
    """The saving at the paper's scale for several points of unfreezing, by our count and by the simple one."""
    print("At the paper's shape (rows of 512; 500k updates from scratch each; 350k in the second stage):")
    print("  --unfreeze-at   saved   saved by the count 'stack forward 1, backward 2'")
    for at in (0, 0.43, 0.5, 0.57, 1):
        ours, simple = paper_saving(at)
        print(f"  {at:13}  {ours:6.1%}  {simple:6.1%}")


def settings_of(checkpoint: dict) -> dict:
    """The settings that a checkpoint was trained with, a later stage's before an earlier one's."""
    # a model from elsewhere has no history, an extracted encoder a last stage without settings
    settings = {"data": trainer.SAMPLE, "dtype": "fp32", "seq_len": checkpoint["config"]["max_len"]}
    for stage in checkpoint["history"]:
        settings |= stage["settings"]
    return settings


def run_task(args: argparse.Namespace) -> None:
    """Fine-tunes on one language, scores all, prints the table; every number goes to --out as soon as it is known."""
    folder = args.data or (HERE / "sample" / "slots" if args.task == "slots" else None)
    if folder is None:
        raise InputError(f"--task {args.task} needs --data DIR, which holds <lang>/train.*, dev.*, test.*")
    body, checkpoint = load_model(args.checkpoint, *(["seq2seq"] if args.task in tasks.GENERATION else []))
    train, dev, test = task_data.read_task(args.task, folder, args.train_lang, args.langs)
    if args.n_train:
        chosen = np.random.default_rng(0).permutation(len(train))[: args.n_train]
        train = [train[i] for i in sorted(chosen)]
    tokenizer = load_tokenizer(checkpoint["tokenizer"], args.checkpoint)
    dtype = settings_of(checkpoint)["dtype"]
    how = dict(
        epochs=args.epochs, batch_size=args.batch_size, freeze=args.freeze_encoder, beams=args.beams, dtype=dtype
    )
    job = tasks.Job(args.task, train, dev, tokenizer, SpecialIds(tokenizer.vocab_size()), **how, cut=args.cut)
    about = dict(
        checkpoint=str(args.checkpoint), kind=checkpoint["kind"], history=checkpoint["history"], task=args.task
    )
    about |= dict(data=str(folder), train_lang=args.train_lang, n_train=len(train), **how, cut=args.cut)
    lrs, results = args.lr or [trainer.default_lr(body.cfg.d_model)], []
    append(args.out, [])
    for result in tasks.evaluate(job, body, lrs, args.seeds, test):
        results.append(result)
        append(args.out, [about | result])
    tasks.print_scores(args.task, results, args.train_lang)


def append(path: Path | None, rows: list[dict]) -> None:
    """Adds JSON lines to a file, if there is one to add to. Raises InputError where it cannot be written."""
    if path:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); name another --out") from None


def _parse_flags() -> argparse.Namespace:
    """The command line. Raises InputError for a number out of range and for a flag that would do nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="enc.pt or seq2seq.pt; with --report results.jsonl")
    parser.add_argument(
        "more", nargs="*", help="a sentence for fill (with <mask>) or generate; checkpoints for cost; results"
    )
    parser.add_argument(
        "--task",
        choices=("loss", "fill", "generate", "fusion", "cost", *tasks.METRICS),
        help="default: loss, and a sample of each language",
    )
    parser.add_argument(
        "--data", type=Path, help="of data.py (default: what it was trained on); of a task: <lang>/{train,dev,test}.*"
    )
    parser.add_argument("--langs", nargs="+", help="languages to evaluate (default: all of the data folder)")
    parser.add_argument("--beams", type=int, default=1, help="hypotheses kept, 1 is greedy (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON lines file to append losses and scores to")
    parser.add_argument("--report", type=Path, metavar="DIR", help="tables and figures from such a file")
    group = parser.add_argument_group("fine-tuning, for tasks")
    group.add_argument("--train-lang", default="en", help="language to train on (default %(default)s)")
    group.add_argument("--n-train", type=int, default=0, help="train on that many items, by lot; 0: all (default 0)")
    group.add_argument("--seeds", type=int, default=1, help="fine-tunings, from 0 on (default %(default)s)")
    group.add_argument("--lr", type=float, nargs="+", help="peak rates to try (default 0.016 / sqrt(d_model))")
    group.add_argument("--epochs", type=int, default=0, help="0: 3, or as many as 500 updates take (default 0)")
    group.add_argument("--batch-size", type=int, default=32, help="rows an update (default %(default)s)")
    group.add_argument(
        "--freeze-encoder", action="store_true", help="train all but the encoder; heads read all its layers"
    )
    group.add_argument(
        "--cut", action="store_true", help="cut targets that are longer than the model's positions (default: an error)"
    )
    args = parser.parse_intermixed_args()
    for name, least in (("beams", 1), ("seeds", 1), ("epochs", 0), ("n_train", 0), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least {least}")
    for lr in args.lr or []:
        if not 0 < lr < math.inf:
            raise InputError(f"--lr {lr}: it must be over 0, and finite")
    if args.task in tasks.METRICS:  # looked up now: a file of the user's own may have added one
        takes = ("data", "langs", "out", *FINE_TUNING) + ("beams", "cut") * (args.task in tasks.GENERATION)
    else:
        takes = TAKES[args.task]
    takes, what = ((), "--report") if args.report else (("task", *takes), f"--task {args.task or 'loss'}")
    for name, value in vars(args).items():
        if name not in ("checkpoint", "more", "report", *takes) and value != parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} does nothing with {what}; leave it out")
    return args


def main() -> None:
    args = _parse_flags()
    if rank() > 0:
        return  # what torchrun starts beside the first process: one does all
    if args.report:
        report([args.checkpoint, *map(Path, args.more)], args.report)
        return
    if args.task == "cost":
        print_cost([args.checkpoint, *map(Path, args.more)])
        return
    if len(args.more) != (args.task in ("fill", "generate")):
        takes = "takes one sentence, in quotes" if args.task in ("fill", "generate") else "takes one checkpoint alone"
        raise InputError(f"--task {args.task or 'loss'} {takes}")
    trainer.keep_memory()
    if args.task in tasks.METRICS:
        run_task(args)
        return
    kind = {"fill": "encoder", "generate": "seq2seq", "fusion": "seq2seq"}.get(args.task)
    model, checkpoint = load_model(args.checkpoint, *([kind] if kind else []))
    model.to(trainer.device())
    kind, tokenizer = checkpoint["kind"], load_tokenizer(checkpoint["tokenizer"], args.checkpoint)
    ids = SpecialIds(tokenizer.vocab_size())
    if args.task == "fill":
        for k, row in enumerate(fill(model, tokenizer, ids, args.more[0]), 1):
            print(f"<mask> {k}: " + "  ".join(f"{piece!r} {p:.3f}" for piece, p in row))
        return
    if args.task == "generate":
        print(show(tokenizer, ids, rebuild(model, ids, encode_sentence(tokenizer, ids, args.more[0]), args.beams)))
        return
    settings = settings_of(checkpoint)
    data = trainer.open_data(str(args.data or settings["data"]), settings["seq_len"])
    if data.tokenizer_model != checkpoint["tokenizer"]:
        folder = args.data or settings["data"]
        raise InputError(f"{folder}: its tokenizer is not that of {args.checkpoint}; prepare it with --tokenizer")
    languages = args.langs or data.languages
    for language in languages:
        if language not in data.languages:
            raise InputError(f"--langs {language}: not in the data, which has {' '.join(data.languages)}")
    config, make = OBJECTIVES[kind]
    same = {"clm_fraction": 0.0, "mask_prob": MLMConfig.mask_prob}  # so that the losses of two models compare
    objective = make(ids, build(config, settings | same))
    if args.task == "fusion":
        if not model.cfg.fusion:
            raise InputError(f"{args.checkpoint}: trained without --fusion, there are no layer weights to show")
        print_fusion(model, data, languages, objective)
        return
    print_losses(args, checkpoint, model, data, languages, objective, settings["dtype"])
    if args.task is None:
        print_sample(kind, model, data, languages, objective, args.beams)


if __name__ == "__main__":
    run_command(main)
