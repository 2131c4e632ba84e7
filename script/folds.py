"""Make split files in which each fold is the test file once.

    .venv/bin/python -m script.folds FILE OUTPUT_DIR
    .venv/bin/python -m script.folds RAW_FILE OUTPUT_DIR --variants original:title none:title,tags

FILE has the columns text, label and fold. Writes OUTPUT_DIR/FOLD/{train,val,test}_simple.csv; the
validation file is a tenth of the other folds, cut as script/split.py cuts it: rows with the same
text stay together, and each label has its share. The fold's number is the seed. Up to commit
2998138 this tenth was drawn row by row: earlier folds have other validation files, but equal test
files.

With --variants the file is a raw one, and each variant CLEANING:COLUMN,... makes its own texts from
it. Only the first row of each video is used. Its fold is a function of its cleaned title, so equal
titles stay together, and all variants have the same videos in the same files, row by row. Writes
OUTPUT_DIR/VARIANT/FOLD/, with `-` for `:` and `,`.
"""

import hashlib
import re
from pathlib import Path

import pandas as pd

from runtime.csv_reader import Table, text_key
from runtime.file_format import FileFormat
from runtime.files import UserError
from runtime.flags import Parser, encoding
from script import youtube
from script.groups import connected, cut_groups

FOLDS = 5  # with --variants


def cut(table: pd.DataFrame, output_dir: Path) -> None:
    """Write the split files of each fold of a table with text, label, fold and group.

    Rows of a group are not divided between training and validation file.
    Raises: UserError if there is only one fold.
    """
    names = sorted(table["fold"].astype(str).unique())
    if len(names) < 2:
        raise UserError("the file has only one fold, which leaves no training rows: use more")
    for number, fold in enumerate(names):
        is_test = table["fold"].astype(str) == fold
        test, rest = table[is_test], table[~is_test]
        chosen = cut_groups(rest["group"], rest["label"], [0.9, 0.1], number) == 1
        folder = output_dir / fold
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("train", rest[~chosen]), ("val", rest[chosen]), ("test", test)):
            part[["text", "label"]].to_csv(folder / f"{name}_simple.csv", index=False)
        print(f"{folder}: train {(~chosen).sum()}, val {chosen.sum()}, test {len(test)} rows")


def make_variants(path: str, encoding: str, variants: list[str]) -> dict[str, pd.DataFrame]:
    """Make a table with text, label, fold and group for each variant of a raw file.

    Videos are in a group if they have the same title, or the same text in any variant.
    Raises: UserError for a file that cannot be read, or an unknown variant.
    """
    parts = {variant: variant.partition(":")[::2] for variant in variants}
    for variant, (cleaning, names) in parts.items():
        if cleaning not in youtube.CLEANINGS or not {*names.split(",")} <= {*youtube.TEXT_COLUMNS}:
            raise UserError(f"'{variant}' is not a variant: use one such as none:title,tags")
    columns = {"title", *(name for _, names in parts.values() for name in names.split(","))}
    raw = youtube.read_raw(path, encoding, sorted(columns))
    labels, _ = youtube.make_labels(raw["category_id"], 0.70, youtube.CATEGORY_NAMES)
    title = youtube.make_texts(raw, ["title"], "original")
    fold = title.map(lambda text: int(hashlib.sha256(text.encode()).hexdigest(), 16) % FOLDS)
    texts = {
        variant: youtube.make_texts(raw, names.split(","), cleaning)
        for variant, (cleaning, names) in parts.items()
    }
    kept = ~raw["video_id"].duplicated() & (title != "")
    for text in texts.values():
        kept &= text != ""
    keys = [text[kept].map(text_key) for text in (title, *texts.values())]
    group = pd.Series(connected(*keys), index=keys[0].index)
    return {
        variant: raw.assign(text=text, label=labels, fold=fold, group=group)[kept]
        for variant, text in texts.items()
    }


def main() -> None:
    parser = Parser("python -m script.folds", __doc__)
    parser.add_argument("file")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--csv_encoding", type=encoding, default="utf-8")
    args = parser.parse_args()
    try:
        if args.variants:
            tables = make_variants(args.file, args.csv_encoding, args.variants)
            for variant, table in tables.items():
                cut(table, args.output_dir / re.sub(r"\W+", "-", variant))
        else:
            form = FileFormat(encodings=(args.csv_encoding,))
            table = next(Table(args.file, form, ["text", "label", "fold"]).frames())
            cut(table.assign(group=table["text"].map(text_key)), args.output_dir)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
