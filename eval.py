"""Evaluation of a checkpoint of either kind.

python eval.py enc.pt                                            # held-out loss per language, and a sample
python eval.py seq2seq.pt --task loss --data DATA --out results.jsonl
python eval.py enc.pt --task fill "The river is <mask> in winter."
python eval.py seq2seq.pt --task generate "The river frozen in winter." --beams 4
python eval.py enc.pt seq2seq.pt --task cost                     # what they cost, and saved
python eval.py enc.pt --task slots                               # fine-tunes and scores (tasks.py); also nli pos ner
python eval.py seq2seq.pt --task parse --data DIR --seeds 3 --out results.jsonl    # also summ
"""

import argparse
import math
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

import task_data
import tasks
import trainer
from checkpoint import load_checkpoint, load_model
from cli import InputError, append_json, build, rank, run_command
from compute import paper_saving, saved, scratch_flops
from config import default_lr, open_data, settings_of
from data import HERE, TokenData
from generate import generate
from metrics import GENERATION, METRICS
from objectives import VALID_NOISE, sample_rng
from tokenizer import SpecialIds, load_tokenizer
from train_encoder import SCORED, MLMConfig, encoder_objective
from train_seq2seq import DenoiseConfig, seq2seq_objective

OBJECTIVES = {"encoder": (MLMConfig, encoder_objective), "seq2seq": (DenoiseConfig, seq2seq_objective)}
MARK = "\ufdd0"  # stands for <mask> while a sentence is encoded: a code point that no text may hold


# Sentences ---------------------------------------------------------------------------------------------------------


def encode_sentence(tokenizer: SentencePieceProcessor, text: str) -> Tensor:
    """Tokens [1, S] of a sentence and its closing </s>; each "<mask>", with the space before it, is one token."""
    mark = " ".join(f"<0x{byte:02X}>" for byte in MARK.encode())  # of its bytes; a lone ▁ before is the space
    pieces = " ".join(tokenizer.encode(text.replace("<mask>", MARK), out_type=str))
    pieces = re.sub(rf"((?<!\S)▁ )?{mark}", "<mask>", pieces).split(" ") if pieces else []
    return torch.tensor([[*map(tokenizer.piece_to_id, pieces), SpecialIds.eos]])


def show(tokenizer: SentencePieceProcessor, tokens: list[int]) -> str:
    """Tokens as text for a reader: <mask> and sentinels by name, document ends as a bar, no padding."""
    ids, text = SpecialIds(tokenizer.vocab_size()), []
    for ordinary, run in groupby(tokens, lambda token: token >= ids.ordinary):
        if ordinary:
            text.append(tokenizer.decode(list(run)))
        else:
            shown = [token for token in run if token not in (ids.pad, ids.bos)]
            text += ["|" if token == ids.eos else tokenizer.id_to_piece(token) for token in shown]
    return " ".join(text)


# The evaluations ---------------------------------------------------------------------------------------------------


def print_losses(args: argparse.Namespace) -> None:
    """The held-out loss of each language; every number goes to --out. Without --task, also a sample of each."""
    model, checkpoint = load_model(args.checkpoint)
    model, settings = model.to(trainer.device()), settings_of(checkpoint)
    folder = str(args.data or settings["data"])
    data = open_data(folder, settings["seq_len"])
    if data.tokenizer_model != checkpoint["tokenizer"]:
        raise InputError(f"{folder}: its tokenizer is not that of {args.checkpoint}; prepare it with --tokenizer")
    languages = args.langs or data.languages
    if unknown := [language for language in languages if language not in data.languages]:
        raise InputError(f"--langs {' '.join(unknown)}: not in the data, which has {' '.join(data.languages)}")
    config, make = OBJECTIVES[checkpoint["kind"]]
    same = {"clm_fraction": 0.0, "mask_prob": SCORED.mask_prob}  # so that losses of two models can be compared
    objective = make(data.ids, build(config, settings | same))
    if args.out:
        append_json(args.out)  # fails now rather than at the end
    about = {"checkpoint": str(args.checkpoint), "kind": checkpoint["kind"], "history": checkpoint["history"]}
    losses = trainer.held_out_loss(model, data, languages, objective, settings["dtype"])
    entropies = {language: data.unigram_entropy(language) for language in losses}
    print("language   rows   loss  perplexity  unigram entropy")
    for language, loss in losses.items():
        perplexity = math.exp(loss) if loss < 700 else math.inf  # a diverged model's overflows a double
        entropy = entropies[language]
        print(f"{language:8} {data.n_valid_rows(language):6} {loss:6.3f} {perplexity:11.1f} {entropy:16.3f}")
        if args.out:
            numbers = {"loss": loss, "unigram_entropy": entropy, "items": data.n_valid_rows(language)}
            append_json(args.out, about | {"task": "loss", "language": language} | numbers)
    mean, entropy = (sum(x.values()) / len(x) for x in (losses, entropies))
    print(f"mean            {mean:6.3f} {'':11} {entropy:16.3f}")
    for language in [] if args.task else languages:
        print_sample(model, data, language, objective, args.beams)


