#!/usr/bin/env bash
# Reconstruct an ImageFolder into an .npz, with PSNR, SSIM and a picture; flags: --help.
# Processes: NPROC_PER_NODE (default: the GPUs), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
set -euo pipefail
source "$(dirname "$0")/../env.sh"
exec "$PYTHON" "$ROOT/utils/launch.py" "$ROOT/tokenizer/tokenizer_image/reconstruction_vq_ddp.py" "$@"
