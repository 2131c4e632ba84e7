"""Raw `USvideos.csv` to split files: reading, cleaning, labels, and two protocols of splitting.

`preprocessing.ipynb` tells the story with these functions; `script/preprocess.py` runs it.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import train_test_split

from dataset import canonical_label, text_key
from runtime.csv_reader import DataError, file_sha256, read_table, row_list

RAW_FILES = ("csv/USvideos.csv", "csv/USvideo.csv")
SAMPLE_FILE = "csv/USvideos_sample.csv"
OTHER = "other"
TEXT_COLUMNS = ("title", "channel_title", "tags", "description")
GROUPINGS = ("video", "channel", "time")

# Category ids of the YouTube Data API, for where US_category_id.json is not beside the raw file.
CATEGORY_NAMES = {
    1: "Film & Animation", 2: "Autos & Vehicles", 10: "Music", 15: "Pets & Animals", 17: "Sports",
    18: "Short Movies", 19: "Travel & Events", 20: "Gaming", 21: "Videoblogging",
    22: "People & Blogs", 23: "Comedy", 24: "Entertainment", 25: "News & Politics",
    26: "Howto & Style", 27: "Education", 28: "Science & Technology",
    29: "Nonprofits & Activism", 30: "Movies", 31: "Anime/Animation", 32: "Action/Adventure",
    33: "Classics", 34: "Comedy", 35: "Documentary", 36: "Drama", 37: "Family", 38: "Foreign",
    39: "Horror", 40: "Sci-Fi/Fantasy", 41: "Thriller", 42: "Shorts", 43: "Shows", 44: "Trailers",
}  # fmt: skip

# NLTK's English stop list of 179 words, as the work re-created used it; the nltk package would
# download it at run time.
STOP_WORDS = frozenset(
    """i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself
    yourselves he him his himself she she's her hers herself it it's its itself they them their
    theirs themselves what which who whom this that that'll these those am is are was were be been
    being have has had having do does did doing a an the and but if or because as until while of
    at by for with about against between into through during before after above below to from up
    down in out on off over under again further then once here there when where why how all any
    both each few more most other some such no nor not only own same so than too very s t can will
    just don don't should should've now d ll m o re ve y ain aren aren't couldn couldn't didn
    didn't doesn doesn't hadn hadn't hasn hasn't haven haven't isn isn't ma mightn mightn't mustn
    mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won won't wouldn
    wouldn't""".split()
)


# -------------------------------------------------------------------------------------- parameters


def check_parameters(**parameters) -> dict:
    """The notebook's parameters, checked; `text_columns` may be one word, `title,tags`.

    Raises: DataError naming the parameter.
    """
    columns = parameters["text_columns"]
    columns = columns.split(",") if isinstance(columns, str) else list(columns)
    quantile, seed = parameters["top_quantile"], parameters["seed"]
    once = len(columns) == len(set(columns)) > 0
    for name, good, wanted in (
        (
            "text_columns",
            once and set(columns) <= set(TEXT_COLUMNS),
            f"some of {', '.join(TEXT_COLUMNS)}, each once",
        ),
        ("cleaning", parameters["cleaning"] in CLEANINGS, f"one of {', '.join(CLEANINGS)}"),
        ("group_by", parameters["group_by"] in GROUPINGS, f"one of {', '.join(GROUPINGS)}"),
        (
            "top_quantile",
            quantile is None or is_share(quantile),
            "a share between 0 and 1, or None",
        ),
        ("balance", isinstance(parameters["balance"], bool), "True or False"),
        ("seed", type(seed) is int and 0 <= seed < 2**32, "a whole number from 0 to 4294967295"),
        ("train_share", is_share(parameters["train_share"]), "a share between 0 and 1"),
        ("test_share", is_share(parameters["test_share"]), "a share between 0 and 1"),
    ):
        if not good:
            raise DataError(f"parameter {name} is {parameters[name]!r}: give {wanted}")
    return parameters | {"text_columns": columns}


def is_share(value: object) -> bool:
    """Whether it is a number between 0 and 1, both excluded."""
    return isinstance(value, float) and 0 < value < 1


# ---------------------------------------------------------------------------------------- raw file


def find_raw(input_file: str | None) -> str:
    """The file to read: the one given, the real one in csv/, or the synthetic sample."""
    if input_file:
        return input_file
    return next((path for path in RAW_FILES if Path(path).exists()), SAMPLE_FILE)


