#!/usr/bin/env bash
# The seq2seq model to beat: de-noising from scratch, spans dropped without a trace.
. "$(dirname "$0")/scale.sh"
$TORCHRUN "$CODE/train_seq2seq.py" "${SHAPE[@]}" \
  --steps $STEPS --noise drop --out bart-12e12d.pt "$@"
python "$CODE/eval.py" bart-12e12d.pt --task loss --out results.jsonl
python "$CODE/eval.py" bart-12e12d.pt --task cost
