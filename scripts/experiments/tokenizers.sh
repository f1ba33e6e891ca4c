#!/usr/bin/env bash
# Tokenizers with and without the perceptual and the adversarial loss, on Fashion-MNIST (32 px, downsample 2 and 4) and on
# emoji (64 px, downsample 4): PSNR, SSIM, codes in use, the distance of the reconstructions in a classifier's features, and
# a picture each. Run it again and it continues where it stopped. On two CPU cores it takes about two hours; a part of it:
#   SETS="fashion-4 emoji-4" VARIANTS="plain perceptual" bash scripts/experiments/tokenizers.sh
#   EXPERIMENT_SMOKE=1  the same on a slice of the data, to see that it works
#   RUN=FOLDER          where to put everything (default runs/tokenizers)
set -euo pipefail
source "$(dirname "$0")/stages.sh"

SETS="${SETS:-fashion-2 fashion-4 emoji-4}"
# `plain-longer` has twice the epochs: the others take up to twice the time of `plain`.
VARIANTS="${VARIANTS:-plain plain-longer perceptual adversarial both}"
if [ -n "${EXPERIMENT_SMOKE:-}" ]; then
    LIMIT=(--limit 30) CLASSIFIER_EPOCHS=2 FASHION_EPOCHS=1 EMOJI_EPOCHS=1
else
    LIMIT=() CLASSIFIER_EPOCHS=3 FASHION_EPOCHS=1 EMOJI_EPOCHS=30
fi

# emoji FOLDER: FOLDER/train and FOLDER/test, every tenth picture of each group to test with
emoji() {
    "$PYTHON" -m dataset.emoji "$1/all" --size 64
    rm -rf "$1/train" "$1/test"
    local file to split n=0
    for file in "$1"/all/*/*; do
        split=train
        if [ $((n++ % 10)) -eq 9 ]; then split=test; fi
        to="$1/$split/$(basename "$(dirname "$file")")"
        mkdir -p "$to"
        ln "$file" "$to/"
    done
}

# images NAME SIZE COMMAND...: data, and two classifiers of it, which differ in their seed: one for the perceptual loss, one
# that judges all reconstructions, and that no tokenizer was trained with
images() {
    local name="$1" size="$2" network seed=0; shift 2
    chain=
    stage "$name-data" "$@"
    for network in classifier judge; do
        stage "$name-$network" bash scripts/evaluations/train_classifier.sh --data-path "$RUN/$name/train" \
            --val-path "$RUN/$name/test" --image-size "$size" --name "$name-$network" --out "$RUN/$name-$network.pt2" \
            --global-batch-size 64 --epochs "$CLASSIFIER_EPOCHS" --global-seed "$((seed++))"
    done
}

# tokenizer SET VARIANT DATA SIZE PRESET BATCH EPOCHS FLAG...: train it, reconstruct the test images, measure
tokenizer() {
    local set="$1" variant="$2" data="$3" size="$4" model="$5" batch="$6" epochs="$7"; shift 7
    local out="$RUN/$set-$variant" extra=()
    case "$variant" in
        plain-longer) epochs=$((2 * epochs)) ;;
        perceptual | both) extra+=(--perceptual-network "$RUN/$data-classifier.pt2") ;;
    esac
    case "$variant" in adversarial | both) extra+=(--disc-weight 0.1) ;; esac
    chain="$data"
    stage "$set-$variant-train" bash scripts/tokenizer/train_vq.sh --data-path "$RUN/$data/train" --vq-model "$model" \
        --image-size "$size" --global-batch-size "$batch" --epochs "$epochs" --results-dir "$out" --log-every 25 \
        --ckpt-every 500 --no-flip "$@" "${extra[@]}"
    stage "$set-$variant-reconstruct" bash scripts/tokenizer/reconstruct_vq.sh --data-path "$RUN/$data/test" \
        --vq-ckpt "$out/vq.pt" --image-size "$size" --out "$out.npz"
    stage "$set-$variant-evaluate" "$PYTHON" evaluations/c2i/evaluator.py "$out-reference.npz" "$out.npz" \
        --network "$RUN/$data-judge.pt2"
}

install
case "$SETS" in *fashion*)
    images fashion 32 "$PYTHON" -m dataset.fashion_mnist "$RUN/fashion" "${LIMIT[@]}" ;;
esac
case "$SETS" in *emoji*)
    images emoji 64 emoji "$RUN/emoji" ;;
esac
for set in $SETS; do
    for variant in $VARIANTS; do
        case "$set" in
            fashion-2) tokenizer "$set" "$variant" fashion 32 VQ-2-small 64 "$FASHION_EPOCHS" --lr 6e-3 --restart-dead-codes 25 ;;
            fashion-4) tokenizer "$set" "$variant" fashion 32 VQ-4-small 64 "$FASHION_EPOCHS" --lr 6e-3 --restart-dead-codes 25 ;;
            emoji-4) tokenizer "$set" "$variant" emoji 64 VQ-4-small 32 "$EMOJI_EPOCHS" ;;
            *) echo "error: there is no set $set; choose from fashion-2, fashion-4, emoji-4" >&2; exit 2 ;;
        esac
    done
done
"$PYTHON" -m scripts.experiments.tokenizers_report "$RUN"
