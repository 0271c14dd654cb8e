"""Every row of the table, from its own script: at demo scale cut to 2 updates, at paper scale with none."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import data
import eval as evaluation
import extract
import train_encoder
import train_seq2seq
from checkpoint import load_checkpoint

MODULES = {m.__name__: m for m in (evaluation, extract, train_encoder, train_seq2seq)}
FROM_SCRATCH = ["roberta-12e", "bart-12e12d", "bart-12e12d-mask", "bart-12e2d", "bart-12e2d-mask", "bart-12e1d-mask"]
MLM = [f"{row}+mlm" for row in FROM_SCRATCH[1:]]
TWO_STAGE = ["2stage-bart-12e12d", "2stage-bart-12e12d-attn-f", "2stage-bart-12e12d-unfrz"]
BEYOND = ["t5-12e12d", "2stage-t5-12e12d-unfrz", "2stage-bart-12e12d-unfrz-clm"]
NARROW = ["--d-model", "32", "--n-heads", "2", "--d-ff", "64"]
ROWS = FROM_SCRATCH + MLM + TWO_STAGE + BEYOND


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Runs a recipe with bash; the commands it would start are then run here, in this process and in its folder.

    It stands in for `python` and `torchrun` only: starting 50 processes that import torch would take minutes.
    """
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    starters = tmp_path / "bin"
    starters.mkdir()
    for name in ("python", "torchrun"):
        (starters / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" "" >> "{tmp_path}/commands"\n')
        (starters / name).chmod(0o755)

    def run(row: str, *flags: str, **environment: str) -> list[list[str]]:
        environment = dict(os.environ, PATH=f"{starters}:{os.environ['PATH']}", **environment)
        line = [str(tmp_path / "recipes" / f"{row}.sh"), *flags]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "commands").read_text().split("\n\n")
        (tmp_path / "commands").unlink()
        commands = [line.split("\n") for line in lines if line]
        monkeypatch.chdir(tmp_path / "runs" / environment.get("SCALE", "demo"))
        for _starter, script, *arguments in commands:
            module = MODULES[Path(script).stem]
            monkeypatch.setattr(sys, "argv", [module.__file__, *arguments])
            module.main()
        return commands

    return run


def test_there_is_a_recipe_for_every_row():
    assert sorted(path.stem for path in (ROOT / "recipes").glob("*.sh")) == sorted([*ROWS, "scale", "run_all"])
    for row in ROWS:
        first, *rest = (ROOT / "recipes" / f"{row}.sh").read_text().splitlines()
        commands = [line for line in rest if re.match(r"python |\$TORCHRUN ", line)]
        assert first == "#!/usr/bin/env bash" and rest[0].startswith("# ") and len(commands) == 3, row


@pytest.mark.slow
def test_every_recipe_end_to_end_at_demo_scale(recipe, tmp_path, capsys):
    kinds = {row: "encoder" if row in [*MLM, "roberta-12e"] else "seq2seq" for row in ROWS}
    stages = {row: ["seq2seq", "extract", "encoder"] for row in MLM}
    stages |= {row: ["encoder", "seq2seq"] for row in ROWS if row.startswith("2stage")}
    for row in ROWS:
        recipe(row, *NARROW, "--steps", "2", "--batch-size", "4")
        checkpoint = load_checkpoint(tmp_path / "runs" / "demo" / f"{row}.pt", kinds[row])
        assert [stage["stage"] for stage in checkpoint["history"]] == stages.get(row, [kinds[row]]), row
        assert f"{row}.pt" in capsys.readouterr().out
    results = (tmp_path / "runs" / "demo" / "results.jsonl").read_text().splitlines()
    assert len(results) == 12 * len(ROWS)
    recipe(MLM[0], *NARROW, "--steps", "2", "--batch-size", "4", "--resume")  # its extracted encoder is there already


