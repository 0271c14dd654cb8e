import json
import math
import re

import pytest
import torch
from conftest import ROWS, SMALL

import eval as evaluation
import extract
import train_encoder
import train_seq2seq
import trainer
from checkpoint import load_checkpoint, load_model
from cli import InputError
from data import TokenData, prepare
from log import read_metrics


@pytest.mark.parametrize(
    "text, shown",
    [
        ("the <mask> is dark", "the <mask> is dark |"),
        ("<mask> is dark.", "<mask> is dark. |"),
        ("it is <mask>", "it is <mask> |"),
        ("<mask>", "<mask> |"),
        ("no holes", "no holes |"),
        ("two <mask> <mask> words", "two <mask> <mask> words |"),
    ],
)
def test_a_sentence_with_masks(tokenizer, ids, text, shown):
    tokens = evaluation.encode_sentence(tokenizer, text)[0].tolist()
    assert tokens.count(ids.mask) == text.count("<mask>") and tokens[-1] == ids.eos
    assert re.sub(" +", " ", evaluation.show(tokenizer, tokens)) == shown


def test_a_masked_word_takes_its_space_along(tokenizer, ids):
    """Where a piece is one word, masking the word in the text masks exactly that piece."""
    whole = evaluation.encode_sentence(tokenizer, "and the end")[0].tolist()
    masked = evaluation.encode_sentence(tokenizer, "and <mask> end")[0].tolist()
    at = whole.index(tokenizer.piece_to_id("▁the"))
    assert masked == whole[:at] + [ids.mask] + whole[at + 1 :]


def test_showing_tokens(tokenizer, ids):
    tokens = [*tokenizer.encode("one"), ids.eos, *tokenizer.encode("two"), ids.sentinel, ids.pad, ids.pad]
    assert evaluation.show(tokenizer, tokens) == "one | two <extra_id_0>"


def test_losses_of_both_kinds(command, checkpoints, data_dir, capsys):
    for name in ("enc.pt", "seq2seq.pt"):
        capsys.readouterr()
        command(evaluation, name, "--task", "loss", "--langs", "hi", "en", "--out", "results.jsonl")
        table = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [row[0] for row in table] == ["language", "hi", "en", "mean"]
        results = [json.loads(line) for line in (checkpoints / "results.jsonl").read_text().splitlines()][-2:]
        assert [r["language"] for r in results] == ["hi", "en"]
        for row, result in zip(table[1:], results):
            assert float(row[2]) == pytest.approx(result["loss"], abs=1e-3)
            assert float(row[3]) == pytest.approx(math.exp(result["loss"]), rel=1e-3)
            assert 3 < float(row[4]) < 7
    model, _ = load_model(checkpoints / "seq2seq.pt")
    data = TokenData(data_dir, 32)
    objective = train_seq2seq.seq2seq_objective(data.ids, train_seq2seq.DenoiseConfig())
    assert results[1]["loss"] == trainer.held_out_loss(model, data, ["en"], objective, "fp32")["en"]


@pytest.mark.parametrize("name, change", [("enc.pt", {"mask_prob": 0.3}), ("seq2seq.pt", {"clm_fraction": 0.5})])
def test_losses_compare_whatever_a_model_was_trained_with(command, checkpoints, name, change):
    checkpoint = load_checkpoint(checkpoints / name)
    checkpoint["history"][-1]["settings"] |= change
    torch.save(checkpoint, checkpoints / "other.pt")
    for path in (name, "other.pt"):
        command(evaluation, path, "--task", "loss", "--langs", "en", "--out", f"{name}.jsonl")
    one, other = (json.loads(line)["loss"] for line in (checkpoints / f"{name}.jsonl").read_text().splitlines())
    assert one == other


