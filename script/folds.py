"""Cut a CSV with a column `fold` into split files, each fold once as the test file.

    .venv/bin/python -m script.folds FILE OUTPUT_DIR

FILE has the columns text, label and fold. Writes OUTPUT_DIR/FOLD/{train,val,test}_simple.csv; a
tenth of the other folds, drawn at random by the fold's number, is the validation file.
"""

import argparse
from pathlib import Path

import numpy as np

from runtime.csv_reader import DataError, read_table


def cut(path: str, output_dir: str) -> None:
    """Write the files of each fold, with the columns `text` and `label`.

    Raises: DataError for a file that cannot be read, or has one fold only.
    """
    table = read_table(path, "utf-8", ["text", "label", "fold"])
    names = sorted(table["fold"].unique())
    if len(names) < 2:
        raise DataError(f"{path} has one fold only: nothing is left to train on")
    for number, fold in enumerate(names):
        test, rest = table[table["fold"] == fold], table[table["fold"] != fold]
        chosen = np.random.default_rng(number).permutation(len(rest)) < len(rest) // 10
        folder = Path(output_dir) / fold
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("train", rest[~chosen]), ("val", rest[chosen]), ("test", test)):
            part[["text", "label"]].to_csv(folder / f"{name}_simple.csv", index=False)
        print(f"{folder}: train {(~chosen).sum()}, validate {chosen.sum()}, test {len(test)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("output_dir")
    args = parser.parse_args()
    try:
        cut(args.file, args.output_dir)
    except DataError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
