#!/usr/bin/env bash
# Train a tokenizer on an ImageFolder by LlamaGen's recipe, or a small one; flags: --help.
# Processes: NPROC_PER_NODE (default: the GPUs), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
set -euo pipefail
source "$(dirname "$0")/../env.sh"
exec "$PYTHON" "$ROOT/utils/launch.py" "$ROOT/tokenizer/tokenizer_image/vq_train.py" "$@"
