#!/usr/bin/env bash
# A smaller decoder and one <mask> in place of each span.
. "$(dirname "$0")/scale.sh"
$TORCHRUN "$CODE/train_seq2seq.py" "${SHAPE[@]}" \
  --steps $STEPS --noise mask --decoder-layers 2 --out bart-12e2d-mask.pt "$@"
python "$CODE/eval.py" bart-12e2d-mask.pt --task loss --out results.jsonl
python "$CODE/eval.py" bart-12e2d-mask.pt --task cost
