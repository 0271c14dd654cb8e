#!/usr/bin/env bash
# Recipe 1: does a short MLM continuation make the seq2seq model's encoder as good as roberta-12e?
. "$(dirname "$0")/scale.sh"
after bart-12e12d
rm -f bart-12e12d+enc.pt # left by a stopped run
python "$CODE/extract.py" bart-12e12d.pt --out bart-12e12d+enc.pt
$TORCHRUN "$CODE/train_encoder.py" "${SHAPE[@]}" "${MLM[@]}" \
  --init bart-12e12d+enc.pt --steps $MORE --out bart-12e12d+mlm.pt "$@"
python "$CODE/eval.py" bart-12e12d+mlm.pt --task loss --out results.jsonl
