"""The command line of extract.py; that the encoder stays the same bit for bit is tested in test_trainer.py."""

import re

import pytest

import extract
from cli import InputError


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "name a checkpoint, or a folder with --from-hf; not both"),
        (["enc.pt", "--from-hf", "hf"], "name a checkpoint, or a folder with --from-hf; not both"),
        (["--from-hf", "hf", "--to-hf", "HF", "--out", "enc.pt"], "--from-hf and --to-hf: one at a time"),
        (["enc.pt"], "of kind 'encoder', not seq2seq"),
        (["seq2seq.pt", "--out", "seq2seq.pt"], "seq2seq.pt: exists"),
        (["--from-hf", "hf", "--out", "enc.pt"], "enc.pt: exists"),
        (["seq2seq.pt", "--out", "no/x.pt"], "no: no such folder to write x.pt to; create it"),
        (["nowhere.pt", "--to-hf", "hf"], "no such file"),
    ],
)
def test_mistakes_are_refused(command, checkpoints, arguments, complaint):
    before = sorted(checkpoints.iterdir())
    with pytest.raises(InputError, match=re.escape(complaint)):
        command(extract, *arguments)
    assert sorted(checkpoints.iterdir()) == before