def is_synthetic(path: str) -> bool:
    """Whether the file is the sample that the project made up."""
    return Path(path).name == Path(SAMPLE_FILE).name


def mend_tags(line: str) -> str:
    r"""Make the raw file's tags one quoted field: `"a"|"b"` is written `"a""|""b"` in CSV.

    Readers that are not strict take it as it stands, but also take a field that is cut off.
    """
    return re.sub(r'(?<=[^",])"\|"(?=[^",])', '""|""', line)


def read_raw(path: str, encoding: str, text_columns: list[str]) -> pd.DataFrame:
    """The raw rows, as text but for `category_id` (int).

    A `video_id` that is none gets the title added: spreadsheets turn ids that start with a minus
    into "#NAME?", which many videos then share.

    Raises: DataError for what `read_rows` refuses, a missing column, and rows whose
        category id is no number or whose trending date is none.
    """
    needed = {"video_id", "trending_date", "title", "category_id", *text_columns}
    table = read_table(path, encoding, sorted(needed), mend=mend_tags)
    table["category_id"] = table["category_id"].map(canonical_label)
    day = pd.to_datetime(table["trending_date"], format="%y.%d.%m", errors="coerce")
    for column, good, wanted in (
        ("category_id", table["category_id"].str.fullmatch(r"\d+"), "a whole number"),
        ("trending_date", day.notna(), "a date as 17.14.11 (year, day, month)"),
    ):
        if not good.all():
            raise DataError(
                f"{path}: {column} is not {wanted} in {row_list(np.flatnonzero(~good) + 1)}: mend "
                "or remove these rows; is a quote missing in the row before?"
            )
    damaged = ~table["video_id"].str.fullmatch(r"[\w-]{11}")
    ids = table["video_id"].mask(damaged, table["video_id"] + " " + table["title"])
    return table.assign(category_id=table["category_id"].astype(int), video_id=ids, day=day)


def category_names(folder: Path, ids: pd.Series) -> dict[int, str]:
    """A name for each of the ids, no two the same: from US_category_id.json where it is there."""
    path = folder / "US_category_id.json"
    names = CATEGORY_NAMES
    if path.exists():
        try:
            items = json.loads(path.read_text(encoding="utf-8"))["items"]
            names = names | {int(item["id"]): item["snippet"]["title"] for item in items}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not the data set's category file: {error!r}") from None
    found = {number: names.get(number, f"category {number}") for number in sorted(set(ids))}
    twice = {name for name in found.values() if list(found.values()).count(name) > 1}
    return {i: f"{name} ({i})" if name in twice else name for i, name in found.items()}


# ------------------------------------------------------------------------------------------- texts


def clean(text: str) -> str:
    """The original's cleaning: stop words, punctuation, capitals and bare numbers go."""
    kept = " ".join(word for word in text.split() if word.lower() not in STOP_WORDS)
    words = re.sub(r"[^\w\s]|_", " ", kept).lower().split()
    return " ".join(word for word in words if re.fullmatch(r"\d*[a-zA-Z]\w*", word))


def tidy(text: str) -> str:
    """White space only."""
    return " ".join(text.split())


CLEANINGS = {"original": clean, "none": tidy}


def make_texts(raw: pd.DataFrame, text_columns: list[str], cleaning: str) -> pd.Series:
    r"""One text a row: the columns in their order, joined by " | ", then cleaned.

    Tags are written `a, b` instead of `a"|"b`, "[none]" is nothing, and the two characters `\n`
    of descriptions become a blank.
    """
    columns = raw[text_columns].copy()
    if "tags" in columns:
        tags = columns["tags"].str.replace('"', "").str.replace("|", ", ", regex=False)
        columns["tags"] = tags.replace("[none]", "")
    if "description" in columns:
        columns["description"] = columns["description"].str.replace("\\n", " ", regex=False)
    joined = [" | ".join(part for part in row if part.strip()) for row in columns.to_numpy()]
    return pd.Series(joined, index=raw.index, dtype=object).map(CLEANINGS[cleaning])


