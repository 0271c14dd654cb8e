#!/usr/bin/env bash
# Beyond the paper: T5's span corruption from scratch. Spans become sentinels, the decoder writes only the spans.
. "$(dirname "$0")/scale.sh"
$TORCHRUN "$CODE/train_seq2seq.py" "${SHAPE[@]}" \
  --steps $STEPS --noise sentinel --out t5-12e12d.pt "$@"
python "$CODE/eval.py" t5-12e12d.pt --task loss --out results.jsonl
python "$CODE/eval.py" t5-12e12d.pt --task cost
