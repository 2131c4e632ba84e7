"""From raw `USvideos.csv` to split files: reading, cleaning, labels, and two split protocols.

`preprocessing.ipynb` explains and calls these functions; `script/preprocess.py` runs it.
"""

import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from sklearn.model_selection import train_test_split

from arguments import USES
from runtime.advice import row_list
from runtime.csv_reader import Table, text_key
from runtime.file_format import FileFormat
from runtime.files import UserError, name_list, read_json
from runtime.flags import QUOTINGS, boolean, column_names, encoding, number
from runtime.labels import label_key
from script.groups import FEW_ROWS, SAMPLE_FILE, connected, cut_groups, keep_training_labels

RAW_FILES = ("csv/USvideos.csv", "csv/USvideo.csv")
TEXT_COLUMNS = ("title", "channel_title", "tags", "description")
GROUPINGS = ("video", "channel", "time")
# The columns' names in the first version of the data set, which the code uses, and newer names.
DEFAULT_COLUMNS = {
    "label_column": "category_id", "date_column": "trending_date", "id_column": "video_id"
}  # fmt: skip
NEWER_NAMES = {"categoryId": "category_id", "channelTitle": "channel_title"}
DATE_FORMATS = ("%y.%d.%m", "ISO8601")  # of the first and of the newer version
MANY_LOSSES = 0.1  # share of the texts from which cleaning drops words
FOLDERS = {"original": ".", "unseen": "unseen"}  # of the protocols, inside output_dir

# Category names: by id of the YouTube Data API, used if no XX_category_id.json is next to the raw
# file. Stop words: NLTK's English list of 179, which the original used; the nltk package would
# download it at run time.
TABLES = read_json(Path(__file__).with_suffix(".json"))
CATEGORY_NAMES = {int(number): name for number, name in TABLES["category_names"].items()}
STOP_WORDS = frozenset(" ".join(TABLES["stop_words"]).split())


def find_raw(input_file: str | None) -> tuple[str, bool]:
    """Return the raw file's path, and whether it is the synthetic sample.

    It is `input_file`, or else the real file in csv/, or else the sample.
    """
    real = (path for path in RAW_FILES if Path(path).exists())
    path = input_file or next(real, SAMPLE_FILE)
    return path, Path(path).name == Path(SAMPLE_FILE).name


def read_raw(
    path: str,
    encoding: str,
    text_columns: list[str],
    *,
    label_column: str | None = None,
    date_column: str | None = None,
    date_format: str | None = None,
    id_column: str | None = None,
    group_by: str = "video",
    **dialect,
) -> pd.DataFrame:
    """Read the raw rows, as text except the added `category_id`, `day` and `video_id`.

    Columns get the names of the data set's first version. The table's `attrs["found"]` has the
    parameters that were used for None, `attrs["counts"]` the malformed rows that were dropped.
    `category_id` is an int, or a name if the label column has names. Columns of dates and ids may
    be missing if not needed: `day` is then the row's number and `video_id` the text. An invalid id
    gets the text appended: spreadsheets turn ids that start with a minus into "#NAME?".

    dialect: fields of `FileFormat`.
    Raises: UserError for a malformed file, a missing column, and rows with an invalid category
        id or date.
    """
    form = FileFormat(label_column_name=(), encodings=(encoding,), flag_form="-p {} {}", **dialect)
    file = Table(path, form)
    header = file.header
    newer = {old: new for new, old in NEWER_NAMES.items() if new in header and old not in header}
    given = {"label_column": label_column, "date_column": date_column, "id_column": id_column}
    found = {key: given[key] or newer.get(name, name) for key, name in DEFAULT_COLUMNS.items()}
    dated = bool(group_by == "time" or date_column or date_format)  # are dates needed?
    texts = [newer.get(name, name) for name in text_columns]
    needed = dict.fromkeys(texts, "text_columns") | {found["label_column"]: "label_column"}
    needed |= {found["date_column"]: "date_column"} if dated else {}
    needed |= {id_column: "id_column"} if id_column else {}
    if group_by == "channel":
        needed[newer.get("channel_title", "channel_title")] = "group_by"
    for name in {**needed, **dict.fromkeys(found.values())}:
        if name in needed and name not in header:
            names = name_list(map(repr, header))
            raise UserError(f"{path} has no column {name!r}; it has {names}: set -p {needed[name]}")
        if header.count(name) > 1:
            raise UserError(f"{path} has the column {name!r} more than once: rename one")
    table = next(file.frames())
    for remark in file.remarks():
        print(f"warning: {remark}")
    ids = text = table[texts].agg(" ".join, axis=1)
    if (column := found["id_column"]) in table:
        valid = r"[\w-]{11}" if column == "video_id" else r"[^#\s].*"
        ids = table[column].where(table[column].str.fullmatch(valid), table[column] + " " + text)
    label = parse_labels(path, table[found["label_column"]])
    day, found["date_format"] = parse_days(path, table, found["date_column"], date_format, dated)
    table = table.rename(columns={new: old for old, new in newer.items()})
    table = table.assign(category_id=label, video_id=ids, day=day)
    counts = {"rows_malformed": file.malformed} if file.malformed else {}
    table.attrs |= {"found": found, "counts": counts}
    return table


