#!/usr/bin/env bash
# Predict a folder of CSV or Parquet files on many cores or machines; see script/predict_ray.py:
#     bash script/predict_ray.sh checkpoints/og texts/ --output_dir predictions/
source "$(dirname "$0")/environment.sh" requirements.txt script/requirements-ray.txt
exec "$PYTHON" -m script.predict_ray "$@"
