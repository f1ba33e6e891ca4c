#!/usr/bin/env bash
# From a folder of images to a trained model, samples, figures and a report, in one command that can be resumed; flags: --help.
set -euo pipefail
source "$(dirname "$0")/env.sh"
install
exec "$PYTHON" -m scripts.pipeline "$@"