def parse_labels(path: str, column: pd.Series) -> pd.Series:
    """Return each row's category id as an int, or its name.

    Raises: UserError for an empty cell, or for a name among numbers.
    """
    label = column.map(label_key)
    is_number = label.str.fullmatch(r"\d+")
    is_id = NEWER_NAMES.get(column.name, column.name) == "category_id" and is_number.any()
    good, wanted = (is_number, "a whole number") if is_id else (label != "", "given")
    check_column(path, column, good, wanted, "-p label_column")
    return label.astype(int) if is_number.all() else label


def parse_days(
    path: str, table: pd.DataFrame, column: str, date_format: str | None, needed: bool
) -> tuple[pd.Series, str]:
    """Return each row's day, and the dates' format; without a given one, the one that most have.

    If dates are not needed, and there is none in the format, the day is the row's number.
    Raises: UserError for invalid dates, and for a format that Python does not know.
    """
    formats = (date_format,) if date_format else DATE_FORMATS
    if column not in table:
        return table.index.to_series(), formats[0]
    options = {"errors": "coerce", "utc": True}
    try:
        days = {form: pd.to_datetime(table[column], format=form, **options) for form in formats}
    except ValueError as error:
        raise UserError(
            f"parameter date_format is {date_format!r}: {error}; set it to one such as %d/%m/%Y"
        ) from None
    form = max(days, key=lambda form: days[form].count())
    if not needed and days[form].isna().all():
        print(
            f"warning: {column} is not a date in the format {' or '.join(formats)}: the rows are "
            "taken to be in order of time (-p date_format)"
        )
        return table.index.to_series(), form
    wanted = f"a date in the format {form}"
    advice = "-p date_format, such as %d/%m/%Y, or -p date_column"
    check_column(path, table[column], days[form].notna(), wanted, advice)
    return days[form], form


def check_column(path: str, column: pd.Series, good: pd.Series, wanted: str, other: str) -> None:
    """Raise a UserError that lists the rows of a column that are not good; other: a parameter."""
    if not good.all():
        rows = row_list([*column.index[~good]])
        fix = "correct or remove these rows (is a quote missing in the row above?) or "
        advice = f"{fix * bool(good.any())}set {other}"
        raise UserError(f"{path}: {column.name} is not {wanted} in {rows}: {advice}")


def category_names(path: str, ids: pd.Series) -> dict[int, str]:
    """Return a distinct name for each id.

    It comes from the file beside the raw file that is named after its country, as
    `KR_category_id.json` of `KRvideos.csv`, or else from `US_category_id.json`, if they exist.

    Raises: UserError if that file is not the data set's.
    """
    names, raw = CATEGORY_NAMES, Path(path)
    country = raw.name[:2] if re.match("[A-Z]{2}(videos|_)", raw.name) else "US"
    files = [raw.with_name(f"{name}_category_id.json") for name in (country, "US")]
    if file := next(filter(Path.exists, files), None):
        try:
            items = read_json(file)["items"]
            names = names | {int(item["id"]): item["snippet"]["title"] for item in items}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is no valid category file ({error!r}): remove it") from None
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


