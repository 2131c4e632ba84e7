"""The data of the study: where each file comes from, and the split files that are made of it."""

from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
from sklearn.model_selection import train_test_split

from dataset import text_key
from runtime.files import UserError, sha256
from script import split

# Each file with its SHA-256; the sets have a column text and a column label.
GITHUB = "https://github.com"
PUBLISHED = f"{GITHUB}/yihan-zhou/bert-classification-tuning"
KAGGLE = "rows of USvideos.csv, https://kaggle.com/datasets/datasnaek/youtube-new"
EMOTION = f"{GITHUB}/cardiffnlp/tweeteval, emotion"
BANKING = f"{GITHUB}/PolyAI-LDN/task-specific-datasets, banking_data"
SOURCES = {
    "seed_splits/train_simple.csv": (PUBLISHED, "79ddb90874fefe8d"),
    "seed_splits/val_simple.csv": (PUBLISHED, "175050e2d1a08ed9"),
    "seed_splits/test_simple.csv": (PUBLISHED, "d4b6d3a5bf47860f"),
    "raw/USvideos_14999_titles_cp1252.csv": (f"the first 14,999 {KAGGLE}", "4806e9b42aa3eae0"),
    "raw/USvideos_3000_all_columns.csv": (f"the first 3,000 {KAGGLE}", "3894ec1f18e69ee0"),
    "sets/emotion/train.csv": (EMOTION, "1d41b672549fa7d0"),
    "sets/emotion/val.csv": (EMOTION, "165fa7d930ecb744"),
    "sets/emotion/test.csv": (EMOTION, "79e47ba557a2d637"),
    "sets/banking77/train.csv": (BANKING, "e216b38e21e95fe4"),
    "sets/banking77/test.csv": (BANKING, "2f7f1eb84e9ab7ff"),
}
PARTS = ("train", "val", "test")
FREQUENT = 5  # categories of the videos that keep their name
FOLDS = 5
FEW, DRAWS = (8, 64), 5  # texts a label


def check_sources(folder: Path) -> None:
    """Check that a folder has all source files, unchanged. Raises: UserError if it does not."""
    for name, (origin, checksum) in SOURCES.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: get it from {origin}")
        if not sha256(folder / name).startswith(checksum):
            raise UserError(f"{folder / name} has another content than {origin} had: replace it")


def write(folder: Path, **tables: pd.DataFrame) -> None:
    """Write tables as split files of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}_simple.csv", index=False)


def divide(path: Path, table: pd.DataFrame, *flags: str) -> None:
    """Write a table, and its split by `split.sh` into a folder of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    if split.main([str(path), *flags, "--output_dir", str(path.with_suffix(""))]):
        raise UserError(f"{path} could not be split: see above")


def distinct(table: pd.DataFrame) -> pd.DataFrame:
    """Return the first row of each text."""
    return table[~table["text"].map(text_key).duplicated()]


def named(videos: pd.DataFrame) -> pd.DataFrame:
    """Return the first row of each title: the columns that a split needs."""
    videos = distinct(videos.rename(columns={"title": "text", "category_id": "label"}))
    frequent = videos["label"].value_counts().index[:FREQUENT]
    videos["label"] = videos["label"].where(videos["label"].isin(frequent), "other")
    return videos.filter(["text", "label", "video_id", "channel_title", "trending_date"])


def prepare(source: Path, folder: Path) -> None:
    """Make the folders of split files from the source files: `folder`/NAME, or NAME/0 to NAME/4.

    published: as it is. cleaned: its distinct titles. raw: titles as people wrote them, the five
    most frequent categories and "other"; those of a video are in the same fold. time: the same
    titles, the latest for the test. channel: fewer titles, those of a channel in the same fold.
    emotion, banking77: their own test files. emotion-8, emotion-64: draws of so many training
    texts of each label.
    Raises: UserError, see `check_sources`.
    """
    check_sources(source)
    read = partial(pd.read_csv, dtype=str, keep_default_na=False)

    def tables(place: str, ending: str, *names: str, **options) -> list[pd.DataFrame]:
        return [read(source / place / f"{name}{ending}.csv", **options) for name in names]

    published = tables("seed_splits", "_simple", *PARTS)
    write(folder / "published", **dict(zip(PARTS, published, strict=True)))
    divide(folder / "cleaned.csv", distinct(pd.concat(published)), "--folds", str(FOLDS))

    (videos,) = tables("raw", "_titles_cp1252", "USvideos_14999", encoding="cp1252")
    videos, (few,) = named(videos), tables("raw", "_all_columns", "USvideos_3000")
    divide(folder / "raw.csv", videos, "--group_by", "video_id", "--folds", str(FOLDS))
    divide(folder / "channel.csv", named(few), "--group_by", "channel_title", "--folds", str(FOLDS))
    when = ("--time_column", "trending_date", "--time_format", "%y.%d.%m", "--test_share", "0.2")
    divide(folder / "time.csv", videos, *when)

    emotion = tables("sets/emotion", "", *PARTS)
    write(folder / "emotion", **dict(zip(PARTS, emotion, strict=True)))
    train, *others = emotion
    for size, draw in product(FEW, range(DRAWS)):
        few = train.groupby("label").sample(size, random_state=draw)
        place = folder / f"emotion-{size}" / str(draw)
        write(place, **dict(zip(PARTS, (few, *others), strict=True)))
    customers, test = tables("sets/banking77", "", "train", "test")
    keep = {"test_size": 0.1, "stratify": customers["label"], "random_state": 0}
    train, val = train_test_split(customers, **keep)
    write(folder / "banking77", train=train, val=val, test=test)