def drop_empty(table: pd.DataFrame, text_columns: list[str]) -> tuple[pd.DataFrame, dict[str, int]]:
    """Drop rows that have no text, or none after cleaning; say so, and count both."""
    empty = table["text"] == ""
    blank = (table[text_columns].map(str.strip) == "").all(axis=1)
    if blank.any():
        print(f"warning: dropped for want of a text: {row_list(np.flatnonzero(blank) + 1)}")
    counts = {
        "rows_without_text": int(blank.sum()),
        "rows_cleaned_away": int((empty & ~blank).sum()),
    }
    return table[~empty], counts


# ------------------------------------------------------------------------------------------ labels


def make_labels(
    category_ids: pd.Series, top_quantile: float | None, names: dict[int, str]
) -> tuple[pd.Series, dict[str, str]]:
    """Labels, and the name of each.

    With a quantile, as the original: the categories with more rows than that quantile of all
    categories' counts are 0, 1, ... by falling count, and all others the next number. With None
    each category is its own label, by its name.
    """
    if top_quantile is None:
        labels = category_ids.map(names)
        return labels, {name: name for name in sorted(set(labels))}
    counts = category_ids.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    top = counts.index[counts > counts.quantile(top_quantile)].tolist()
    numbers = {category: str(number) for number, category in enumerate(top)}
    labels = category_ids.map(numbers).fillna(str(len(top)))
    titles = {numbers[category]: names[category] for category in top}
    return labels, titles | {str(len(top)): OTHER}


# ------------------------------------------------------------------------------------------ splits


def original_splits(
    table: pd.DataFrame, seed: int, train_share: float, test_share: float, balance: bool
) -> dict[str, pd.DataFrame]:
    """The original's protocol, by rows: it leaks, since a video's rows fall into every split.

    A random `train_share` of the rows trains, balanced by down-sampling every label to the
    rarest; the rest is split again, stratified by label, `test_share` of it for test. Which rows
    are drawn is as in the original: its files' labels come out in the same order.

    Raises: DataError for too few rows.
    """
    try:
        train, rest = train_test_split(table, train_size=train_share, random_state=seed)
        # one row of a label cannot be stratified
        rare = rest["label"].value_counts().min() < 2
        if rare:
            print("warning: original: not stratified, since a label has one row outside training")
        test, val = train_test_split(
            rest, train_size=test_share, random_state=seed, stratify=None if rare else rest["label"]
        )
    except ValueError as error:
        raise DataError(f"too few rows for these shares and labels: {error}") from None
    if balance:
        groups = train.groupby("label")
        train = groups.sample(n=groups.size().min(), random_state=seed)
    return only_known_labels({"train": train, "val": val, "test": test})


def unseen_splits(
    table: pd.DataFrame, seed: int, train_share: float, test_share: float, group_by: str
) -> dict[str, pd.DataFrame]:
    """A protocol that does not leak: one row a video, and no text in two splits.

    Videos whose texts are equal stay together, and with `group_by="channel"` all videos of a
    channel. With "time" the videos that trended first train, and the last ones test.

    Raises: DataError for no channel_title, or too few rows.
    """
    if group_by == "channel" and "channel_title" not in table:
        raise DataError("group_by 'channel' needs the column channel_title")
    videos = table.sort_values("day", kind="stable").drop_duplicates("video_id")
    keys = [videos["text"].map(text_key)]
    group = connected([*keys, videos["channel_title"]] if group_by == "channel" else keys)
    # groups in order of their first day, or in a random one
    order = videos.groupby(group)["day"].min().sort_values(kind="stable").index.to_numpy()
    if group_by != "time":
        order = np.random.default_rng(seed).permutation(order)
    first = round(len(order) * train_share)
    second = first + round((len(order) - first) * (1 - test_share))
    parts = dict(zip(("train", "val", "test"), np.split(order, [first, second]), strict=True))
    if not all(len(part) for part in parts.values()):
        raise DataError(f"too few videos for these shares: {len(order)} that differ in text")
    return only_known_labels({name: videos[np.isin(group, part)] for name, part in parts.items()})


