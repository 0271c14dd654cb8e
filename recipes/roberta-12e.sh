#!/usr/bin/env bash
# The encoder to beat: masked language modelling from scratch. The 2stage rows build on it.
. "$(dirname "$0")/scale.sh"
$TORCHRUN "$CODE/train_encoder.py" "${SHAPE[@]}" "${MLM[@]}" \
  --steps $STEPS --out roberta-12e.pt "$@"
python "$CODE/eval.py" roberta-12e.pt --task loss --out results.jsonl
python "$CODE/eval.py" roberta-12e.pt --task cost
