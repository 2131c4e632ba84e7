#!/usr/bin/env bash
# The study: baselines and all tuning methods, side by side; see script/compare.py.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt
[[ " $* " == *" --original "* && " $* " == *" --unseen "* ]] || source script/data.sh

exec "$PYTHON" -m script.compare "$@"