def test_losses_are_of_rows_as_long_as_those_trained_on(command, data_dir, tmp_path):
    """Positions beyond --seq-len have learned nothing. The second time as one of two processes that torchrun starts."""
    command(train_encoder, "--data", data_dir, *SMALL, *ROWS, "--max-len", 64, "--steps", 2)
    data = TokenData(data_dir, 32)
    objective = train_encoder.encoder_objective(data.ids, train_encoder.SCORED)
    expected = trainer.held_out_loss(load_model(tmp_path / "enc.pt")[0], data, data.languages, objective, "fp32")
    for world in ("1", "2"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", world)
            command(evaluation, "enc.pt", "--task", "loss", "--out", f"{world}.jsonl")
        for result in map(json.loads, (tmp_path / f"{world}.jsonl").read_text().splitlines()):
            assert result["loss"] == pytest.approx(expected[result["language"]], rel=1e-5)
    logged = read_metrics(tmp_path / "enc.run" / "metrics.jsonl")[-1]["held_out"]  # whatever it was trained with
    few = trainer.held_out_loss(load_model(tmp_path / "enc.pt")[0], data, data.languages, objective, "fp32", 64)
    assert logged == pytest.approx(few, rel=1e-5)


def test_the_log_of_causal_training_has_losses_of_denoising(command, checkpoints, data_dir):
    flags = ["--data", data_dir, *ROWS, "--init", "enc.pt", "--clm-fraction", 1, "--steps", 1, "--out", "causal.pt"]
    command(train_seq2seq, *flags)
    logged = read_metrics(checkpoints / "causal.run" / "metrics.jsonl")[-1]["held_out"]
    data = TokenData(data_dir, 32)
    objective = train_seq2seq.seq2seq_objective(data.ids, train_seq2seq.DenoiseConfig())
    model, _ = load_model(checkpoints / "causal.pt")
    few = trainer.held_out_loss(model, data, data.languages, objective, "fp32", 64)
    assert logged == pytest.approx(few, rel=1e-5)


def test_an_extracted_encoder_keeps_its_settings(command, data_dir, tmp_path):
    flags = [*SMALL, "--batch-size", 4, "--seq-len", 32, "--max-len", 64, "--steps", 1, "--dtype", "bf16"]
    command(train_seq2seq, "--data", data_dir, *flags, "--decoder-layers", 1)
    command(extract, "seq2seq.pt")
    settings = evaluation.settings_of(load_checkpoint(tmp_path / "enc-extracted.pt"))
    assert (settings["dtype"], settings["seq_len"], settings["data"]) == ("bf16", 32, str(data_dir))


def test_fill_gives_the_likeliest_pieces(command, checkpoints, tokenizer, ids, capsys):
    capsys.readouterr()
    command(evaluation, "enc.pt", "--task", "fill", "the <mask> is <mask>")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["<mask> 1", "<mask> 2"]
    model, _ = load_model(checkpoints / "enc.pt")
    src = evaluation.encode_sentence(tokenizer, "the <mask> is <mask>")
    first = int((src[0] == ids.mask).nonzero()[0])
    best = model.logits(src)[0, first].softmax(-1)
    pieces = re.findall(r"('[^']+') ([\d.]+)", lines[0])
    assert pieces[0] == (repr(tokenizer.id_to_piece(best.argmax().item()).replace("▁", " ")), f"{best.max():.3f}")
    assert len(pieces) == 5


def test_generate_rebuilds_what_it_was_taught(command, data_dir, tmp_path, capsys, tokenizer, ids):
    """Over-fitted to one sentence, the model gives it back from a damaged copy, greedily and by beam search."""
    torch.manual_seed(0)
    command(train_seq2seq, "--data", data_dir, *SMALL, *ROWS, "--steps", 0)
    model, checkpoint = load_model(tmp_path / "seq2seq.pt")
    clean = evaluation.encode_sentence(tokenizer, "the bread is warm")
    src = evaluation.encode_sentence(tokenizer, "the warm")
    tgt_in = torch.cat([torch.tensor([[ids.bos]]), clean[:, :-1]], 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        model(src, tgt_in, clean).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(checkpoint | {"weights": model.state_dict()}, tmp_path / "taught.pt")
    for beams in (1, 3):
        capsys.readouterr()
        command(evaluation, "taught.pt", "--task", "generate", "the warm", "--beams", beams)
        assert capsys.readouterr().out.strip() == "the bread is warm |"


def test_a_diverged_model_has_a_loss_still(command, checkpoints, capsys):
    checkpoint = torch.load(checkpoints / "enc.pt", weights_only=True)
    checkpoint["weights"]["head_bias"] = torch.linspace(0, 3e4, len(checkpoint["weights"]["head_bias"]))
    torch.save(checkpoint, checkpoints / "diverged.pt")
    command(evaluation, "diverged.pt", "--task", "loss")
    assert re.search(r"^en +\d+ +\d{4,}\.\d+ +inf ", capsys.readouterr().out, re.M)


def test_without_a_task_it_shows_losses_and_samples(command, checkpoints, capsys):
    for name in ("enc.pt", "seq2seq.pt"):
        capsys.readouterr()
        command(evaluation, name)
        out = capsys.readouterr().out
        for language in ("de", "en", "hi"):
            assert len(re.findall(rf"^{language} +(?:given|model|text) ", out, re.M)) == 3
            assert re.search(rf"^{language} +\d+ +\d\.\d+", out, re.M)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["nowhere.pt"], "nowhere.pt: no such file"),
        (["enc.pt", "--task", "generate", "x"], "of kind 'encoder', not seq2seq"),
        (["seq2seq.pt", "--task", "fill", "<mask>"], "of kind 'seq2seq', not encoder"),
        (["enc.pt", "--task", "fill", "no hole"], "no <mask> in the sentence"),
        (["enc.pt", "--task", "fill"], "--task fill takes a checkpoint and one sentence, in quotes"),
        (["enc.pt", "--task", "fill", "no", "quotes"], "--task fill takes a checkpoint and one sentence, in quotes"),
        (["enc.pt", "a sentence"], "--task loss takes a checkpoint and nothing else"),
        (["enc.pt", "nowhere.pt", "--task", "cost"], "nowhere.pt: no such file"),
        (["enc.pt", "--task", "fill", "<mask> " * 40], "but the model only 32 positions; shorten it"),
        (["enc.pt", "--langs", "xx"], "--langs xx: not in the data, which has de en hi"),
        (["enc.pt", "--data", "nowhere"], "nowhere: no such folder"),
        (["seq2seq.pt", "--beams", "0"], "--beams 0"),
        (["enc.pt", "--seeds", "3"], "--seeds does nothing with --task loss; leave it out"),
        (["enc.pt", "--task", "slots", "--beams", "2"], "--beams does nothing with --task slots"),
        (["enc.pt", "--task", "cost", "--out", "cost.jsonl"], "--out does nothing with --task cost"),
        (["enc.pt", "--out", "enc.pt"], "--out enc.pt: this is a checkpoint's name"),
    ],
)
def test_bad_input_gets_one_line(command, checkpoints, arguments, complaint):
    with pytest.raises(InputError, match=re.escape(complaint)):
        command(evaluation, *arguments)


