#!/usr/bin/env bash
# Recipe 1 on the model with the smaller decoder and one <mask> in place of each span.
. "$(dirname "$0")/scale.sh"
after bart-12e2d-mask
rm -f bart-12e2d-mask+enc.pt # left by a stopped run
python "$CODE/extract.py" bart-12e2d-mask.pt --out bart-12e2d-mask+enc.pt
$TORCHRUN "$CODE/train_encoder.py" "${SHAPE[@]}" "${MLM[@]}" \
  --init bart-12e2d-mask+enc.pt --steps $MORE --out bart-12e2d-mask+mlm.pt "$@"
python "$CODE/eval.py" bart-12e2d-mask+mlm.pt --task loss --out results.jsonl