@torch.no_grad()
def print_sample(model: nn.Module, data: TokenData, language: str, objective: trainer.Objective, beams: int) -> None:
    """The start of a held-out row: damaged, repaired and original."""
    row = data.valid_row(language, 0)[:64]
    example = objective(row, sample_rng(0, VALID_NOISE, 0))
    src = torch.from_numpy(example["src"])[None].to(trainer.device())  # [1, S]
    if "labels" in example:
        best = model.logits(src)[0].argmax(-1)
        asked = torch.from_numpy(example["labels"] != trainer.IGNORE)
        repaired = torch.where(asked, best.cpu(), src[0].cpu()).tolist()
    else:
        repaired = generate(model, src, beams=beams)[0, : len(row)].tolist()  # a row has no end to stop at
    print()
    for title, tokens in (("given", src[0].tolist()), ("model", repaired), ("text", row.tolist())):
        print(f"{language} {title:5}  {show(data.tokenizer, tokens)}")


def open_sentence(args: argparse.Namespace, kind: str) -> tuple[nn.Module, SentencePieceProcessor, Tensor]:
    """Model, tokenizer and the sentence of the command line [1, S]. Raises InputError if it is too long."""
    model, checkpoint = load_model(args.checkpoint, kind)
    tokenizer = load_tokenizer(checkpoint["tokenizer"], args.checkpoint)
    src = encode_sentence(tokenizer, args.more[0])
    if src.shape[1] > model.cfg.max_len:
        has = f"the sentence has {src.shape[1]} tokens, but the model only {model.cfg.max_len} positions"
        raise InputError(f"{has}; shorten it")
    return model.to(trainer.device()), tokenizer, src.to(trainer.device())


@torch.no_grad()
def print_fill(args: argparse.Namespace) -> None:
    """The five likeliest pieces for each <mask> of a sentence, with probabilities."""
    model, tokenizer, src = open_sentence(args, "encoder")
    masked = src[0] == SpecialIds.mask  # [S]
    if not masked.any():
        raise InputError(f"{args.more[0]!r}: no <mask> in the sentence to fill")
    best = model.logits(src)[0, masked].softmax(-1).topk(5)
    for k, (probabilities, pieces) in enumerate(zip(best.values.tolist(), best.indices.tolist()), 1):
        texts = [tokenizer.id_to_piece(piece).replace("▁", " ") for piece in pieces]
        print(f"<mask> {k}: " + "  ".join(f"{text!r} {p:.3f}" for text, p in zip(texts, probabilities)))


def print_generated(args: argparse.Namespace) -> None:
    """What a seq2seq model makes of a sentence."""
    model, tokenizer, src = open_sentence(args, "seq2seq")
    print(show(tokenizer, generate(model, src, beams=args.beams)[0].tolist()))


def print_cost(args: argparse.Namespace) -> None:
    """What every stage of each checkpoint's history cost, and what the pair of models in it saved."""
    for path in (args.checkpoint, *map(Path, args.more)):
        history = load_checkpoint(path)["history"]
        print(f"{path}\n  stage        updates          tokens      FLOPs    hours")
        total = {"stage": "in all"} | {x: sum(s[x] for s in history) for x in ("steps", "tokens", "flops", "seconds")}
        for stage in [*history, total]:
            cost = f"{stage['tokens']:15,} {stage['flops']:10.3g} {stage['seconds'] / 3600:8.2f}"
            print(f"  {stage['stage']:10} {stage['steps']:9,} {cost}")
        steps, both = scratch_flops(history)
        if not both:
            print("  one model so far: nothing to compare\n")
            continue
        print(f"  both from scratch, {steps:,} updates each: {both:.3g} FLOPs; saved {saved(history, both):.1%}\n")
    print("At the paper's shape (rows of 512; 500k updates from scratch each; 350k in the second stage):")
    print("  --unfreeze-at   saved   saved by the count 'stack forward 1, backward 2'")
    for share in (0, 0.43, 0.5, 0.57, 1):
        ours, simple = paper_saving(share)
        print(f"  {share:13}  {ours:6.1%}  {simple:6.1%}")


