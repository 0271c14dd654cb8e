#!/usr/bin/env bash
# Recipe 2, frozen: is a decoder around the finished encoder enough?
. "$(dirname "$0")/scale.sh"
after roberta-12e
$TORCHRUN "$CODE/train_seq2seq.py" "${SHAPE[@]}" \
  --init roberta-12e.pt --steps $SECOND --noise drop --unfreeze-at 1 --out 2stage-bart-12e12d.pt "$@"
python "$CODE/eval.py" 2stage-bart-12e12d.pt --task loss --out results.jsonl
python "$CODE/eval.py" 2stage-bart-12e12d.pt --task cost
