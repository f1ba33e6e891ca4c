#!/usr/bin/env bash
# Does Next Patch Prediction hold? Next-token training with the same learning-rate decay beside it, which is the control that
# the paper lacks, and other arms; on Fashion-MNIST, with one tokenizer, one GPT, the same data in the same order, several
# seeds. It writes RUN/report.md. Run it again and it continues where it stopped. On two CPU cores it takes about an hour.
#   ARMS="npp2 ntp" SEEDS="0 1"     a part of it; the arms are listed in npp_vs_ntp_report.py
#   EPOCHS=8 SAMPLES=10000          longer, and with more samples (2 and 5000)
#   EXPERIMENT_SMOKE=1              all arms on a slice of the data, in about two minutes
#   RUN=FOLDER                      where to put everything (default runs/npp_vs_ntp)
set -euo pipefail
source "$(dirname "$0")/stages.sh"

ARMS="${ARMS:-ntp npp2 npp3 npp2-67 ntp-compute ntp-constant ntp-half}"
EPOCHS="${EPOCHS:-2}" SCALES="${SCALES:-1.25 1.5 2.0}"
if [ -n "${EXPERIMENT_SMOKE:-}" ]; then
    SEEDS="${SEEDS:-0}" SAMPLES="${SAMPLES:-200}"
    LIMIT=(--limit 120) TEST_IMAGES=500 CLASSIFIER="--epochs 8" TOKENIZER="--epochs 5" VALIDATION="--val-images 200 --val-every 6"
else
    SEEDS="${SEEDS:-0 1 2}" SAMPLES="${SAMPLES:-5000}"
    LIMIT=() TEST_IMAGES=10000 CLASSIFIER="--epochs 3" TOKENIZER="--epochs 1" VALIDATION="--val-images 2000 --val-every 150"
fi

# times SHARE...: these shares of the epochs
times() {
    local share
    for share in "$@"; do awk "BEGIN { printf \"%g \", $share * $EPOCHS }"; done
}

# levels ARM: the flags that make an arm what it is
levels() {
    case "$1" in
        ntp) echo "--scheduler --patch-sizes 1 --patch-epochs $(times 1)" ;;
        ntp-constant) echo "--patch-sizes 1 --patch-epochs $(times 1)" ;;
        ntp-compute) echo "--scheduler --patch-sizes 1 --patch-epochs $(times .625)" ;;
        ntp-half) echo "--scheduler --patch-sizes 1 --patch-epochs $(times .5)" ;;
        ntp-restart) echo "--scheduler --patch-sizes 1 1 --patch-epochs $(times .5 .5)" ;;
        npp2) echo "--scheduler --patch-sizes 2 1 --patch-epochs $(times .5 .5)" ;;
        npp3) echo "--scheduler --patch-sizes 4 2 1 --patch-epochs $(times .25 .25 .5)" ;;
        npp2-67) echo "--scheduler --patch-sizes 2 1 --patch-epochs $(times .67 .33)" ;;
        *) echo "error: there is no arm $1" >&2; return 2 ;;
    esac
}

# shared: the data, the feature network, the tokenizer and the codes of all arms
shared() {
    stage data "$PYTHON" -m dataset.fashion_mnist "$RUN/images" "${LIMIT[@]}"
    stage reference "$PYTHON" -m evaluations.c2i.reference "$RUN/images/test" "$RUN/test.npz" --image-size 32 \
        --num-images "$TEST_IMAGES"
    stage classifier bash scripts/evaluations/train_classifier.sh --data-path "$RUN/images/train" --val-path "$RUN/images/test" \
        --image-size 32 --name fashion-mnist-classifier --out "$RUN/classifier.pt2" --global-batch-size 128 $CLASSIFIER
    stage tokenizer bash scripts/tokenizer/train_vq.sh --data-path "$RUN/images/train" --vq-model VQ-4-small --image-size 32 \
        --global-batch-size 64 --lr 6e-3 --restart-dead-codes 25 --ema-decay 0.999 --no-flip --results-dir "$RUN/tokenizer" $TOKENIZER
    local part
    for part in train test; do
        stage "codes-$part" bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt "$RUN/tokenizer/vq.pt" --no-flip \
            --dataset fashion --data-path "$RUN/images/$part" --code-path "$RUN/codes/$part" --image-size 32
    done
    stage reconstruct bash scripts/tokenizer/reconstruct_vq.sh --data-path "$RUN/images/test" --vq-ckpt "$RUN/tokenizer/vq.pt" \
        --image-size 32 --num-images "$SAMPLES" --out "$RUN/reconstructions.npz"
    stage reconstruct-evaluate "$PYTHON" evaluations/c2i/evaluator.py "$RUN/test.npz" "$RUN/reconstructions.npz" \
        --network "$RUN/classifier.pt2"
}

# arm ARM SEED: train it, draw images at every guidance scale, measure them
arm() {
    local out="$RUN/arms/$1-$2" flags; flags="$(levels "$1")"
    stage "$1-$2-train" bash scripts/autoregressive/train_c2i.sh --code-path "$RUN/codes/train" --val-code-path "$RUN/codes/test" \
        --dataset fashion --image-size 32 --gpt-model GPT-XXS --global-batch-size 64 --global-seed "$2" --results-dir "$out" \
        --lr 3e-3 --end-lr 1e-5 --warmup-epochs 0.1 --decay-ratio 0.4 --dropout-p 0 --token-dropout-p 0 --log-every 25 \
        --ckpt-every 1000 $VALIDATION $flags
    local checkpoints=("$out"/000-GPT-XXS/checkpoints/*.pt)
    stage "$1-$2-sample" bash scripts/autoregressive/sample_c2i.sh --vq-ckpt "$RUN/tokenizer/vq.pt" \
        --gpt-ckpt "${checkpoints[-1]}" --image-size 32 --cfg-scale $SCALES --labels balanced --global-seed "$2" \
        --num-fid-samples "$SAMPLES" --per-proc-batch-size 500 --sample-dir "$out/samples"
    stage "$1-$2-evaluate" "$PYTHON" evaluations/c2i/evaluator.py "$RUN/test.npz" "$out"/samples/*.npz \
        --network "$RUN/classifier.pt2"
}

for one in $ARMS; do levels "$one" > /dev/null; done
settings="$EPOCHS epochs, $SAMPLES samples, guidance $SCALES"
if [ "$(cat "$RUN/settings.txt" 2> /dev/null || echo "$settings")" != "$settings" ]; then
    echo "error: $RUN holds the experiment of $(cat "$RUN/settings.txt"), not of $settings: give another RUN" >&2
    exit 2
fi
echo "$settings" > "$RUN/settings.txt"
install
shared
trunk="$chain"
for seed in $SEEDS; do
    for one in $ARMS; do
        chain="$trunk"
        arm "$one" "$seed"
    done
done
"$PYTHON" -m scripts.experiments.npp_vs_ntp_report "$RUN"
