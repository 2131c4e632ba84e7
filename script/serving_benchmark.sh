#!/usr/bin/env bash
# Load the server and its rivals with many models; see script/benchmark/serving_benchmark.py.
source "$(dirname "$0")/environment.sh" requirements.txt script/requirements.txt \
    script/requirements-serve.txt script/requirements-load.txt
exec "$PYTHON" -m script.benchmark.serving_benchmark "$@"
