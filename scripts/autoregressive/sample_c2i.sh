#!/usr/bin/env bash
# Draw images into an .npz; flags: --help.
# Processes: NPROC_PER_NODE (default: the GPUs), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
set -euo pipefail
source "$(dirname "$0")/../env.sh"
exec "$PYTHON" "$ROOT/utils/launch.py" "$ROOT/autoregressive/sample/sample_c2i_ddp.py" "$@"
