#!/usr/bin/env bash
# Recipe 2: frozen at first, unfrozen part-way. Does it match bart-12e12d, for less?
. "$(dirname "$0")/scale.sh"
after roberta-12e
$TORCHRUN "$CODE/train_seq2seq.py" "${SHAPE[@]}" \
  --init roberta-12e.pt --steps $SECOND --noise drop --unfreeze-at 0.5 --out 2stage-bart-12e12d-unfrz.pt "$@"
python "$CODE/eval.py" 2stage-bart-12e12d-unfrz.pt --task loss --out results.jsonl
python "$CODE/eval.py" 2stage-bart-12e12d-unfrz.pt --task cost
