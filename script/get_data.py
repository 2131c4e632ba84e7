"""Fetch the public Kaggle data set; see `bash script/get_data.sh --help`."""

import os
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from runtime.csv_reader import Table
from runtime.file_format import FileFormat
from runtime.files import UserError
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
TIMEOUT_SECONDS = 20


def download(url: str, archive: Path) -> None:
    """Download `url` to `archive`, resuming a partial download from `archive`.part.

    Raises: UserError; a usable partial download is kept for the next call.
    """
    part = archive.with_suffix(".zip.part")
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise UserError(f"{url} answered {error.code} {error.reason}; {BY_HAND}") from None
        if error.headers.get("Content-Range") == f"bytes */{have}":  # nothing is left to download
            os.replace(part, archive)
            return
        part.unlink()
        raise UserError("the file on the server has changed: run this again") from None
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"{url} cannot be reached ({error}); {BY_HAND}") from None
    with answer:
        if answer.status != 206:  # the server starts from the beginning
            have = 0
        left = answer.headers.get("Content-Length")
        total = have + int(left) if left else None
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=None)
        try:
            with open(part, "ab" if have else "wb") as file, bar:
                while block := answer.read1(1 << 20):
                    file.write(block)
                    bar.update(len(block))
        except (OSError, HTTPException) as error:  # from the connection or the disk
            advice = "free some space if the disk is full, and run this again to resume"
            raise UserError(f"{part} is cut off ({error}): {advice}") from None
    size = part.stat().st_size
    if total is not None and size < total:
        raise UserError(f"received only {size:,} of {total:,} bytes: run this again to resume")
    os.replace(part, archive)


def unpack(archive: Path) -> None:
    """Check the archive's files and move them into csv/. Removes it unless the disk is full.

    Raises: UserError if the archive is not the data set, or if the disk is full.
    """
    staging = FOLDER / "unpacking"
    try:
        with zipfile.ZipFile(archive) as content:
            content.extractall(staging, FILES)
        form = FileFormat(("title",), label_column_name=(), delimiter="comma")
        rows = sum(1 for _ in Table(staging / FILES[0], form, COLUMNS))
        if rows not in ROWS:
            raise UserError(f"{FILES[0]} has {rows:,} rows, not about 40,949")
        for name in reversed(FILES):  # the raw file last: it completes the set
            os.replace(staging / name, FOLDER / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, UserError) as error:
        archive.unlink()
        raise UserError(f"the download is not the data set ({error}); {BY_HAND}") from None
    except OSError as error:
        raise UserError(f"{staging} cannot be written: {error.strerror}; free some space") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    archive.unlink()
    print(f"{FOLDER / FILES[0]}: {rows:,} rows, all {len(COLUMNS)} columns")


def main() -> None:
    """Run from the command line; exits with status 2 after a one-line error the user can fix."""
    parser = Parser(
        "bash script/get_data.sh",
        "Download USvideos.csv and US_category_id.json (CC0, about 200 MB) into csv/.",
    )
    parser.add_argument("--url", default=URL, help="address of the archive [%(default)s]")
    url = parser.parse_args().url
    if (FOLDER / FILES[0]).exists():
        print(f"{FOLDER / FILES[0]} exists already: nothing to do")
        return
    try:
        if not ARCHIVE.exists():  # else an earlier call downloaded it
            download(url, ARCHIVE)
        unpack(ARCHIVE)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print("next: bash script/preprocess.sh")


if __name__ == "__main__":
    main()
