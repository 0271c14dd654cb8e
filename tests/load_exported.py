"""Run by test_hf.py in a process that knows nothing of this project, perhaps with another transformers.

    python -I load_exported.py FOLDER    # with enc/, seq2seq/ and expected.pt: what our own code makes of the input

Writes both models again, as enc-again/ and seq2seq-again/, and the trained one, for our import to read.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)


def up_to_eos(rows: torch.Tensor) -> list[list[int]]:
    """Rows without what stands behind the first </s>."""
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows.tolist()]


def train(model, tokenizer, expected: dict, out: Path) -> None:
    """Ten steps of Seq2SeqTrainer; its loss before them is ours, and they make it smaller."""
    lengths = expected["real"].sum(1).tolist()
    sources = [{"input_ids": row[row != 0].tolist()} for row in expected["src"]]
    rows = [x | {"labels": row[:n].tolist()} for x, row, n in zip(sources, expected["tgt"], lengths)]
    arguments = Seq2SeqTrainingArguments(
        str(out), max_steps=10, learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        predict_with_generate=True, generation_max_length=8,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    trainer = Seq2SeqTrainer(model, arguments, collator, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    assert abs(before - expected["loss"]) < 1e-4, (before, expected["loss"])
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model(str(out))
    with torch.no_grad():
        logits = model(expected["src"], expected["mask"].long(), decoder_input_ids=expected["tgt_in"]).logits
    torch.save(logits, out / "logits.pt")


def main(folder: Path) -> None:
    expected = torch.load(folder / "expected.pt")
    src, mask = expected["src"], expected["mask"].long()
    labels = expected["tgt"].masked_fill(~expected["real"], -100)
    for name, auto in {"enc": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}.items():
        tokenizer = AutoTokenizer.from_pretrained(folder / name, trust_remote_code=True)
        assert tokenizer(expected["lines"])["input_ids"] == expected["ids"]
        model, info = auto.from_pretrained(folder / name, trust_remote_code=True, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        model.eval().save_pretrained(folder / f"{name}-again")
        with torch.no_grad():
            logits = model(src, attention_mask=mask, **({"labels": labels} if name == "seq2seq" else {})).logits
        real = expected["mask"] if name == "enc" else expected["real"]
        torch.testing.assert_close(logits[real], expected[name][real], rtol=1e-5, atol=1e-5)
    for beams, tokens in expected["tokens"].items():
        more = dict(num_beams=beams, do_sample=False, max_new_tokens=10)
        assert up_to_eos(model.generate(src, attention_mask=mask, **more)[:, 1:]) == up_to_eos(tokens)
    if importlib.util.find_spec("accelerate"):  # which the Trainer needs
        train(model, tokenizer, expected, folder / "trained")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
