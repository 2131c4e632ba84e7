"""Fetch the public Kaggle data set; see `bash script/get_data.sh --help`."""

import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from runtime.csv_reader import Table
from runtime.file_format import FileFormat
from runtime.files import UserError, run_and_report
from runtime.flags import Parser

URL = "https://www.kaggle.com/api/v1/datasets/download/datasnaek/youtube-new"
BY_HAND = (
    "by hand: download https://www.kaggle.com/datasets/datasnaek/youtube-new in a browser, and put "
    "USvideos.csv and US_category_id.json into csv/"
)
FOLDER = Path("csv")
ARCHIVE = FOLDER / "youtube-new.zip"
FILES = ("USvideos.csv", "US_category_id.json")
COLUMNS = (
    "video_id trending_date title channel_title category_id publish_time tags views likes dislikes "
    "comment_count thumbnail_link comments_disabled ratings_disabled video_error_or_removed "
    "description"
).split()
ROWS = range(40_000, 42_000)  # 40,949 when last seen
CURL = "curl --fail --location --continue-at - --connect-timeout 20 --speed-limit 1 --speed-time 20"
NO_RANGES = 33  # curl's status if the server cannot resume
NOTHING_LEFT = "416"  # HTTP's status if the file on disk is whole, or longer


def download(url: str) -> None:
    """Download the archive, or what is missing of it. Raises: UserError; what was read is kept."""
    command = [*CURL.split(), "--output", str(ARCHIVE), "--url", url]
    command += ["--write-out", "%{http_code} %{errormsg}"]
    command.append("--progress-bar" if sys.stderr.isatty() else "--silent")
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, restore_signals=False)
    except FileNotFoundError:
        raise UserError(f"curl is not installed: install it, or {BY_HAND}") from None
    code, _, reason = done.stdout.partition(" ")
    if done.returncode == NO_RANGES:
        ARCHIVE.unlink()
        download(url)
    elif done.returncode and code != NOTHING_LEFT:
        if not ARCHIVE.exists():
            raise UserError(f"{url} cannot be reached ({reason}); {BY_HAND}")
        advice = "free some space if the disk is full, and run this again to resume"
        raise UserError(f"{ARCHIVE} is cut off ({reason}): {advice}")


def unpack() -> None:
    """Check the archive's files and move them into csv/. Removes it unless the disk is full.

    Raises: UserError if the archive is not the data set, or if the disk is full.
    """
    staging = FOLDER / "unpacking"
    try:
        with zipfile.ZipFile(ARCHIVE) as content:
            content.extractall(staging, FILES)
        form = FileFormat(("title",), label_column_name=(), delimiter="comma")
        rows = sum(1 for _ in Table(staging / FILES[0], form, COLUMNS))
        if rows not in ROWS:
            raise UserError(f"{FILES[0]} has {rows:,} rows, not about 40,949")
        for name in reversed(FILES):  # the raw file last: it completes the set
            os.replace(staging / name, FOLDER / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, UserError) as error:
        ARCHIVE.unlink()
        raise UserError(
            f"the download is not the data set ({error}): run this again; or {BY_HAND}"
        ) from None
    except OSError as error:
        raise UserError(f"{staging} cannot be written: {error.strerror}; free some space") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    ARCHIVE.unlink()
    print(f"{FOLDER / FILES[0]}: {rows:,} rows, all {len(COLUMNS)} columns")


def run(url: str) -> None:
    """Fetch the files unless they are there. Raises: UserError."""
    if (FOLDER / FILES[0]).exists():
        print(f"{FOLDER / FILES[0]} exists already: nothing to do")
        return
    download(url)
    unpack()
    print("next: bash script/preprocess.sh")


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    parser = Parser(
        "bash script/get_data.sh",
        "Download USvideos.csv and US_category_id.json (CC0, about 200 MB) into csv/ with curl.",
    )
    parser.add_argument("--url", default=URL, help="address of the archive [%(default)s]")
    return run_and_report(run, parser.parse_args(argv).url)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
