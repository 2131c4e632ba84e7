"""From raw `USvideos.csv` to split files: reading, cleaning, labels, and two split protocols.

`preprocessing.ipynb` explains and calls these functions; `script/preprocess.py` runs it.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from arguments import USES
from runtime.csv_reader import Table, row_list, text_key
from runtime.file_format import FileFormat
from runtime.files import UserError, read_json
from runtime.labels import label_key
from script.groups import (
    FEW_ROWS,
    SAMPLE_FILE,
    connected,
    cut_groups,
    keep_training_labels,
    write_splits,
)

RAW_FILES = ("csv/USvideos.csv", "csv/USvideo.csv")
TEXT_COLUMNS = ("title", "channel_title", "tags", "description")
GROUPINGS = ("video", "channel", "time")
FOLDERS = {"original": ".", "unseen": "unseen"}  # of the protocols, inside output_dir

# Category ids of the YouTube Data API, used if US_category_id.json is not next to the raw file.
CATEGORY_NAMES = {
    1: "Film & Animation", 2: "Autos & Vehicles", 10: "Music", 15: "Pets & Animals", 17: "Sports",
    18: "Short Movies", 19: "Travel & Events", 20: "Gaming", 21: "Videoblogging",
    22: "People & Blogs", 23: "Comedy", 24: "Entertainment", 25: "News & Politics",
    26: "Howto & Style", 27: "Education", 28: "Science & Technology",
    29: "Nonprofits & Activism", 30: "Movies", 31: "Anime/Animation", 32: "Action/Adventure",
    33: "Classics", 34: "Comedy", 35: "Documentary", 36: "Drama", 37: "Family", 38: "Foreign",
    39: "Horror", 40: "Sci-Fi/Fantasy", 41: "Thriller", 42: "Shorts", 43: "Shows", 44: "Trailers",
}  # fmt: skip

# NLTK's English stop list of 179 words, which the original used; the nltk package would download
# it at run time.
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


def check_parameters(**parameters) -> dict:
    """Check the notebook's parameters; `text_columns` may be one string, `title,tags`.

    Raises: UserError naming the parameter.
    """
    columns = parameters["text_columns"]
    columns = columns.split(",") if isinstance(columns, str) else list(columns)
    valid = len(columns) == len(set(columns)) > 0 and set(columns) <= set(TEXT_COLUMNS)
    quantile, seed = parameters["top_quantile"], parameters["seed"]
    share = "a number between 0 and 1"
    for name, good, wanted in (
        ("text_columns", valid, f"some of {', '.join(TEXT_COLUMNS)}, each once"),
        ("cleaning", parameters["cleaning"] in CLEANINGS, f"one of {', '.join(CLEANINGS)}"),
        ("group_by", parameters["group_by"] in GROUPINGS, f"one of {', '.join(GROUPINGS)}"),
        ("top_quantile", quantile is None or is_share(quantile), f"{share}, or None"),
        ("balance", isinstance(parameters["balance"], bool), "True or False"),
        ("seed", type(seed) is int and 0 <= seed < 2**32, "a whole number from 0 to 4294967295"),
        ("train_share", is_share(parameters["train_share"]), share),
        ("test_share", is_share(parameters["test_share"]), share),
    ):
        if not good:
            raise UserError(f"parameter {name} is {parameters[name]!r}: set it to {wanted}")
    return parameters | {"text_columns": columns}


def is_share(value: object) -> bool:
    """Return whether a value is a number strictly between 0 and 1."""
    return isinstance(value, float) and 0 < value < 1


def find_raw(input_file: str | None) -> tuple[str, bool]:
    """Return the raw file's path, and whether it is the synthetic sample.

    It is `input_file`, or else the real file in csv/, or else the sample.
    """
    real = (path for path in RAW_FILES if Path(path).exists())
    path = input_file or next(real, SAMPLE_FILE)
    return path, Path(path).name == Path(SAMPLE_FILE).name


def fix_tags(line: str) -> str:
    r"""Turn the raw file's tags into valid CSV: `"a"|"b"` becomes one field, `"a""|""b"`.

    A lenient reader would accept the tags unchanged, but also a field that is cut off.
    """
    return re.sub(r'(?<=[^",])"\|"(?=[^",])', '""|""', line)


def read_raw(
    path: str,
    encoding: str,
    text_columns: list[str],
    *,
    label_column: str = "category_id",
    date_column: str = "trending_date",
    date_format: str = "%y.%d.%m",
    id_column: str = "video_id",
    group_by: str = "video",
) -> pd.DataFrame:
    """Read the raw rows, as text except the added `category_id`, `day` and `video_id`.

    `category_id` is an int, or a name if the label column has names. The default date and id
    columns may be missing: `day` is then the row's number and `video_id` the text. An invalid id
    gets the text appended: spreadsheets turn ids that start with a minus into "#NAME?", which many
    videos share.

    Raises: UserError for a malformed file, a missing column, and rows with an invalid category
        id or date.
    """
    needed = {"text_columns": text_columns, "label_column": [label_column]}
    if group_by == "time" or date_column != "trending_date":
        needed["date_column"] = [date_column]
    if id_column != "video_id":
        needed["id_column"] = [id_column]
    if group_by == "channel":
        needed["group_by"] = ["channel_title"]
    for _parameter, columns in needed.items():
        form = FileFormat((), label_column_name=(), encodings=(encoding,), flag_form="-p {} {}")
        table = Table(path, form, columns)
    table = next(table.frames()).reset_index(drop=True)
    label = table[label_column].map(label_key)
    is_number = label.str.fullmatch(r"\d+")
    is_id = label_column == "category_id" and is_number.any()
    day = pd.Series(range(len(table)))
    if date_column in table:
        try:
            day = pd.to_datetime(table[date_column], format=date_format, errors="coerce")
        except ValueError as error:
            raise UserError(f"parameter date_format is {date_format!r}: {error}") from None
    for column, good, wanted in (
        (label_column, is_number if is_id else label != "", "a whole number" if is_id else "given"),
        (date_column, day.notna(), f"a date in the format {date_format} (-p date_format)"),
    ):
        if not good.all():
            raise UserError(
                f"{path}: {column} is not {wanted} in {row_list(np.flatnonzero(~good) + 1)}: "
                "correct or remove these rows; is a quote missing in the row above?"
            )
    ids = text = table[text_columns].agg(" ".join, axis=1)
    if id_column in table:
        form = r"[\w-]{11}" if id_column == "video_id" else r"[^#\s].*"
        valid = table[id_column].str.fullmatch(form)
        ids = table[id_column].where(valid, table[id_column] + " " + text)
    label = label.astype(int) if is_number.all() else label
    return table.assign(category_id=label, video_id=ids, day=day)


def category_names(folder: Path, ids: pd.Series) -> dict[int, str]:
    """Return a distinct name for each id, from the folder's US_category_id.json if it exists.

    Raises: UserError if that file is not the data set's.
    """
    path = folder / "US_category_id.json"
    names = CATEGORY_NAMES
    if path.exists():
        try:
            items = read_json(path)["items"]
            names = names | {int(item["id"]): item["snippet"]["title"] for item in items}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no valid category file ({error!r}): replace it") from None
    if not pd.api.types.is_integer_dtype(ids):  # they are names already
        return {name: name for name in sorted(set(ids))}
    found = pd.Series({i: names.get(i, f"category {i}") for i in sorted(set(ids))})
    numbered = found + " (" + found.index.astype(str) + ")"
    return found.mask(found.duplicated(keep=False), numbered).to_dict()


def clean(text: str) -> str:
    """Clean a text as the original did: no stop words, punctuation, capitals or bare numbers."""
    kept = " ".join(word for word in text.split() if word.lower() not in STOP_WORDS)
    words = re.sub(r"[^\w\s]|_", " ", kept).lower().split()
    return " ".join(word for word in words if re.fullmatch(r"\d*[a-zA-Z]\w*", word))


CLEANINGS = {"original": clean, "none": lambda text: " ".join(text.split())}


def make_texts(raw: pd.DataFrame, text_columns: list[str], cleaning: str) -> pd.Series:
    r"""Make one text per row: the columns in the given order, joined by " | ", then cleaned.

    The tags `a"|"b` become `a, b`, "[none]" becomes blank, and the two characters `\n` of
    descriptions become a space.
    """
    columns = raw[text_columns].copy()
    if "tags" in columns:
        tags = columns["tags"].str.replace('"', "").str.replace("|", ", ")
        columns["tags"] = tags.replace("[none]", "")
    if "description" in columns:
        columns["description"] = columns["description"].str.replace(r"\n", " ")
    joined = [" | ".join(filter(str.strip, row)) for row in columns.to_numpy()]
    return pd.Series(joined, index=raw.index, dtype=object).map(CLEANINGS[cleaning])


def drop_empty(table: pd.DataFrame, text_columns: list[str]) -> tuple[pd.DataFrame, dict[str, int]]:
    """Drop rows without a text, before or after cleaning, and count both kinds."""
    blank = (table[text_columns].map(str.strip) == "").all(axis=1)
    if blank.any():
        print(f"warning: dropped rows without text: {row_list(np.flatnonzero(blank) + 1)}")
    empty = table["text"] == ""
    cleaned_away = empty & ~blank
    counts = {"rows_without_text": int(blank.sum()), "rows_cleaned_away": int(cleaned_away.sum())}
    return table[~empty], counts


def make_labels(
    category_ids: pd.Series, top_quantile: float | None, names: dict[int, str]
) -> tuple[pd.Series, dict[str, str]]:
    """Return each row's label, and the name of each label.

    With a quantile, as in the original: the categories with more rows than that quantile of all
    categories' counts are 0, 1, ... by descending count; all others share the next number. With
    None each category's name is its label.
    """
    if top_quantile is None:
        labels = category_ids.map(names)
        return labels, {name: name for name in sorted(set(labels))}
    counts = category_ids.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    top = counts.index[counts > counts.quantile(top_quantile)]
    numbers = {category: str(number) for number, category in enumerate(top)}
    titles = {number: names[category] for category, number in numbers.items()}
    other = str(len(top))
    return category_ids.map(numbers).fillna(other), titles | {other: "other"}


def original_splits(
    table: pd.DataFrame, seed: int, train_share: float, test_share: float, balance: bool
) -> dict[str, pd.DataFrame]:
    """Split rows as the original did. This leaks: a video's rows fall into every split.

    A random `train_share` of the rows is for training, balanced by down-sampling every label to
    the rarest; `test_share` of the rest is for test, stratified by label. The random draws are the
    original's: the labels of its files come out in the same order.

    Raises: UserError if there are too few rows.
    """
    try:
        train, rest = train_test_split(table, train_size=train_share, random_state=seed)
        # a label with a single row cannot be stratified
        rare = rest["label"].value_counts().min() < 2
        if rare:
            print("warning: original: not stratified, since a label has one row outside training")
        test, val = train_test_split(
            rest, train_size=test_share, random_state=seed, stratify=None if rare else rest["label"]
        )
    except ValueError as error:
        raise UserError(f"too few rows for these shares and labels: {error}") from None
    if balance:
        groups = train.groupby("label")
        each = groups.size().min()
        if each < FEW_ROWS:
            print(
                f"warning: original: balanced to {each} training rows per label, the number of the "
                "rarest: useless for training; use -p balance False or a higher -p top_quantile"
            )
        train = groups.sample(n=each, random_state=seed)
    return keep_training_labels({"train": train, "val": val, "test": test})


def unseen_splits(
    table: pd.DataFrame, seed: int, train_share: float, test_share: float, group_by: str
) -> dict[str, pd.DataFrame]:
    """Split by video: each is one row, and no text is in two splits.

    Videos with equal texts stay together and, with `group_by="channel"`, so do all videos of a
    channel. With "time" the earliest videos are for training and the latest for test.

    Raises: UserError if channel_title is needed but missing, or if there are too few videos.
    """
    if group_by == "channel" and "channel_title" not in table:
        raise UserError("group_by 'channel' needs the column channel_title")
    videos = table.sort_values("day", kind="stable").drop_duplicates("video_id")
    others = [videos["channel_title"]] if group_by == "channel" else []
    groups = connected(videos["text"].map(text_key), *others)
    if (found := len(set(groups))) < 3:
        raise UserError(f"too few videos to split: they form {found} groups of texts")
    shares = [train_share, (1 - train_share) * (1 - test_share), (1 - train_share) * test_share]
    order = videos["day"] if group_by == "time" else None
    part = cut_groups(groups, videos["label"], shares, seed, order)
    return keep_training_labels({name: videos[part == n] for n, name in enumerate(USES.values())})


def write_protocols(
    folder: Path, protocols: dict[str, dict[str, pd.DataFrame]], figures: dict, record: dict
) -> None:
    """Write each protocol's split files and split.json, see `write_splits`."""
    folders = {}
    for protocol, splits in protocols.items():
        tables = {name: split[["text", "label"]] for name, split in splits.items()}
        content = {"protocol": protocol, **record, "splits": figures[protocol]}
        folders[folder / FOLDERS[protocol]] = tables, content
    write_splits(folders)
