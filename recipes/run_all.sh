#!/usr/bin/env bash
# Every row of the paper's table, the task suite on it, the sweep of --unfreeze-at, and what goes beyond the paper.
#
#   recipes/run_all.sh --plan                              # what is left to do, and about how long it takes
#   recipes/run_all.sh                                     # does it; if stopped, the same command continues
#   SCALE=mini DATA=DATA TASKS=TASKS recipes/run_all.sh    # TASKS holds udpos ner slots nli parse summ, or some of them
#   python recipes/report.py runs/mini*/results.jsonl --out OUT   # tables and a figure of the results so far
#
# Tasks are fine-tuned on TRAIN_LANG (en) and scored in the languages of the data folder that have a test set.
#
# The rows that carry the claim and their scores come first, then those again from other seeds, the sweep, the rest.
# A job that is done has a file in runs/$SCALE/done, which holds its cost and its seconds.
unset CDPATH # with it, cd prints where it went
TASKS=${TASKS:-$(dirname "$0")/../sample}
[ -d "$TASKS" ] || { echo "TASKS=$TASKS: no such folder" >&2 && exit 2; }
TASKS=$(cd "$TASKS" && pwd)
. "$(dirname "$0")/scale.sh"
case ${1:-} in '' | --plan) mode=${1:-} ;; *) echo "$1: the only flag is --plan" >&2 && exit 2 ;; esac
[ "$SEED" = 0 ] || { echo "SEED=$SEED: leave it out; other seeds are among the jobs" >&2 && exit 2; }
export SCALE TORCHRUN DATA=${DATA:-}
TRAIN_LANG=${TRAIN_LANG:-en}
mkdir -p done

