#!/usr/bin/env bash
# Reproduce the figures of the README: see script/study/reproduce.py.
source "$(dirname "$0")/environment.sh" requirements.txt
exec "$PYTHON" -m script.study.reproduce "$@"
