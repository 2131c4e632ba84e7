#!/usr/bin/env bash
# Split a CSV file of texts and labels into training, validation and test files, equal texts together.
#     bash script/split.sh mine.csv --text_column_names title,body --label_column_name topic
source "$(dirname "$0")/environment.sh" requirements.txt
exec "$PYTHON" -m script.split "$@"
