#!/usr/bin/env bash
# Write a tuned model as ONNX, for onnxruntime, OpenVINO and others; see script/export.py:
#     bash script/export.sh checkpoints/prefix
source "$(dirname "$0")/environment.sh" requirements.txt script/requirements-export.txt
exec "$PYTHON" -m script.export "$@"
