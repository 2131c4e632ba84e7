"""Fetch the public Kaggle data set; see `bash script/get_data.sh --help`."""

import argparse
import os
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from tqdm import tqdm

from runtime.csv_reader import DataError, read_rows
from script.splits import mend_tags

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
ROWS = range(40_000, 42_000)  # 40,949 when it was last seen
TIMEOUT_SECONDS = 20


class FetchError(RuntimeError):
    """The data cannot be had: its message says why and what to do."""


def download(url: str, archive: Path) -> None:
    """Fetch `url`; what an earlier call left in `archive`.part is gone on with.

    Raises: FetchError; the part stays for the next call.
    """
    part = archive.with_suffix(".zip.part")
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to fetch, or the part is none of this file
            if error.headers.get("Content-Range") == f"bytes */{have}":
                os.replace(part, archive)
                return
            part.unlink()
            raise FetchError("the file has changed since the last call: run this again") from None
        raise FetchError(f"{url} answers {error.code} {error.reason}; {BY_HAND}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise FetchError(f"{url} is out of reach ({error}); {BY_HAND}") from None
    with answer:
        if answer.status != 206:  # the server starts again
            have = 0
        left = answer.headers.get("Content-Length")
        total = have + int(left) if left else None
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=None)
        try:
            with open(part, "ab" if have else "wb") as file, bar:
                while block := read_block(answer):
                    file.write(block)
                    bar.update(len(block))
        except OSError as error:
            raise FetchError(f"{part} cannot be written: {error.strerror}; make room") from None
    size = part.stat().st_size
    if total is not None and size < total:
        raise FetchError(f"cut off at {size:,} of {total:,} bytes: run this again, it goes on")
    os.replace(part, archive)


def read_block(answer: HTTPResponse) -> bytes:
    """Up to a megabyte; nothing where the connection broke, which the size then shows."""
    try:
        return answer.read1(1 << 20)
    except (OSError, HTTPException):
        return b""


def unpack(archive: Path) -> None:
    """Put the files into csv/, checked and whole. Then, or when it is wrong, remove the archive.

    Raises: FetchError for what is not the data set.
    """
    staging = FOLDER / "unpacking"
    try:
        staging.mkdir(exist_ok=True)
        with zipfile.ZipFile(archive) as content:
            for name in FILES:
                content.extract(name, staging)
        lines = read_rows(staging / FILES[0], mend=mend_tags)
        missing = sorted(set(COLUMNS) - set(next(lines)))
        rows = sum(1 for _ in lines)
        if missing:
            raise DataError(f"{FILES[0]} lacks the column {', '.join(missing)}")
        if rows not in ROWS:
            raise DataError(f"{FILES[0]} has {rows:,} rows, not about 40,949")
        for name in reversed(FILES):  # the raw file last: with it the set is complete
            os.replace(staging / name, FOLDER / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, DataError) as error:
        archive.unlink()
        raise FetchError(f"what came is not the data set ({error}); {BY_HAND}") from None
    except OSError as error:
        raise FetchError(f"{staging} cannot be written: {error.strerror}; make room") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    archive.unlink()
    print(f"{FOLDER / FILES[0]}: {rows:,} rows, all {len(COLUMNS)} columns")


def main() -> int:
    """Returns the exit status: 0, or 2 after one line that says what to do."""
    parser = argparse.ArgumentParser(
        prog="script/get_data.sh",
        description="Fetch USvideos.csv and US_category_id.json (CC0, about 200 MB) into csv/.",
    )
    parser.add_argument("--url", default=URL, help="where the archive is [%(default)s]")
    args = parser.parse_args()
    if (FOLDER / FILES[0]).exists():
        print(f"{FOLDER / FILES[0]} is there already: nothing to do")
        return 0
    try:
        if not ARCHIVE.exists():  # an earlier call may have got so far
            download(args.url, ARCHIVE)
        unpack(ARCHIVE)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("next: bash script/preprocess.sh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
