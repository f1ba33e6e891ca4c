#!/usr/bin/env bash
# A web page on which to draw images; flags: --help. One process.
set -euo pipefail
source "$(dirname "$0")/env.sh"
NPROC_PER_NODE=1 exec "$PYTHON" "$ROOT/utils/launch.py" "$ROOT/autoregressive/sample/demo.py" "$@"
