#!/usr/bin/env bash
# Average finished runs, with weights that the validation file chooses; see script/ensemble.py:
#     bash script/ensemble.sh checkpoints/og checkpoints/prefix --output_dir checkpoints/both
source "$(dirname "$0")/environment.sh" requirements.txt
exec "$PYTHON" -m script.ensemble "$@"
