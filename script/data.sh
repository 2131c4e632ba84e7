# Sourced by the run scripts, with their arguments: sees to it that csv/ has split files, unless
# the arguments name others. Where the raw file is missing too they come from the synthetic
# sample, loudly; once the raw file is there they are made anew.

if [[ " $*" != *" --train_file"* ]]; then
    made_up() { grep -qs '"synthetic": true' csv/split.json; }
    if [ ! -e csv/train_simple.csv ] || { made_up && [ -e csv/USvideos.csv ]; }; then
        echo "csv/train_simple.csv is made by preprocessing.ipynb ..." >&2
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