case $SCALE in # how tasks are fine-tuned
demo) HOW="--seeds 2" ;;
mini | midi) HOW="--seeds 3 --n-train 2000" ;;
gpu | paper) HOW="--seeds 3 --lr 1e-5 3e-5 1e-4" ;;
esac
LANGS=$(cd "${DATA:-$CODE/sample/text}" && ls | sed -nE 's/^([^.]+)\.(train.*bin|txt)$/\1/p')
setting="TASKS=$TASKS TRAIN_LANG=$TRAIN_LANG DATA=${DATA:-} ("$(echo $LANGS)")" # else jobs of another would count as done
[ "$mode" = --plan ] || [ -e setting ] || echo "$setting" > setting
[ ! -e setting ] || [ "$setting" = "$(cat setting)" ] || {
  echo "runs/$SCALE: begun with $(cat setting), not $setting; move it away, or edit the file 'setting' in it" >&2 && exit 2
}
declare -A TESTED # task -> the languages of the data folder that have a test set of it, as eval.py finds them
for task in pos ner slots nli parse summ; do
  TESTED[$task]=$(cd "$CODE" && python -c "import contextlib, pathlib, sys, cli, task_data

def print_languages():
    with contextlib.redirect_stdout(None):
        splits = task_data.find_splits(task, pathlib.Path(folder), train_language)
    both = all(train_language in splits[split] for split in ('train', 'dev'))
    tested = sorted(splits['test'].keys() & languages) if both else []
    if not tested:
        has = '; '.join(f'{split}: ' + (' '.join(sorted(splits[split])) or 'none') for split in splits)
        lack = f'it needs train and dev in {train_language} and test in a language of the data'
        print(f'{task} is left out: {lack}; {folder} has {has}', file=sys.stderr)
    print(*tested)

_, task, folder, train_language, *languages = sys.argv
sys.argv[0] = 'run_all.sh'  # as errors call it
cli.run_command(print_languages)" $task "$TASKS/${task/pos/udpos}" $TRAIN_LANG $LANGS)
done

job() { # NAME COST COMMAND...: runs what is not done yet, or adds it to what is left
  local name=$1 cost=$2 began=$SECONDS
  [ ! -e "done/$name" ] || return 0
  shift 2
  if [ "$mode" = count ] || [ "$mode" = --plan ]; then
    left=$((left + cost)) n_left=$((n_left + 1))
    [ "$mode" = count ] || echo "$name"
    return 0
  fi
  echo "== $name: $n_left jobs left, $(duration)"
  "$@"
  echo "$cost $((SECONDS - began))" > "done/$name"
  left=$((left - cost)) n_left=$((n_left - 1))
}

duration() { # of what is left, at the speed of what is done
  cat done/* 2> /dev/null | awk -v left=$left '{ cost += $1; seconds += $2 }
    END { if (cost) printf "about %.1f hours\n", left * seconds / cost / 3600; else print "none timed yet" }'
}

row() { # ROW [SEED]: its recipe
  SEED=${2:-0} "$CODE/recipes/$1.sh" --resume
}

first() { # NAME FLAGS...: an encoder that is not a row of the paper
  local name=$1
  shift
  $TORCHRUN "$CODE/train_encoder.py" "${SHAPE[@]}" --steps $STEPS "$@" --out "$name.pt" --resume
  python "$CODE/eval.py" "$name.pt" --task loss --out results.jsonl
}

second() { # NAME FLAGS...: the same for a seq2seq model
  local name=$1
  shift
  $TORCHRUN "$CODE/train_seq2seq.py" "${SHAPE[@]}" --steps $SECOND --noise drop "$@" --out "$name.pt" --resume
  python "$CODE/eval.py" "$name.pt" --task loss --out results.jsonl
}

score() { # TASK CHECKPOINT: the scores go to results.jsonl when all are there
  local more=
  case $1 in parse | summ) more=--cut ;; esac # eval.py says how many targets are longer than the rows of this scale
  case $SCALE/$1 in # chosen on the English dev set from 3e-4, 1e-3, 3e-3 (some also 1e-2); summ: that of parse
  mini/pos | mini/nli) more+=" --lr 1e-3" ;;
  mini/*) more+=" --lr 3e-3" ;;
  midi/*) more+=" --lr 1e-3" ;;
  esac
  rm -f part.jsonl
  python "$CODE/eval.py" "$2" --task $1 --data "$TASKS/${1/pos/udpos}" --train-lang $TRAIN_LANG --langs ${TESTED[$1]} \
    $HOW $more --out part.jsonl
  cat part.jsonl >> results.jsonl
}

scores() { # encoder|seq2seq CHECKPOINT...: the tasks of this kind that there is data for
  local checkpoint task name tasks="pos ner slots nli"
  [ $1 = encoder ] || tasks="parse summ"
  shift
  for checkpoint in "$@"; do
    for task in $tasks; do
      name=${checkpoint#../}
      [ -z "${TESTED[$task]}" ] || job $task.${name/\//.} 5 score $task $checkpoint.pt
    done
  done
}

random() { # the encoder before its first update: the least that any other must beat
  $TORCHRUN "$CODE/train_encoder.py" "${SHAPE[@]}" "${MLM[@]}" --steps 0 --out random.pt --resume
}

claim() { # [SEED]: the rows of the claim and their scores
  local at=${1:+../$SCALE-seed$1/} seed=${1:+.seed$1}
  job roberta-12e$seed 20 row roberta-12e ${1:-}
  job bart-12e12d$seed 75 row bart-12e12d ${1:-}
  job bart-12e12d+mlm$seed 4 row bart-12e12d+mlm ${1:-}
  job 2stage-bart-12e12d-unfrz$seed 40 row 2stage-bart-12e12d-unfrz ${1:-}
  job 2stage-bart-12e12d$seed 35 row 2stage-bart-12e12d ${1:-}
  scores encoder ${at}roberta-12e ${at}bart-12e12d ${at}bart-12e12d+mlm
  scores seq2seq ${at}bart-12e12d ${at}2stage-bart-12e12d-unfrz ${at}2stage-bart-12e12d
}

jobs() { # a cost of 1 is about 100 MLM updates on a CPU
  local at name part how
  claim
  job random 1 random
  scores encoder random
  claim 1
  claim 2
  for at in 0 0.25 0.57 0.75; do
    job unfreeze-at-$at 40 second unfreeze-at-$at --init roberta-12e.pt --unfreeze-at $at
    scores seq2seq unfreeze-at-$at
  done
  # A cheaper way to both models? Shorter second stages, beside both models from scratch that are as short.
  # --steps comes last and wins.
  for part in 2 4 8; do
    job scratch-$part $((75 / part)) second scratch-$part --steps $((STEPS / part))
    for how in "" init-decoder; do
      name=stage2-$part${how:+-$how}
      job $name $((60 / part)) \
        second $name --init roberta-12e.pt --unfreeze-at 0.5 ${how:+--$how} --steps $((STEPS / part))
      scores seq2seq $name
    done
  done
  # Masks of the paper, and the second stage around that encoder.
  job masks-15 20 first masks-15 --mask-prob 0.15
  job masks-15-unfrz 40 second masks-15-unfrz --init masks-15.pt --unfreeze-at 0.5
  scores encoder masks-15
  scores seq2seq masks-15-unfrz
  for name in bart-12e12d-mask bart-12e2d bart-12e2d-mask bart-12e1d-mask; do
    job $name 60 row $name
    job $name+mlm 4 row $name+mlm
    scores encoder $name $name+mlm
    scores seq2seq $name
  done
  job 2stage-bart-12e12d-attn-f 35 row 2stage-bart-12e12d-attn-f
  job t5-12e12d 50 row t5-12e12d
  job 2stage-t5-12e12d-unfrz 30 row 2stage-t5-12e12d-unfrz
  job 2stage-bart-12e12d-unfrz-clm 40 row 2stage-bart-12e12d-unfrz-clm
  scores seq2seq 2stage-bart-12e12d-attn-f t5-12e12d 2stage-t5-12e12d-unfrz 2stage-bart-12e12d-unfrz-clm
}

left=0 n_left=0
if [ "$mode" = --plan ]; then
  jobs
  echo "$n_left jobs left, $(duration)"
else
  mode=count && jobs
  mode=run && jobs
  echo "all done: python recipes/report.py runs/$SCALE*/results.jsonl --out OUT"
fi