# The start of a word with letters that the original's cleaning drops: its first is not a to z.
DROPPED_WORD = re.compile(r"(?<![^\W_])\d*[^\W\d_a-zA-Z]")
CLEANINGS = {"original": clean, "none": lambda text: " ".join(text.split())}


def one_of(words: Sequence[str], text: str) -> str:
    """Check that a parameter is one of the words."""
    if text not in words:
        raise ArgumentTypeError(f"'{text}' is not one of {', '.join(words)}")
    return text


def text_columns(text: str) -> list[str]:
    """Return the columns' names in the data set's first version."""
    return [one_of(TEXT_COLUMNS, NEWER_NAMES.get(name, name)) for name in column_names(text)]


SHARE = number(float, 0, 0.999999, open_low=True)
OPTIONAL = "input_file label_column date_column date_format id_column top_quantile".split()
PARAMETERS = {  # of the notebook, with their types
    **dict.fromkeys(OPTIONAL, str), "output_dir": str, "csv_encoding": encoding,
    "quoting": partial(one_of, QUOTINGS), "drop_malformed": boolean,
    "seed": number(int, 0, 2**32 - 1), "text_columns": text_columns,
    "cleaning": partial(one_of, CLEANINGS), "top_quantile": SHARE, "balance": boolean,
    "group_by": partial(one_of, GROUPINGS), "train_share": SHARE, "test_share": SHARE,
}  # fmt: skip


def check_parameters(**parameters) -> dict:
    """Return the notebook's parameters, or texts such as `title,tags`, as values of their types.

    Raises: UserError naming the parameter.
    """
    checked = {}
    for name, value in parameters.items():
        if name not in PARAMETERS:
            raise UserError(f"-p {name}: no such parameter; use {', '.join(PARAMETERS)}")
        text = ",".join(value) if isinstance(value, list) else str(value)
        try:
            is_none = text == "None" and name in OPTIONAL
            checked[name] = None if is_none else PARAMETERS[name](text)
        except ArgumentTypeError as error:
            raise UserError(f"parameter {name}: {error}") from None
    return checked


def make_texts(raw: pd.DataFrame, text_columns: list[str], cleaning: str) -> pd.Series:
    r"""Make one text per row: the columns in the given order, joined by " | ", then cleaned.

    The tags `a"|"b` become `a, b`, "[none]" (newer: "[None]") becomes blank, and the two
    characters `\n` of descriptions become a space.
    """
    columns = raw[text_columns].copy()
    if "tags" in columns:
        tags = columns["tags"].str.replace('"', "").str.replace("|", ", ")
        columns["tags"] = tags.replace(["[none]", "[None]"], "")
    if "description" in columns:
        columns["description"] = columns["description"].str.replace(r"\n", " ")
    joined = [" | ".join(filter(str.strip, row)) for row in columns.to_numpy()]
    return pd.Series(joined, index=raw.index, dtype=object).map(CLEANINGS[cleaning])


