#!/usr/bin/env bash
# Lint and test everything: `bash scripts/test.sh`, or with arguments of pytest. Sets up what it needs.
set -euo pipefail
source "$(dirname "$0")/env.sh"
cd "$ROOT"
install -r requirements-dev.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -c "from importlinter.cli import lint_imports_command as lint; lint()" --no-cache
# A process a core, one thread each: most tests are small.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest --numprocesses auto --dist worksteal "$@"