@pytest.mark.slow
def test_paper_scale_is_the_published_scale(recipe, tmp_path, capsys):
    """Flags that come after cut the width and the updates; what the script itself asks for is read from its command."""
    folder = tmp_path / "my shards"
    data.prepare(data.SAMPLE_TEXT, folder, vocab_size=2000, valid_fraction=0.3)
    asked = {}
    for row in ROWS:
        commands = recipe(row, *NARROW, "--steps", "0", SCALE="paper", DATA=str(folder))
        (train,) = [line for line in commands if line[0] == "torchrun"]
        asked[row] = dict(zip(train[2::2], train[3::2])) | {"steps": train[train.index("--steps") + 1]}
        assert asked[row]["--batch-size"] == "2048" and asked[row]["--seq-len"] == "512"  # 1M tokens
        config = load_checkpoint(tmp_path / "runs" / "paper" / f"{row}.pt")["config"]
        depth = (
            0 if "mlm" in row or "roberta" in row else 1 if "1d" in row else 2 if "2d" in row.replace("12d", "") else 12
        )
        assert config["n_encoder_layers"] == 12 and config["n_decoder_layers"] == depth, row
        assert config["max_len"] == 512 and config["dropout"] == 0.1 and config["fusion"] == row.endswith("attn-f")
    updates = {row: int(flags["steps"]) for row, flags in asked.items()}
    assert {updates[row] for row in [*FROM_SCRATCH, "t5-12e12d"]} == {500_000}
    assert {updates[row] for row in MLM} == {100_000}
    assert {updates[row] for row in ROWS if row.startswith("2stage")} == {350_000}


def test_only_scale_sh_knows_the_scale():
    for row in ROWS:
        text = (ROOT / "recipes" / f"{row}.sh").read_text()
        assert not re.search(r"SCALE|--(preset|batch-size|micro-batch-size|seq-len|data|d-model)", text), row
        assert set(re.findall(r"--(?:steps|decoder-layers) (\S+)", text)) <= {
            "$STEPS",
            "$SECOND",
            "$MORE",
            *"12",
        }
        assert '"${SHAPE[@]}"' in text


