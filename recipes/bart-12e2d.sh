#!/usr/bin/env bash
# Does a smaller decoder leave more to the encoder? 2 layers instead of 12.
. "$(dirname "$0")/scale.sh"
$TORCHRUN "$CODE/train_seq2seq.py" "${SHAPE[@]}" \
  --steps $STEPS --noise drop --decoder-layers 2 --out bart-12e2d.pt "$@"
python "$CODE/eval.py" bart-12e2d.pt --task loss --out results.jsonl
python "$CODE/eval.py" bart-12e2d.pt --task cost
