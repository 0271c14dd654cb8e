#!/usr/bin/env bash
# The smallest decoder, 1 layer instead of 12, and one <mask> in place of each span.
. "$(dirname "$0")/scale.sh"
$TORCHRUN "$CODE/train_seq2seq.py" "${SHAPE[@]}" \
  --steps $STEPS --noise mask --decoder-layers 1 --out bart-12e1d-mask.pt "$@"
python "$CODE/eval.py" bart-12e1d-mask.pt --task loss --out results.jsonl
python "$CODE/eval.py" bart-12e1d-mask.pt --task cost
