#!/usr/bin/env bash
# Beyond the paper: Recipe 2 with 20 % of the rows continued instead of repaired, as in AlexaTM 20B.
. "$(dirname "$0")/scale.sh"
after roberta-12e
$TORCHRUN "$CODE/train_seq2seq.py" "${SHAPE[@]}" \
  --init roberta-12e.pt --steps $SECOND --noise drop --unfreeze-at 0.5 --clm-fraction 0.2 \
  --out 2stage-bart-12e12d-unfrz-clm.pt "$@"
python "$CODE/eval.py" 2stage-bart-12e12d-unfrz-clm.pt --task loss --out results.jsonl
python "$CODE/eval.py" 2stage-bart-12e12d-unfrz-clm.pt --task cost
