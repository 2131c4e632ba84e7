#!/usr/bin/env bash
# Full fine-tuning, start to finish: train, choose the best epoch, evaluate, predict.
# Appended flags of main.py override those here; paths are relative to the project's root:
#     bash script/run_og.sh --num_train_epochs 2 --model_name_or_path bert-base-cased
[[ " $* " =~ \ (-h|--help)\  ]] && python3 "$(dirname "$0")/../main.py" --help 2>/dev/null && exit
source "$(dirname "$0")/environment.sh" requirements.txt
source script/data.sh "$@"
exec "$PYTHON" main.py --do_train --do_eval --do_predict \
    --output_dir checkpoints/og --overwrite_output_dir "$@" ${DATA[@]+"${DATA[@]}"}
