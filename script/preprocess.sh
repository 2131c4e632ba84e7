#!/usr/bin/env bash
# Turn the raw file into split files: run preprocessing.ipynb and print a table of both protocols.
#     bash script/preprocess.sh -p text_columns title,tags -p cleaning none -p group_by channel
source "$(dirname "$0")/environment.sh" requirements.txt
exec "$PYTHON" -m script.preprocess "$@"
