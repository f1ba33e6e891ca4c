#!/usr/bin/env bash
# From a fresh machine to generated images: the pipeline (scripts/pipeline.sh) on Fashion-MNIST, with fixed choices.
# Run it again and it continues where it stopped.
#   QUICKSTART_SMOKE=1  the same on a slice of the data, in about two minutes
#   RUN=FOLDER          where to put everything (default runs/quickstart)
set -euo pipefail
source "$(dirname "$0")/env.sh"
RUN="$(realpath -m "${RUN:-$ROOT/runs/quickstart${QUICKSTART_SMOKE:+-smoke}}")"

if [ -n "${QUICKSTART_SMOKE:-}" ]; then
    DATA=(--limit 120)  NUMBERS=(--reference-images 1000 --test-images 200 --samples 200)
    CLASSIFIER="--epochs 8"  TOKENIZER="--epochs 5"
    GPT="--epochs 6 --val-images 200 --val-every 10 --ema-decay 0.9"
else
    DATA=()             NUMBERS=(--reference-images 10000 --test-images 5000 --samples 5000)
    CLASSIFIER="--epochs 3"  TOKENIZER="--epochs 1"
    GPT="--epochs 2 --val-images 1000 --val-every 180 --ema-decay 0.99"
fi

install
"$PYTHON" -m dataset.fashion_mnist "$RUN/images" "${DATA[@]}"
exec "$PYTHON" -m scripts.pipeline --images "$RUN/images" --run "$RUN" --name fashion --image-size 32 --no-flip --batch-size 64 \
    --cfg-scale 2.0 "${NUMBERS[@]}" --tokenizer train --vq-model VQ-4-small --gpt-model GPT-XXS --patch-level 2 \
    --classifier-flags="--name fashion-mnist-classifier --global-batch-size 128 $CLASSIFIER" \
    --tokenizer-flags="--lr 6e-3 --restart-dead-codes 25 --ckpt-every 500 --ema-decay 0.999 $TOKENIZER" \
    --gpt-flags="--epoch-rate 0.5 --warmup-epochs 0.1 --decay-ratio 0.4 --lr 3e-3 --end-lr 1e-5 --dropout-p 0 \
        --token-dropout-p 0 --log-every 25 --ckpt-every 500 --sample-every 1 $GPT" \
    --sample-flags="--per-proc-batch-size 500"
