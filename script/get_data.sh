#!/usr/bin/env bash
# Fetch the real data, "Trending YouTube Video Statistics" from Kaggle (CC0), into csv/.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt

exec "$PYTHON" -m script.get_data "$@"
