#!/usr/bin/env bash
# Measures speed on this machine, ours and others in turn; see script/benchmark.py.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt script/requirements.txt
source script/data.sh "$@"

exec "$PYTHON" -m script.benchmark "$@"
