"""The command line of extract.py; that the encoder stays the same bit for bit is tested in test_trainer.py."""

import re

import pytest

import extract
from cli import InputError

EITHER = "name a checkpoint (--to-hf DIR exports it) or --from-hf DIR, not both"


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], EITHER),
        (["enc.pt", "--from-hf", "hf"], EITHER),
        (["--from-hf", "hf", "--to-hf", "HF", "--out", "enc.pt"], EITHER),
        (["enc.pt"], "of kind 'encoder', not seq2seq"),
        (["seq2seq.pt", "--out", "seq2seq.pt"], "seq2seq.pt: exists"),
        (["--from-hf", "hf", "--out", "enc.pt"], "enc.pt: exists"),
        (["seq2seq.pt", "--out", "no/x.pt"], "no/x.pt: cannot be written (No such file or directory)"),
        (["nowhere.pt", "--to-hf", "hf"], "no such file"),
        (["enc.pt", "--to-hf", "hf", "--out", "x.pt"], "--out x.pt: --to-hf names the folder"),
    ],
)
def test_mistakes_are_refused(command, checkpoints, arguments, complaint):
    before = sorted(checkpoints.iterdir())
    with pytest.raises(InputError, match=re.escape(complaint)):
        command(extract, *arguments)
    assert sorted(checkpoints.iterdir()) == before
