"""Raw `USvideos.csv` to split files: reading, cleaning, labels, and two protocols of splitting.

`preprocessing.ipynb` tells the story with these functions; `script/preprocess.py` runs it.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import train_test_split

from dataset import DataError, canonical_label, read_rows, row_list, text_key

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
    shares = {name: parameters[name] for name in ("train_share", "test_share")}
    quantile, seed = parameters["top_quantile"], parameters["seed"]
    for name, good, wanted in (
        ("text_columns", columns and set(columns) <= set(TEXT_COLUMNS), f"some of {TEXT_COLUMNS}"),
        ("cleaning", parameters["cleaning"] in CLEANINGS, f"one of {tuple(CLEANINGS)}"),
        ("group_by", parameters["group_by"] in GROUPINGS, f"one of {GROUPINGS}"),
        (
            "top_quantile",
            quantile is None or is_share(quantile),
            "a share between 0 and 1, or None",
        ),
        ("balance", isinstance(parameters["balance"], bool), "True or False"),
        ("seed", type(seed) is int and 0 <= seed < 2**32, "a whole number from 0 to 4294967295"),
        *((name, is_share(value), "a share between 0 and 1") for name, value in shares.items()),
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


def sha256(path: str) -> str:
    """Of a file's bytes, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def mend_tags(line: str) -> str:
    r"""Make the raw file's tags one quoted field: `"a"|"b"` is written `"a""|""b"` in CSV.

    Readers that are not strict take it as it stands, but also take a field that is cut off.
    """
    return re.sub(r'(?<!")"\|"(?!")', '""|""', line)


def read_raw(path: str, encoding: str, text_columns: list[str]) -> pd.DataFrame:
    """The raw rows, as text but for `category_id` (int).

    A `video_id` that is none gets the first text column added: spreadsheets turn ids that start
    with a minus into "#NAME?", which many videos then share.

    Raises: DataError for what `dataset.read_rows` refuses, a missing column, or a category id
        that is no number, with its rows.
    """
    lines = read_rows(path, encoding, mend_tags)
    header = next(lines)
    missing = {"video_id", "trending_date", "category_id", *text_columns} - set(header)
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(map(repr, sorted(missing)))}; it has "
            f"{', '.join(map(repr, header))}"
        )
    table = pd.DataFrame(list(lines), columns=header, dtype=object)
    if table.empty:
        raise DataError(f"{path} has a header and no rows")
    category = table["category_id"].map(canonical_label)
    odd = ~category.str.fullmatch(r"\d+")
    if odd.any():
        raise DataError(
            f"{path}: category_id is no whole number in {row_list(np.flatnonzero(odd) + 1)}: mend "
            "or remove them, and look for a missing quote in the row before"
        )
    damaged = ~table["video_id"].str.fullmatch(r"[\w-]{11}")
    ids = table["video_id"].mask(damaged, table["video_id"] + " " + table[text_columns[0]])
    return table.assign(category_id=category.astype(int), video_id=ids)


def category_names(folder: Path) -> dict[int, str]:
    """Names of the category ids, from US_category_id.json where it is there."""
    path = folder / "US_category_id.json"
    if not path.exists():
        return CATEGORY_NAMES
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["items"]
        return CATEGORY_NAMES | {int(item["id"]): item["snippet"]["title"] for item in items}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not the data set's category file: {error!r}") from None


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


# ------------------------------------------------------------------------------------------ labels


