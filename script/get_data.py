"""Fetch the public Kaggle data set; see `bash script/get_data.sh --help`."""

import argparse
import os
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, ".")  # called from the project's root

from dataset import DataError, read_rows
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
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            if answer.status != 206:  # the server starts again
                have = 0
            left = answer.headers.get("Content-Length")
            total = have + int(left) if left else None
            bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=None)
            with open(part, "ab" if have else "wb") as file, bar:
                while block := answer.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is no part of this file
            part.unlink()
            raise FetchError("the download had changed since: run this again") from None
        raise FetchError(f"{url} answers {error.code} {error.reason}; {BY_HAND}") from None
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise FetchError(f"{url} is out of reach ({error}); {BY_HAND}") from None
    except OSError as error:
        raise FetchError(f"{part} cannot be written: {error.strerror}; make room there") from None
    size = part.stat().st_size
    if total and size < total:
        raise FetchError(f"cut off at {size:,} of {total:,} bytes: run this again, it goes on")
    os.replace(part, archive)


def unpack(archive: Path) -> None:
    """Put the files into csv/, each checked and whole or not at all. Removes the archive.

    Raises: FetchError for what is not the data set.
    """
    staging = FOLDER / "unpacking"
    try:
        staging.mkdir(exist_ok=True)
        with zipfile.ZipFile(archive) as content:
            for name in FILES:
                content.extract(name, staging)
        lines = read_rows(staging / FILES[0], mend=mend_tags)
        header = next(lines)
        if missing := sorted(set(COLUMNS) - set(header)):
            raise FetchError(f"{FILES[0]} lacks the column {', '.join(missing)}; {BY_HAND}")
        rows = sum(1 for _ in lines)
        if rows not in ROWS:
            raise FetchError(f"{FILES[0]} has {rows:,} rows, not about 40,949; {BY_HAND}")
        for name in FILES:
            os.replace(staging / name, FOLDER / name)
        print(f"{FOLDER / FILES[0]}: {rows:,} rows, all {len(COLUMNS)} columns")
    except (zipfile.BadZipFile, KeyError, DataError) as error:
        raise FetchError(f"what came is not the data set ({error}); {BY_HAND}") from None
    except OSError as error:
        raise FetchError(
            f"{staging} cannot be written: {error.strerror}; make room there"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        archive.unlink(missing_ok=True)


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
        download(args.url, ARCHIVE)
        unpack(ARCHIVE)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("next: bash script/preprocess.sh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