def run_task(args: argparse.Namespace) -> None:
    """Fine-tunes on one language, scores all, prints the table; every number goes to --out as soon as it is known."""
    folder = args.data or (HERE / "sample" / "slots" if args.task == "slots" else None)
    if folder is None:
        raise InputError(f"--task {args.task} needs --data DIR, which holds <lang>/train.*, dev.*, test.*")
    body, checkpoint = load_model(args.checkpoint, *(["seq2seq"] if args.task in GENERATION else []))
    train, dev, test = task_data.read_task(args.task, folder, args.train_lang, args.langs)
    if args.n_train:
        chosen = np.random.default_rng(0).permutation(len(train))[: args.n_train]
        train = [train[i] for i in sorted(chosen)]
    tokenizer = load_tokenizer(checkpoint["tokenizer"], args.checkpoint)
    how = dict(epochs=args.epochs, batch_size=args.batch_size, freeze=args.freeze_encoder, beams=args.beams)
    how |= dict(dtype=settings_of(checkpoint)["dtype"], cut=args.cut)
    job = tasks.Job(args.task, train, dev, tokenizer, SpecialIds(tokenizer.vocab_size()), **how)
    about = {"checkpoint": str(args.checkpoint), "kind": checkpoint["kind"], "history": checkpoint["history"]}
    about |= dict(task=args.task, data=str(folder), train_lang=args.train_lang, n_train=len(train)) | how
    lrs, results = args.lr or [default_lr(body.cfg.d_model)], []
    if args.out:
        append_json(args.out)
    for result in tasks.evaluate(job, body, lrs, args.seeds, test):
        results.append(result)
        if args.out:
            append_json(args.out, about | result)
    tasks.print_scores(args.task, results, args.train_lang)


# The command -------------------------------------------------------------------------------------------------------

FINE_TUNING = ("data", "langs", "out", "train_lang", "n_train", "seeds", "lr", "epochs", "batch_size", "freeze_encoder")
Command = tuple[Callable[[argparse.Namespace], object], tuple[str, ...], str]
COMMANDS: dict[str | None, Command] = {  # task -> what it runs, the flags that affect it, what follows the checkpoint
    None: (print_losses, ("data", "langs", "out", "beams"), "nothing else"),
    "loss": (print_losses, ("data", "langs", "out"), "nothing else"),
    "fill": (print_fill, (), "one sentence, in quotes"),
    "generate": (print_generated, ("beams",), "one sentence, in quotes"),
    "cost": (print_cost, (), "checkpoints"),
}


def parse_flags() -> tuple[Callable[[argparse.Namespace], object], argparse.Namespace]:
    """What the command line asks for, and its flags. Raises InputError for a number out of range and for a flag that
    would do nothing.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="enc.pt or seq2seq.pt")
    add("more", nargs="*", help="a sentence for fill (with <mask>) or generate; more checkpoints for cost")
    flags = {task: (*FINE_TUNING, *["beams", "cut"] * (task in GENERATION)) for task in METRICS}
    commands = COMMANDS | {task: (run_task, flags[task], "nothing else") for task in METRICS}
    add("--task", choices=[*filter(None, commands)], help="default: held-out losses, and a sample in each language")
    add("--data", type=Path, help="data folder (default: what it was trained on); for a task, the folder of its files")
    add("--langs", nargs="+", help="languages to evaluate (default: all)")
    add("--beams", type=int, default=1, help="hypotheses kept, 1 is greedy (default %(default)s)")
    add("--out", type=Path, help="JSON lines file to append losses and scores to")
    add = parser.add_argument_group("fine-tuning, for tasks").add_argument
    add("--train-lang", default="en", help="language to train on (default %(default)s)")
    add("--n-train", type=int, default=0, help="train on this many items, chosen at random; 0: all (default 0)")
    add("--seeds", type=int, default=1, help="how many fine-tunings, with seeds from 0 on (default %(default)s)")
    add("--lr", type=float, nargs="+", help="peak rates to try (default 0.016 / sqrt(d_model))")
    add("--epochs", type=int, default=0, help="0: 3, or more if 500 updates take more (default 0)")
    add("--batch-size", type=int, default=32, help="rows per update (default %(default)s)")
    add("--freeze-encoder", action="store_true", help="keep the encoder frozen; heads then read all of its layers")
    add("--cut", action="store_true", help="cut targets that are longer than the model allows (default: an error)")
    args = parser.parse_intermixed_args()
    for name, least in (("beams", 1), ("seeds", 1), ("epochs", 0), ("n_train", 0), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least {least}")
    if args.out and args.out.suffix == ".pt":
        raise InputError(f"--out {args.out}: this is a checkpoint's name, and results are lines of text; use .jsonl")
    for lr in args.lr or []:
        if not 0 < lr < math.inf:
            raise InputError(f"--lr {lr}: it must be positive and finite")
    command, affecting, follows = commands[args.task]
    title = f"--task {args.task or 'loss'}"
    for name, value in vars(args).items():
        if name not in ("checkpoint", "more", "task", *affecting) and value != parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} does nothing with {title}; leave it out")
    if follows != "checkpoints" and len(args.more) != (follows != "nothing else"):
        raise InputError(f"{title} takes a checkpoint and {follows}")
    return command, args


def main() -> None:
    command, args = parse_flags()
    if rank() == 0:  # torchrun may have started more processes: one does it all
        trainer.keep_memory()
        command(args)


if __name__ == "__main__":
    run_command(main)
