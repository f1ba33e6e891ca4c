#!/usr/bin/env bash
# Train a small classifier of an ImageFolder for the evaluator's --network; flags: --help. One process.
set -euo pipefail
source "$(dirname "$0")/../env.sh"
NPROC_PER_NODE=1 exec "$PYTHON" "$ROOT/utils/launch.py" "$ROOT/evaluations/c2i/train_classifier.py" "$@"
