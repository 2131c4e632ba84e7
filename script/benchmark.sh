#!/usr/bin/env bash
# Compare this project's speed with other libraries on this machine; see script/benchmark/benchmark.py.
if [[ " $* " == *" --help "* ]]; then # needs no rivals
    source "$(dirname "$0")/environment.sh" requirements.txt
else
    source "$(dirname "$0")/environment.sh" requirements.txt script/requirements.txt \
        script/requirements-export.txt
    source script/data.sh "$@"
fi
exec "$PYTHON" -m script.benchmark.benchmark "$@"
