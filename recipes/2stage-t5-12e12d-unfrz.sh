#!/usr/bin/env bash
# Beyond the paper: Recipe 2 with T5's span corruption. Does it match t5-12e12d?
. "$(dirname "$0")/scale.sh"
after roberta-12e
$TORCHRUN "$CODE/train_seq2seq.py" "${SHAPE[@]}" \
  --init roberta-12e.pt --steps $SECOND --noise sentinel --unfreeze-at 0.5 --out 2stage-t5-12e12d-unfrz.pt "$@"
python "$CODE/eval.py" 2stage-t5-12e12d-unfrz.pt --task loss --out results.jsonl
python "$CODE/eval.py" 2stage-t5-12e12d-unfrz.pt --task cost
