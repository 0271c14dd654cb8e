#!/usr/bin/env bash
# Does other masking make a better encoder? One <mask> in place of each span.
. "$(dirname "$0")/scale.sh"
$TORCHRUN "$CODE/train_seq2seq.py" "${SHAPE[@]}" \
  --steps $STEPS --noise mask --out bart-12e12d-mask.pt "$@"
python "$CODE/eval.py" bart-12e12d-mask.pt --task loss --out results.jsonl
python "$CODE/eval.py" bart-12e12d-mask.pt --task cost