def test_data_of_another_tokenizer_is_refused(command, checkpoints, text_dir):
    prepare(text_dir, checkpoints / "other", vocab_size=900, valid_fraction=0.2)
    with pytest.raises(InputError, match="other: its tokenizer is not that of enc.pt"):
        command(evaluation, "enc.pt", "--data", "other")


# Cost ---------------------------------------------------------------------------------------------------------------


def cost(command, capsys, *arguments) -> list[str]:
    capsys.readouterr()
    command(evaluation, *arguments, "--task", "cost")
    return capsys.readouterr().out.splitlines()


def test_cost_adds_up_over_the_ancestry(command, data_dir, checkpoints, capsys):
    """2 + 2 updates, unfrozen after 1: each line is a stage's own; both from scratch cost what training them does."""
    flags = ["--data", data_dir, *ROWS, "--steps", 2]
    command(train_seq2seq, *flags, "--init", "enc.pt", "--unfreeze-at", 0.5, "--out", "two.pt")
    command(train_seq2seq, *flags, *SMALL, "--decoder-layers", 2, "--out", "scratch.pt")
    flops = {
        name: [stage["flops"] for stage in load_checkpoint(checkpoints / name)["history"]]
        for name in ("enc.pt", "two.pt", "scratch.pt")
    }
    assert flops["two.pt"][0] == flops["enc.pt"][0] and flops["two.pt"][1] < 0.95 * flops["scratch.pt"][0]
    lines = cost(command, capsys, "two.pt")
    rows = [line.split() for line in lines[2:5]]
    assert [row[:-4] for row in rows] == [["encoder"], ["seq2seq"], ["in", "all"]]
    assert [row[-4:-2] for row in rows] == [["2", "256"], ["2", "256"], ["4", "512"]]
    assert [float(row[-2]) for row in rows] == pytest.approx([*flops["two.pt"], sum(flops["two.pt"])], rel=5e-3)
    both = flops["enc.pt"][0] + flops["scratch.pt"][0]
    assert f"both from scratch, 2 updates each: {both:.3g} FLOPs" in lines[5]
    assert f"saved {1 - sum(flops['two.pt']) / both:.1%}" in lines[5]
    assert "one model so far" in cost(command, capsys, "scratch.pt")[4]
    two = torch.load(checkpoints / "two.pt", weights_only=True)
    two["history"].insert(0, {**two["history"][0], "steps": 1})  # an encoder trained in two goes
    torch.save(two, checkpoints / "goes.pt")
    assert "both from scratch, 3 updates each" in cost(command, capsys, "goes.pt")[6]


@pytest.mark.parametrize("flags", [["--noise", "sentinel"], ["--noise", "mask"], ["--clm-fraction", 0.5]])
def test_scratch_cost_of_rows_of_unequal_length(command, data_dir, checkpoints, capsys, flags):
    """Where lengths vary with the noise the estimate is of a sample: near what training really took."""
    flags = ["--data", data_dir, "--batch-size", 64, "--seq-len", 32, "--dtype", "fp32", *flags, "--steps", 2]
    command(train_seq2seq, *flags, "--init", "enc.pt", "--out", "two.pt")
    first, second = load_checkpoint(checkpoints / "two.pt")["history"]
    line = cost(command, capsys, "two.pt")[5]
    both = float(re.search(r"each: ([^ ]+) FLOPs", line)[1])
    assert both - first["flops"] == pytest.approx(second["flops"], rel=0.03)


def test_the_paper_scale_saving(command, checkpoints, capsys):
    """The simple count is arithmetic on the stacks alone; the full one is near it and grows with the frozen part."""
    table = [line.split() for line in cost(command, capsys, "enc.pt")[-5:]]
    assert [float(row[0]) for row in table] == [0, 0.43, 0.5, 0.57, 1]
    full, simple = ([float(row[k].rstrip("%")) for row in table] for k in (1, 2))
    # From scratch 500 * 3 + 500 * 6 = 4500; two stages 1500 + 350 * (4 * at + 6 * (1 - at)).
    expected = [100 * (1 - (1500 + 350 * (6 - 2 * at)) / 4500) for at in (0, 0.43, 0.5, 0.57, 1)]
    assert simple == pytest.approx(expected, abs=0.051)
    assert all(a < b for a, b in zip(full, full[1:])) and all(0 < a - b < 3 for a, b in zip(full, simple))