def only_known_labels(splits: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Drop, and say so, validation and test rows of a label that training lacks.

    Raises: DataError where no row is left of a file.
    """
    known = set(splits["train"]["label"])
    for name, split in splits.items():
        if unknown := sorted(set(split["label"]) - known):
            count = (~split["label"].isin(known)).sum()
            labels = ", ".join(unknown)
            print(f"warning: {name}: dropped {count} rows of labels that training lacks: {labels}")
    splits = {name: split[split["label"].isin(known)] for name, split in splits.items()}
    if empty := [name for name, split in splits.items() if not len(split)]:
        raise DataError(f"too few rows for these shares and labels: none is left for {empty[0]}")
    return splits


def connected(keys: list[pd.Series]) -> np.ndarray:
    """Group numbers [N] of rows that share a value of any key, directly or through others."""
    offset, edges = len(keys[0]), []
    for key in keys:
        codes = pd.factorize(key)[0] + offset
        edges.append(codes)
        offset = codes.max() + 1
    rows = np.tile(np.arange(len(keys[0])), len(keys))
    columns = np.concatenate(edges)
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(offset, offset))
    return connected_components(graph, directed=False)[1][: len(keys[0])]


def describe(splits: dict[str, pd.DataFrame]) -> dict[str, dict]:
    """Rows, distinct texts, label counts; the share of rows whose text is in the training file.

    `lookup_accuracy` is that of a dictionary of the training file: it repeats the label under
    which a text stands there (most often), and for all others the most frequent of training and
    validation file (the first alone may be balanced).
    """
    keys = {name: split["text"].map(text_key) for name, split in splits.items()}
    labels = splits["train"]["label"]
    known = labels.groupby(keys["train"]).agg(lambda group: group.mode()[0])
    common = pd.concat([labels, splits["val"]["label"]]).mode()[0]
    return {
        name: {
            "rows": len(split),
            "distinct_texts": keys[name].nunique(),
            "share_in_train": round(float(keys[name].isin(known.index).mean()), 6),
            "lookup_accuracy": round(
                float((keys[name].map(known).fillna(common) == split["label"]).mean()), 6
            ),
            "labels": {k: int(v) for k, v in split["label"].value_counts().sort_index().items()},
        }
        for name, split in splits.items()
    }


def write_splits(folder: Path, splits: dict[str, pd.DataFrame], about: dict) -> None:
    """Write `{train,val,test}_simple.csv`, then split.json, each whole. Same content, same bytes.

    split.json holds `about`, with `describe` of the splits as "splits", and the files' hashes.

    Raises: DataError for files of others, which are not written over, or a folder that cannot be
        written to.
    """
    try:
        check_own(folder)
        folder.mkdir(parents=True, exist_ok=True)
        hashes = {}
        for name, split in splits.items():
            path = folder / f"{name}_simple.csv"
            partial = path.with_suffix(".partial")
            split[["text", "label"]].to_csv(partial, index=False, lineterminator="\n")
            hashes[path.name] = file_sha256(partial)
        partial = folder / "split.partial"
        content = {**about, "files": hashes}
        partial.write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        for name in hashes:
            os.replace((folder / name).with_suffix(".partial"), folder / name)
        os.replace(partial, folder / "split.json")
    except OSError as error:
        raise DataError(f"output_dir {folder} cannot be written to: {error.strerror}") from None


def check_own(folder: Path) -> None:
    """Refuse to write over split files that split.json does not list as they are."""
    try:
        hashes = json.loads((folder / "split.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        hashes = {}
    for name in ("train_simple.csv", "val_simple.csv", "test_simple.csv"):
        path = folder / name
        if path.exists() and file_sha256(path) != hashes.get(name):
            raise DataError(
                f"{path} was not made by this: move it away, or give another output_dir"
            )


def summary(folder: Path) -> str:
    """The table of both protocols, from their split.json."""
    lines = [
        f"{'protocol':10}{'split':7}{'rows':>8}{'texts':>8}{'in training':>13}{'look-up':>9}  file"
    ]
    for place in (folder, folder / "unseen"):
        about = json.loads((place / "split.json").read_text(encoding="utf-8"))
        if about["synthetic"] and place == folder:
            lines.insert(0, "SYNTHETIC SAMPLE: made-up videos, its figures mean nothing")
        for name, split in about["splits"].items():
            lines.append(
                f"{about['protocol']:10}{name:7}{split['rows']:8,}{split['distinct_texts']:8,}"
                f"{split['share_in_train']:13.1%}{split['lookup_accuracy']:9.1%}  "
                f"{place / f'{name}_simple.csv'}"
            )
    return "\n".join(lines)
