# Sourced by the run scripts with their arguments: sets DATA to the flags that name the data files.

# synthetic: was the training file in csv/ made from the sample, and is it unchanged?
synthetic() {
    "$PYTHON" -c "import sys; from runtime.file_format import read_split_record as read
sys.exit(not read('csv/train_simple.csv').get('synthetic'))"
}

DATA=()
if [[ " $*" == *" --train_file"* && " $*" != *" --validation_file"* && " $*" != *" --test_file"* ]]; then
    DATA=$("$PYTHON" -m script.split --within_run "$@") || exit
    eval "DATA=($DATA)"
elif [[ " $*" != *" --train_file"* && " $*" != *" --data"* ]]; then
    # the files in csv/: from the raw file once it exists, until then from the synthetic sample
    if [ ! -e csv/train_simple.csv ] ||
        { { [ -e csv/USvideos.csv ] || [ -e csv/USvideo.csv ]; } && synthetic; }; then
        echo "making the split files in csv/ with preprocessing.ipynb ..." >&2
        bash script/preprocess.sh >&2
    fi
    if synthetic; then
        cat >&2 <<'NOTICE'
################################################################################
# The split files come from csv/USvideos_sample.csv, a SYNTHETIC SAMPLE: its   #
# texts are made up, and results on it say nothing about real videos.          #
# bash script/get_data.sh downloads the real ones.                             #
################################################################################
NOTICE
    fi
fi
