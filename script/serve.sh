#!/usr/bin/env bash
# Serve tuned models over HTTP, with a page to try them; see serving/README.md:
#     bash script/serve.sh checkpoints/a checkpoints/b
source "$(dirname "$0")/environment.sh" requirements.txt script/requirements-serve.txt
exec "$PYTHON" -m script.serve "$@"
