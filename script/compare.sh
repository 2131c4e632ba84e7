#!/usr/bin/env bash
# Run the study: compare baselines and all tuning methods; see script/study/compare.py.
source "$(dirname "$0")/environment.sh" requirements.txt
[[ " $* " == *" --original "* && " $* " == *" --unseen "* ]] || source script/data.sh
exec "$PYTHON" -m script.study.compare "$@"
