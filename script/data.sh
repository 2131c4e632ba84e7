# Sourced by the run scripts with their arguments: makes the split files in csv/ if they are
# missing, unless the arguments name other files. Without the raw file it uses the synthetic sample,
# with a loud notice; once the raw file exists, it makes them again. A user's own files are kept.

# synthetic: were the split files in csv/ made from the sample, and are they unchanged?
synthetic() {
    "$PYTHON" - 2>/dev/null <<'PYTHON'
import hashlib, json

record = json.load(open("csv/split.json", encoding="utf-8"))
assert record["synthetic"]
for name, checksum in record["files"].items():
    assert hashlib.sha256(open(f"csv/{name}", "rb").read()).hexdigest() == checksum
PYTHON
}

# A training file alone is split first; the run then gets the flags in DATA, but none for a task
# that is switched off.
DATA=()
if [[ " $*" == *" --train_file"* && " $*" != *" --validation_file"* && " $*" != *" --test_file"* ]]; then
    folder=$("$PYTHON" -m script.split --within_run "$@") || exit
    DATA=(--train_file "$folder/train_simple.csv")
    off='[= ](false|no|0)( |$)'
    shopt -s nocasematch
    [[ "$*" =~ --do_eval$off ]] || DATA+=(--validation_file "$folder/val_simple.csv")
    [[ "$*" =~ --do_predict$off ]] || DATA+=(--test_file "$folder/test_simple.csv")
    shopt -u nocasematch
elif [[ " $*" != *" --train_file"* && " $*" != *" --data"* ]]; then
    if synthetic && { [ -e csv/USvideos.csv ] || [ -e csv/USvideo.csv ]; } ||
        [ ! -e csv/train_simple.csv ]; then
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
