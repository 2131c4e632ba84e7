"""One raw file, its texts made in several ways, cut into the same folds: what is a text worth?

    .venv/bin/python -m script.variants FILE ENCODING OUTPUT_DIR VARIANT...

A variant is the cleaning and the columns, as `original:title` or `none:title,tags`. Of each video
the first row counts; its fold follows from its cleaned title, so that equal titles stay together
and row by row the files of all variants hold the same videos. Writes OUTPUT_DIR/VARIANT/FOLD/, see
script/folds.py, with `-` for the signs.
"""

import argparse
import hashlib
import re
from pathlib import Path

from runtime.csv_reader import DataError
from script import folds, splits

FOLDS = 5


def write(path: str, encoding: str, output_dir: str, variants: list[str]) -> None:
    """Write the files of each variant.

    Raises: DataError for a file that cannot be read, or a variant that is none.
    """
    ways = [variant.partition(":")[::2] for variant in variants]
    columns = {"title", *(name for _, names in ways for name in names.split(","))}
    for variant, (cleaning, names) in zip(variants, ways, strict=True):
        if cleaning not in splits.CLEANINGS or not set(names.split(",")) <= set(
            splits.TEXT_COLUMNS
        ):
            raise DataError(f"'{variant}' is no variant: give one such as none:title,tags")
    raw = splits.read_raw(path, encoding, sorted(columns))
    labels, _ = splits.make_labels(raw["category_id"], 0.70, splits.CATEGORY_NAMES)
    cleaned = splits.make_texts(raw, ["title"], "original")
    digest = cleaned.map(lambda text: int(hashlib.sha256(text.encode()).hexdigest(), 16) % FOLDS)
    texts = [splits.make_texts(raw, names.split(","), cleaning) for cleaning, names in ways]
    kept = ~raw["video_id"].duplicated() & (cleaned != "")
    for text in texts:
        kept &= text != ""
    for variant, text in zip(variants, texts, strict=True):
        folder = Path(output_dir) / re.sub(r"\W+", "-", variant)
        folder.parent.mkdir(parents=True, exist_ok=True)
        table = raw.assign(text=text, label=labels, fold=digest)[kept]
        table[["text", "label", "fold"]].to_csv(folder.with_suffix(".csv"), index=False)
        folds.cut(str(folder.with_suffix(".csv")), str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("encoding")
    parser.add_argument("output_dir")
    parser.add_argument("variants", nargs="+", metavar="variant")
    args = parser.parse_args()
    try:
        write(args.file, args.encoding, args.output_dir, args.variants)
    except DataError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
