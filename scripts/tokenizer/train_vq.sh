#!/usr/bin/env bash
# Train a tokenizer on an ImageFolder; flags: --help.
# Processes: NPROC_PER_NODE (default: the GPUs), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
set -euo pipefail
source "$(dirname "$0")/../env.sh"
exec "$PYTHON" utils/launch.py tokenizer/tokenizer_image/vq_train.py "$@"
