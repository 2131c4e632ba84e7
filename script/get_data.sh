#!/usr/bin/env bash
# Fetch the real data, "Trending YouTube Video Statistics" of Kaggle (CC0), into csv/.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt

exec "$PYTHON" script/get_data.py "$@"