@pytest.mark.parametrize(
    "environment, row, complaint",
    [
        ({}, "2stage-bart-12e12d-unfrz", "runs/demo/roberta-12e.pt: not there yet; run recipes/roberta-12e.sh first"),
        ({}, "bart-12e2d+mlm", "runs/demo/bart-12e2d.pt: not there yet; run recipes/bart-12e2d.sh first"),
        ({"SCALE": "huge"}, "roberta-12e", "SCALE=huge: it must be demo, mini, midi, gpu or paper"),
        ({"SCALE": "mini"}, "roberta-12e", "SCALE=mini: name a data folder"),
        ({"DATA": "nowhere"}, "roberta-12e", "DATA=nowhere: no such folder"),
    ],
)
def test_a_recipe_that_cannot_run_says_why(tmp_path, environment, row, complaint):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    line = [str(tmp_path / "recipes" / f"{row}.sh")]
    done = subprocess.run(line, env=dict(os.environ, **environment), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(complaint) and done.stderr.count("\n") == 1


@pytest.fixture
def run_all(tmp_path):
    """Runs recipes/run_all.sh on tasks as released, with starters that only write down the command and make its --out.

    What the commands do is tested above; a whole run takes hours.
    """
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (starters := tmp_path / "bin").mkdir()
    (log := tmp_path / "commands").touch()
    for name in ("python", "torchrun"):
        (starters / name).write_text(f"""#!/bin/sh
[ "$1" != -c ] || exec {sys.executable} "$@"
echo "$PWD $@" >> {log}
[ "$(wc -l < {log})" != "$FAIL_AT" ] || exit 1
while [ $# -gt 0 ]; do [ "$1" != --out ] || echo made >> "$2"; shift; done
""")
        (starters / name).chmod(0o755)
    for name in ("udpos/UD/en_a-ud-test.conllu", "udpos/UD/de_a-ud-test.conllu", "udpos/ja/test.conllu",
                 "udpos/UD/en_a-ud-train.conllu", "udpos/UD/en_a-ud-dev.conllu", "parse/mtop/en/train.txt",
                 "slots/data/train_EN.tsv", "slots/data/dev_EN.tsv", "parse/mtop/en/eval.txt",
                 "summ/data/train-00000-of-00001.parquet", "summ/data/validation-00000-of-00001.parquet",
                 "nli/de/test.tsv", "slots/data/test_EN.tsv",
                 "parse/mtop/de/test.txt", "parse/mtop/en/test.txt", "parse/mtop/fr/eval.txt",
                 "summ/data/test-00000-of-00001.parquet", "ner/sw/test.bio"):  # fmt: skip
        (tmp_path / "tasks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tasks" / name).touch()
    (tmp_path / "shards").mkdir()
    for name in ("de.train.000.bin", "en.train.000.bin", "en.train.001.bin", "fr.train.000.bin", "hi.json"):
        (tmp_path / "shards" / name).touch()

    def run(*flags: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        log.write_text("")
        environment = {"SCALE": "mini", "DATA": "shards", "TASKS": "tasks", "PYTHONPATH": str(ROOT)} | environment
        environment = dict(os.environ, PATH=f"{starters}:{os.environ['PATH']}", **environment)
        line = ["recipes/run_all.sh", *flags]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done, log.read_text().splitlines()

    return run


def test_run_all_goes_on_where_it_was_stopped(run_all, tmp_path):
    planned, commands = run_all("--plan")
    *names, last = planned.stdout.splitlines()
    assert not commands and last == f"{len(names)} jobs left, none timed yet" and len(set(names)) == len(names)
    assert set(FROM_SCRATCH + MLM + TWO_STAGE) <= set(names)
    missing = planned.stderr.splitlines()
    assert [line.split()[0] for line in missing] == ["ner", "nli"]
    assert missing[1].endswith("tasks/nli has train: none; dev: none; test: de")
    claim = ["roberta-12e", "bart-12e12d", "bart-12e12d+mlm", "2stage-bart-12e12d-unfrz", "2stage-bart-12e12d"]
    assert names[:5] == claim and {"random", "pos.random", "slots.random"} < set(names)
    assert not any(name.startswith("ner.") for name in names)  # in no language of the data
    assert "parse.mini-seed1.bart-12e12d" in names and "roberta-12e.seed2" in names
    assert {f"pos.{row}" for row in FROM_SCRATCH + MLM} <= set(names)
    assert {f"parse.{row}" for row in FROM_SCRATCH + TWO_STAGE} - {"parse.roberta-12e"} <= set(names)
    whole, interrupted = [], 0
    for fail_at in ("5", "40", ""):  # commands into each start; a failed one stands for a kill
        done, commands = run_all(FAIL_AT=fail_at)
        assert (done.returncode == 0) == (not fail_at), done.stderr
        whole += commands
        interrupted += bool(fail_at)
        left = run_all("--plan")[0].stdout.splitlines()[-1]
        assert re.match(r"\d+ jobs left, about \d+\.\d hours", left), left
    assert done.stdout.splitlines()[-1].startswith("all done") and left.startswith("0 jobs left")
    assert not run_all()[1]
    done, commands = run_all(TRAIN_LANG="de")  # the jobs that are done are not these
    assert done.returncode == 2 and not commands and "begun with TASKS=" in done.stderr
    scored = [line for line in whole if re.search("--task (pos|slots|parse|summ)", line)]
    of_tasks = [name.split(".")[0] in ("pos", "slots", "parse", "summ") for name in names]
    assert len(set(scored)) == sum(of_tasks)
    (pos,) = {line.split("--langs ")[1] for line in scored if "--task pos" in line}
    assert pos.startswith("de en --seeds 3")  # what was both pre-trained and has a test set
    (summ,) = {line.split("--train-lang ")[1] for line in scored if "--task summ" in line}
    assert summ.startswith("en --langs en --seeds 3")
    (parse,) = {line.split("--langs ")[1] for line in scored if "--task parse" in line}
    assert parse.startswith("de en --seeds 3")  # not fr, of which there is a dev set only
    trained = [line for line in whole if "train_" in line.split()[1]]
    assert all(line.endswith("--resume") for line in trained)
    made = {(line.split()[0], line.split("--out ")[1]) for line in trained}
    assert len(made) == len(names) - sum(of_tasks)
    assert len(trained) - len(made) <= interrupted  # a row that was stopped behind its training asks for it again
    assert len({line for line in trained if "--seed 1 " in line and "mini-seed1 " in line}) == 5


@pytest.mark.parametrize(
    "flags, environment, complaint",
    [
        (["--dry"], {}, "--dry: the only flag is --plan"),
        ([], {"SEED": "1"}, "SEED=1: leave it out"),
        ([], {"DATA": "nowhere"}, "DATA=nowhere: no such folder"),
        ([], {"TASKS": "nowhere"}, "TASKS=nowhere: no such folder"),
    ],
)
def test_run_all_says_what_is_wrong(run_all, flags, environment, complaint):
    done, commands = run_all(*flags, **environment)
    assert done.returncode == 2 and done.stderr.startswith(complaint) and not commands


def test_a_damaged_task_file_ends_run_all_with_one_line(run_all, tmp_path):
    """XNLI's files have their languages inside: they are read before anything runs."""
    (tmp_path / "tasks" / "nli" / "xnli.test.tsv.gz").write_bytes(b"damaged")
    done, commands = run_all("--plan")
    assert done.returncode == 2 and not done.stdout and not commands
    left_out, line = done.stderr.splitlines()
    assert left_out.startswith("ner is left out")
    assert line.startswith("run_all.sh: ") and "xnli.test.tsv.gz:1: cannot be read" in line
