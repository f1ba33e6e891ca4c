#!/usr/bin/env bash
# Train a small classifier of an ImageFolder for the evaluator's --network; flags: --help. One process.
set -euo pipefail
source "$(dirname "$0")/../env.sh"
exec "$PYTHON" evaluations/c2i/train_classifier.py "$@"
