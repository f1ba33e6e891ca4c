#!/usr/bin/env bash
# From a fresh machine to generated images: environment, Fashion-MNIST, tokenizer, codes, Next Patch Prediction
# training, 5,000 samples, evaluation, report. Run it again and it continues where it stopped.
#   QUICKSTART_SMOKE=1  the same on a slice of the data, in about two minutes
#   RUN=FOLDER          where to put everything (default runs/quickstart)
set -euo pipefail
source "$(dirname "$0")/env.sh"
export PYTHON

if [ -n "${QUICKSTART_SMOKE:-}" ]; then
    RUN="${RUN:-runs/quickstart-smoke}"
    DATA=(--limit 120)            TEST_IMAGES=200  REFERENCE=1000  SAMPLES=200
    CLASSIFIER=(--epochs 8)       TOKENIZER=(--epochs 5)
    GPT=(--epochs 6 --val-images 200 --ema-decay 0.9)
else
    RUN="${RUN:-runs/quickstart}"
    DATA=()                       TEST_IMAGES=5000 REFERENCE=10000 SAMPLES=5000
    CLASSIFIER=(--epochs 3)       TOKENIZER=(--epochs 1)
    GPT=(--epochs 2 --val-images 1000 --ema-decay 0.99)
fi
CFG=2.0
mkdir -p "$RUN/done"

# stage NAME COMMAND...: run a command unless it has succeeded before; note its seconds.
stage() {
    local name="$1" start="$SECONDS"; shift
    if [ -f "$RUN/done/$name" ]; then echo "== $name: done before"; return; fi
    echo "== $name: $*"
    "$@"
    echo "$((SECONDS - start))" > "$RUN/done/$name"
}

newest_checkpoint() { ls "$RUN"/gpt/*/checkpoints/*.pt | sort | tail -n 1; }

install
stage data "$PYTHON" -m dataset.fashion_mnist "$RUN/images" "${DATA[@]}"
stage reference "$PYTHON" -m evaluations.c2i.reference "$RUN/images/train" "$RUN/reference.npz" \
    --image-size 32 --num-images "$REFERENCE"
stage test_images "$PYTHON" -m evaluations.c2i.reference "$RUN/images/test" "$RUN/test.npz" \
    --image-size 32 --num-images "$TEST_IMAGES"
stage classifier bash scripts/evaluations/train_classifier.sh --data-path "$RUN/images/train" \
    --val-path "$RUN/images/test" --image-size 32 --name fashion-mnist-classifier --out "$RUN/classifier.pt2" "${CLASSIFIER[@]}"
stage tokenizer bash scripts/tokenizer/train_vq.sh --data-path "$RUN/images/train" --vq-model VQ-4-small --image-size 32 \
    --results-dir "$RUN/tokenizer" --no-flip --global-batch-size 64 --lr 6e-3 \
    --restart-dead-codes 25 --ckpt-every 500 "${TOKENIZER[@]}"
stage reconstruct bash scripts/tokenizer/reconstruct_vq.sh --data-path "$RUN/images/test" --vq-ckpt "$RUN/tokenizer/vq.pt" \
    --image-size 32 --num-images "$TEST_IMAGES" --out "$RUN/reconstructions.npz"
stage codes bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt "$RUN/tokenizer/vq.pt" --dataset fashion \
    --data-path "$RUN/images/train" --code-path "$RUN/codes/train" --image-size 32 --no-flip
stage test_codes bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt "$RUN/tokenizer/vq.pt" --dataset fashion \
    --data-path "$RUN/images/test" --code-path "$RUN/codes/test" --image-size 32 --no-flip
stage train bash scripts/autoregressive/train_c2i.sh --code-path "$RUN/codes/train" --val-code-path "$RUN/codes/test" \
    --dataset fashion --image-size 32 --results-dir "$RUN/gpt" --gpt-model GPT-XXS --patch-level 2 --epoch-rate 0.5 \
    --scheduler --warmup-epochs 0.1 --decay-ratio 0.4 --lr 3e-3 --end-lr 1e-5 --global-batch-size 64 \
    --dropout-p 0 --token-dropout-p 0 --ema --log-every 25 --ckpt-every 500 \
    --vq-ckpt "$RUN/tokenizer/vq.pt" --sample-every 1 "${GPT[@]}"
stage sample bash scripts/autoregressive/sample_c2i.sh --vq-ckpt "$RUN/tokenizer/vq.pt" --gpt-ckpt "$(newest_checkpoint)" \
    --cfg-scale "$CFG" --labels balanced --num-fid-samples "$SAMPLES" --per-proc-batch-size 500 --sample-dir "$RUN/samples"
stage grid "$PYTHON" autoregressive/sample/sample_c2i.py --vq-ckpt "$RUN/tokenizer/vq.pt" --gpt-ckpt "$(newest_checkpoint)" \
    --cfg-scale "$CFG" --per-class 12 --scale 2 --out "$RUN/samples.png"
stage evaluate "$PYTHON" evaluations/c2i/evaluator.py "$RUN/reference.npz" "$RUN"/samples/*.npz "$RUN/reconstructions.npz" \
    "$RUN/test.npz" --network "$RUN/classifier.pt2"
"$PYTHON" scripts/quickstart_report.py "$RUN"
