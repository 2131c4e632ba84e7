#!/usr/bin/env bash
# Prefix tuning in every layer, start to finish: train, choose the best epoch, evaluate, predict.
# Appended flags of main.py override those here; paths are relative to the project's root:
#     bash script/run_prefix.sh --pre_seq_len 16 --prefix_projection
[[ " $* " =~ \ (-h|--help)\  ]] && python3 "$(dirname "$0")/../main.py" --help 2>/dev/null && exit
source "$(dirname "$0")/environment.sh" requirements.txt
source script/data.sh "$@"
exec "$PYTHON" main.py --prefix --do_train --do_eval --do_predict \
    --output_dir checkpoints/prefix --overwrite_output_dir "$@" ${DATA[@]+"${DATA[@]}"}
