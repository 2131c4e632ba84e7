# Sourced by the run scripts, with their arguments: sets DATA to the flags that name the split
# files. csv/ has them, or the arguments do, or else the synthetic sample stands in, loudly.

DATA=()
if [[ ! -e csv/train_simple.csv && " $*" != *" --train_file"* ]]; then
    if [[ " $*" == *" --validation_file"* || " $*" == *" --test_file"* ]]; then
        echo "error: csv/train_simple.csv is not there: give --train_file, too" >&2
        exit 2
    fi
    cat >&2 <<'EOF'
################################################################################
# csv/train_simple.csv is not there: using the SYNTHETIC SAMPLE in csv/sample. #
# Its texts are made up; its figures say nothing about real videos.            #
################################################################################
EOF
    DATA=(
        --train_file csv/sample/train_simple.csv
        --validation_file csv/sample/val_simple.csv
        --test_file csv/sample/test_simple.csv
    )
fi
