# Read by every recipe: what SCALE=demo|mini|midi|gpu|paper means. Nothing else differs between the scales.
#
#   recipes/roberta-12e.sh                                  # the embedded corpus, 400 updates, minutes on a laptop
#   SCALE=mini DATA=DATA recipes/roberta-12e.sh             # a data folder of data.py, 2,000 updates
#   SCALE=mini DATA=DATA SEED=1 recipes/roberta-12e.sh      # again, with other random numbers
#   SCALE=paper DATA=DATA TORCHRUN="torchrun --nproc-per-node 8" recipes/roberta-12e.sh
#
# Models go to runs/$SCALE, those of another seed to runs/$SCALE-seed$SEED. Flags given to a recipe go to its
# training command, after its own: --steps 0 writes the initialised model, --resume continues.
set -eu
unset CDPATH # with it, cd prints where it went

# Updates from scratch, in the second stage (0.7 of them) and in the MLM continuation (1/5 of them).
MLM=() # flags of train_encoder.py only
case ${SCALE:=demo} in
demo)
  SHAPE=(--preset micro --batch-size 32 --seq-len 64)
  STEPS=400 SECOND=280 MORE=80 ;;
mini) # 4M tokens a model from scratch
  SHAPE=(--preset micro --batch-size 16 --seq-len 128)
  STEPS=2000 SECOND=1400 MORE=400 ;;
midi) # 8M tokens a model from scratch, 2 minutes on an H200 beside 15 other runs
  SHAPE=(--preset tiny --batch-size 32 --seq-len 128)
  STEPS=2000 SECOND=1400 MORE=400 ;;
gpu) # 100M tokens a model from scratch; at 3.9e14 FLOPs a second under 6 minutes each, by formula; not run yet
  SHAPE=(--preset base --batch-size 64 --seq-len 512 --compile)
  STEPS=3000 SECOND=2100 MORE=600 ;;
paper) # 1M tokens a batch, and only AdamW, one rate for all
  SHAPE=(--preset paper --batch-size 2048 --micro-batch-size 32 --seq-len 512 --save-every 2000 --eval-every 10000)
  SHAPE+=(--optimizer adamw --lr 5e-4 --embed-lr 5e-4) MLM=(--mask-prob 0.15)
  STEPS=500000 SECOND=350000 MORE=100000 ;;
*) echo "SCALE=$SCALE: it must be demo, mini, midi, gpu or paper" >&2 && exit 2 ;;
esac
SHAPE+=(--schedule linear) # the paper's; the results were measured with it
if [ "$SCALE" != demo ] && [ -z "${DATA:-}" ]; then
  echo "SCALE=$SCALE: name a data folder made by data.py, as DATA=FOLDER" >&2 && exit 2
fi
if [ -n "${DATA:-}" ]; then
  [ -d "$DATA" ] || { echo "DATA=$DATA: no such folder; make it with data.py" >&2 && exit 2; }
  DATA=$(cd "$DATA" && pwd)
  SHAPE=(--data "$DATA" "${SHAPE[@]}")
fi
SEED=${SEED:-0}
RUNS=$SCALE
if [ "$SEED" != 0 ]; then
  SHAPE+=(--seed "$SEED") RUNS=$SCALE-seed$SEED
fi
TORCHRUN=${TORCHRUN:-torchrun}
CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$CODE/runs/$RUNS" && cd "$CODE/runs/$RUNS"

after() { # the recipe that this one builds on
  [ -e "$1.pt" ] || { echo "runs/$RUNS/$1.pt: not there yet; run recipes/$1.sh first" >&2 && exit 2; }
}