def make_labels(
    category_ids: pd.Series, top_quantile: float | None, names: dict[int, str]
) -> tuple[pd.Series, dict[str, str]]:
    """Labels, and the name of each.

    With a quantile, as the original: the categories with more rows than that quantile of all
    categories' counts are 0, 1, ... by falling count, and all others the next number. With None
    each category is its own label, by its name.
    """
    names = {number: names.get(number, f"category {number}") for number in set(category_ids)}
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

    Rows are shuffled and cut at `train_share`; the training part is balanced by down-sampling
    every label to the rarest; the rest is split again, stratified, `test_share` of it for test.
    """
    shuffled = table.sample(frac=1, random_state=seed)
    cut = int(len(shuffled) * train_share)
    train, rest = shuffled.iloc[:cut], shuffled.iloc[cut:]
    if balance:
        groups = train.groupby("label")
        train = groups.sample(n=groups.size().min(), random_state=seed)
    # a label with one row cannot be stratified
    stratify = rest["label"] if rest["label"].value_counts().min() > 1 else None
    val, test = train_test_split(rest, test_size=test_share, random_state=seed, stratify=stratify)
    return only_known_labels({"train": train, "val": val, "test": test})


def unseen_splits(
    table: pd.DataFrame, seed: int, train_share: float, test_share: float, group_by: str
) -> dict[str, pd.DataFrame]:
    """A protocol that does not leak: one row a video, and no text in two splits.

    Videos whose texts are equal stay together, and with `group_by="channel"` all videos of a
    channel. With "time" the videos that trended first train, and the last ones test.

    Raises: DataError for a trending_date that is not as in `17.14.11`, or no channel_title.
    """
    day = pd.to_datetime(table["trending_date"], format="%y.%d.%m", errors="coerce")
    if day.isna().any():
        raise DataError(
            f"trending_date is not as in 17.14.11, in {row_list(day.index[day.isna()] + 1)}"
        )
    if group_by == "channel" and "channel_title" not in table:
        raise DataError("group_by 'channel' needs the column channel_title")
    videos = table.assign(day=day).sort_values("day", kind="stable").drop_duplicates("video_id")
    keys = [videos["text"].map(text_key)]
    group = connected([*keys, videos["channel_title"]] if group_by == "channel" else keys)
    if group_by == "time":
        first_day = videos.groupby(group)["day"].min().sort_values(kind="stable")
        order = first_day.index.to_numpy()
        train, rest = np.split(order, [int(len(order) * train_share)])
        val, test = np.split(rest, [round(len(rest) * (1 - test_share))])
    else:
        train, rest = train_test_split(np.unique(group), train_size=train_share, random_state=seed)
        val, test = train_test_split(rest, test_size=test_share, random_state=seed)
    parts = {"train": train, "val": val, "test": test}
    return only_known_labels({name: videos[np.isin(group, part)] for name, part in parts.items()})


def only_known_labels(splits: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Drop, and say so, validation and test rows of a label that training lacks."""
    known = set(splits["train"]["label"])
    for name, split in splits.items():
        if unknown := sorted(set(split["label"]) - known):
            count = (~split["label"].isin(known)).sum()
            labels = ", ".join(unknown)
            print(f"warning: {name}: dropped {count} rows of labels that training lacks: {labels}")
    return {name: split[split["label"].isin(known)] for name, split in splits.items()}


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
    """Write `{train,val,test}_simple.csv` and split.json. Same content, same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        split[["text", "label"]].to_csv(
            folder / f"{name}_simple.csv", index=False, lineterminator="\n"
        )
    text = json.dumps({**about, "splits": describe(splits)}, indent=2, ensure_ascii=False)
    (folder / "split.json").write_text(text + "\n", encoding="utf-8")


def summary(folder: Path) -> str:
    """The table of both protocols, from their split.json."""
    lines = [
        f"{'protocol':10}{'split':7}{'rows':>8}{'texts':>8}{'in training':>13}{'look-up':>9}  file"
    ]
    for place in (folder, folder / "unseen"):
        about = json.loads((place / "split.json").read_text(encoding="utf-8"))
        for name, split in about["splits"].items():
            lines.append(
                f"{about['protocol']:10}{name:7}{split['rows']:8,}{split['distinct_texts']:8,}"
                f"{split['share_in_train']:13.1%}{split['lookup_accuracy']:9.1%}  "
                f"{place / f'{name}_simple.csv'}"
            )
    return "\n".join(lines)
