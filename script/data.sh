# Sourced by the run scripts, with their arguments: sees to it that csv/ has split files, unless
# the arguments name others. Where the raw file is missing too they come from the synthetic
# sample, loudly; once the raw file is there they are made anew. A user's own files stay.

# made_up: were the files in csv/ made from the sample, and are they still those?
made_up() {
    "$PYTHON" - 2>/dev/null <<'EOF'
import hashlib, json

about = json.load(open("csv/split.json", encoding="utf-8"))
assert about["synthetic"]
for name, sha256 in about["files"].items():
    assert hashlib.sha256(open(f"csv/{name}", "rb").read()).hexdigest() == sha256
EOF
}

if [[ " $*" != *" --train_file"* && " $*" != *" --data"* ]]; then
    if made_up && { [ -e csv/USvideos.csv ] || [ -e csv/USvideo.csv ]; } ||
        [ ! -e csv/train_simple.csv ]; then
        echo "preprocessing.ipynb makes the split files in csv/ ..." >&2
        bash script/preprocess.sh >&2
    fi
    if made_up; then
        cat >&2 <<'EOF'
################################################################################
# The split files come from csv/USvideos_sample.csv, a SYNTHETIC SAMPLE: its   #
# texts are made up, its figures say nothing about real videos.                #
# bash script/get_data.sh fetches the real ones.                               #
################################################################################
EOF
    fi
fi
