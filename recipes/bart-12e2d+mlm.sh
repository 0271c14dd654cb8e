#!/usr/bin/env bash
# Recipe 1 on the model with the smaller decoder.
. "$(dirname "$0")/scale.sh"
after bart-12e2d
rm -f bart-12e2d+enc.pt # left by a stopped run
python "$CODE/extract.py" bart-12e2d.pt --out bart-12e2d+enc.pt
$TORCHRUN "$CODE/train_encoder.py" "${SHAPE[@]}" "${MLM[@]}" \
  --init bart-12e2d+enc.pt --steps $MORE --out bart-12e2d+mlm.pt "$@"
python "$CODE/eval.py" bart-12e2d+mlm.pt --task loss --out results.jsonl
