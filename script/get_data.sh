#!/usr/bin/env bash
# Download USvideos.csv and US_category_id.json (Kaggle's "Trending YouTube Video Statistics", CC0,
# about 200 MB) into csv/, or resume a download that was cut off.
#     bash script/get_data.sh [--url ADDRESS_OF_THE_ARCHIVE]
source "$(dirname "$0")/environment.sh" requirements.txt
page=https://www.kaggle.com/datasets/datasnaek/youtube-new
url=https://www.kaggle.com/api/v1/datasets/download/datasnaek/youtube-new
by_hand="by hand: download $page in a browser, and put USvideos.csv and US_category_id.json into csv/"
archive=csv/youtube-new.zip

case "$*" in
    '') ;;
    '--url '*) url=$2 ;;
    -h | --help) sed -n '2,4s/^# //p' "$0" && exit ;;
    *) fail "unrecognized arguments: $* (see bash script/get_data.sh --help)" ;;
esac
[ ! -e csv/USvideos.csv ] || { echo "csv/USvideos.csv exists already: nothing to do" && exit; }
command -v curl >/dev/null || fail "curl is not installed: install it, or $by_hand"

progress=$([ -t 2 ] && echo --progress-bar || echo --silent)
until said=$(curl --fail --location --continue-at - --connect-timeout 20 --speed-limit 1 \
    --speed-time 20 "$progress" --output $archive --url "$url" --write-out '%{http_code} %{errormsg}'); do
    case "$? $said" in
        '33 '*) rm $archive ;;  # the server cannot resume: start over
        *' 416 '*) break ;;     # nothing is left to download
        *)
            [ -e $archive ] || fail "$url cannot be reached (${said#* }); $by_hand"
            fail "$archive is cut off (${said#* }): free some space if the disk is full, and run this again to resume"
            ;;
    esac
done

"$PYTHON" - $archive "$by_hand" <<'PYTHON'
import os
import sys
import tempfile
import zipfile

import pandas as pd

archive, by_hand = sys.argv[1:]
try:
    with zipfile.ZipFile(archive) as content, tempfile.TemporaryDirectory(dir="csv") as folder:
        names = ("US_category_id.json", "USvideos.csv")  # the last completes the set
        content.extractall(folder, names)
        columns = ["video_id", "trending_date", "title", "category_id"]
        rows = len(pd.read_csv(f"{folder}/USvideos.csv", usecols=columns))
        if not 40_000 < rows < 42_000:
            raise ValueError(f"USvideos.csv has {rows:,} rows, not about 40,949")
        for name in names:
            os.replace(f"{folder}/{name}", f"csv/{name}")
except OSError as error:
    sys.stderr.write(f"error: csv/ cannot be written: {error.strerror}; free some space\n")
    sys.exit(2)
except Exception as error:  # ZIP and CSV files can be wrong in many ways
    os.remove(archive)
    problem = f"the download is not the data set ({error}): run this again; or {by_hand}"
    sys.stderr.write(f"error: {problem}\n")
    sys.exit(2)
os.remove(archive)
print(f"csv/USvideos.csv: {rows:,} rows\nnext: bash script/preprocess.sh")
PYTHON
