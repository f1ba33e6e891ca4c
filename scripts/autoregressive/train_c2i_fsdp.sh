#!/usr/bin/env bash
# Train a GPT whose weights are sharded over processes (FSDP2): train_c2i.sh with --data-parallel fsdp.
set -euo pipefail
exec bash "$(dirname "$0")/train_c2i.sh" --data-parallel fsdp "$@"
