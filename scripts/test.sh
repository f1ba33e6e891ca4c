#!/usr/bin/env bash
# Lint and test everything: `bash scripts/test.sh`, or with arguments of pytest. Sets up what it needs.
set -euo pipefail
source "$(dirname "$0")/env.sh"
install
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