def drop_empty(table: pd.DataFrame, text_columns: list[str]) -> tuple[pd.DataFrame, dict[str, int]]:
    """Drop rows without a text, before or after cleaning; count both kinds and print the counts.

    Also prints the share of the other rows whose text lost words with letters, if it is large.
    Raises: UserError if no row is left.
    """
    whole, keep = make_texts(table, text_columns, "none"), "-p cleaning none keeps them"
    blank, empty = whole == "", table["text"] == ""
    counts = {
        "rows_without_text": int(blank.sum()),
        "rows_cleaned_away": int((empty & ~blank).sum()),
    }
    if blank.any():
        rows = row_list([*table.index[blank]])
        print(f"warning: dropped {blank.sum():,} of {len(table):,} rows without a text: {rows}")
    if count := counts["rows_cleaned_away"]:
        what = f"{count:,} of {len(table):,} rows whose text is empty after cleaning"
        print(f"warning: dropped {what}: {keep}")
    if empty.all():
        advice = f" after cleaning: {keep}" if count else ": set -p text_columns"
        raise UserError(f"none of the {len(table):,} rows has a text{advice}")
    lost = (whole.str.contains(DROPPED_WORD) & ~table["text"].str.contains(DROPPED_WORD))[~empty]
    if lost.mean() > MANY_LOSSES:
        print(
            "warning: cleaning dropped words that do not start with a letter from a to z in "
            f"{lost.mean():.0%} of the remaining texts: {keep}"
        )
    return table[~empty], counts


def make_labels(
    category_ids: pd.Series, top_quantile: float | None, names: dict[int, str]
) -> tuple[pd.Series, dict[str, str]]:
    """Return each row's label, and the name of each label.

    With a quantile, as in the original: the categories with more rows than that quantile of all
    categories' counts are 0, 1, ... by descending count; all others share the next number. If no
    category has more, since several are equally frequent, the most frequent ones are numbered.
    With None each category's name is its label.

    Raises: UserError if there is only one category.
    """
    if category_ids.nunique() < 2:
        name = names.get(category_ids.iloc[0], category_ids.iloc[0])
        raise UserError(f"all rows have one category, {name}: add others, or set -p label_column")
    if top_quantile is None:
        labels = category_ids.map(names)
        return labels, {name: name for name in sorted(set(labels))}
    counts = category_ids.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    top = counts.index[counts > min(counts.quantile(top_quantile), counts.max() - 1)]
    numbers = {category: str(number) for number, category in enumerate(top)}
    titles = {number: names[category] for category, number in numbers.items()}
    other = {str(len(top)): "other"} if len(top) < len(counts) else {}
    return category_ids.map(numbers).fillna(str(len(top))), titles | other


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
        strata = rest["label"]
        if strata.value_counts().min() < 2:
            print("warning: original: not stratified, since a label has one row outside training")
            strata = None
        test, val = train_test_split(
            rest, train_size=test_share, random_state=seed, stratify=strata
        )
    except ValueError:
        raise UserError(
            f"too few rows ({len(table)}) for these shares and labels: add rows, or set "
            "-p train_share and -p test_share"
        ) from None
    if balance:
        labels = train.groupby("label")
        rarest = labels.size().min()
        if rarest < FEW_ROWS:
            print(
                f"warning: original: balanced to {rarest} training rows per label, the number of "
                "the rarest: useless for training; use -p balance False or a higher "
                "-p top_quantile"
            )
        train = labels.sample(n=rarest, random_state=seed)
    return keep_training_labels({"train": train, "val": val, "test": test})


def unseen_splits(
    table: pd.DataFrame, seed: int, train_share: float, test_share: float, group_by: str
) -> dict[str, pd.DataFrame]:
    """Split by video: each is one row, and no text is in two splits.

    Videos with equal texts stay together and, with `group_by="channel"`, so do all videos of a
    channel. With "time" the earliest videos are for training and the latest for test.

    Raises: UserError if there are too few videos.
    """
    videos = table.sort_values("day", kind="stable").drop_duplicates("video_id")
    others = [videos["channel_title"]] if group_by == "channel" else []
    groups = connected(videos["text"].map(text_key), *others)
    if (count := len(set(groups))) < 3:
        advice = ", or use -p group_by video" if others else ""
        raise UserError(f"too few videos to split: they form {count} groups: add videos{advice}")
    shares = [train_share, (1 - train_share) * (1 - test_share), (1 - train_share) * test_share]
    order = videos["day"] if group_by == "time" else None
    part = cut_groups(groups, videos["label"], shares, seed, order)
    return keep_training_labels({name: videos[part == n] for n, name in enumerate(USES.values())})
