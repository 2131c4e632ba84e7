"""Cut a CSV with a column `fold` into split files, each fold once as the test file.

    .venv/bin/python -m script.folds FILE OUTPUT_DIR

Writes OUTPUT_DIR/FOLD/{train,val,test}_simple.csv; a tenth of the other folds, drawn at random by
the fold's number, is the validation file.
"""

import sys
from pathlib import Path

import numpy as np

from dataset import read_table


def main(path: str, output_dir: str) -> None:
    """Write the files of each fold, with the columns `text` and `label`."""
    table = read_table(path, "utf-8", ["text", "label", "fold"])
    for number, fold in enumerate(sorted(table["fold"].unique())):
        test, rest = table[table["fold"] == fold], table[table["fold"] != fold]
        chosen = np.random.default_rng(number).permutation(len(rest)) < len(rest) // 10
        folder = Path(output_dir) / fold
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("train", rest[~chosen]), ("val", rest[chosen]), ("test", test)):
            part[["text", "label"]].to_csv(folder / f"{name}_simple.csv", index=False)
        print(f"{folder}: {(~chosen).sum()} rows to train on, {chosen.sum()}, {len(test)} to test")


if __name__ == "__main__":
    main(*sys.argv[1:])
