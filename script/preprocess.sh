#!/usr/bin/env bash
# Raw file to split files: runs preprocessing.ipynb and ends with the table of both protocols.
#     bash script/preprocess.sh -p text_columns title,tags -p cleaning none -p group_by channel
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt

exec "$PYTHON" -m script.preprocess "$@"
