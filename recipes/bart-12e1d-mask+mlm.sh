#!/usr/bin/env bash
# Recipe 1 on the model with the smallest decoder.
. "$(dirname "$0")/scale.sh"
after bart-12e1d-mask
rm -f bart-12e1d-mask+enc.pt # left by a stopped run
python "$CODE/extract.py" bart-12e1d-mask.pt --out bart-12e1d-mask+enc.pt
$TORCHRUN "$CODE/train_encoder.py" "${SHAPE[@]}" "${MLM[@]}" \
  --init bart-12e1d-mask+enc.pt --steps $MORE --out bart-12e1d-mask+mlm.pt "$@"
python "$CODE/eval.py" bart-12e1d-mask+mlm.pt --task loss --out results.jsonl
