#!/usr/bin/env bash
# Recipe 2, frozen, with attention fusion: does a view of all encoder layers make up for not unfreezing?
. "$(dirname "$0")/scale.sh"
after roberta-12e
$TORCHRUN "$CODE/train_seq2seq.py" "${SHAPE[@]}" \
  --init roberta-12e.pt --steps $SECOND --noise drop --unfreeze-at 1 --fusion --out 2stage-bart-12e12d-attn-f.pt "$@"
python "$CODE/eval.py" 2stage-bart-12e12d-attn-f.pt --task loss --out results.jsonl
python "$CODE/eval.py" 2stage-bart-12e12d-attn-f.pt --task cost
