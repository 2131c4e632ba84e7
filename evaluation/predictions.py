"""The rows of the test and the validation file, with what the model predicts for them, as CSV."""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from dataset import Data
from model.predictions import Predictions
from runtime.files import UserError, writing

FILES = {"test": "predictions.csv", "eval": "validation_predictions.csv"}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def added_columns(names: list[str], reject_below: float = 0.0) -> list[str]:
    """Return the columns that are added to the input's columns."""
    rejected = ["rejected"] if reject_below else []
    return ["predicted", "confidence", *rejected, *(f"probability_{name}" for name in names)]


def check_columns(data: Data, reject_below: float = 0.0) -> None:
    """Check the files. Raises: UserError if one has a column that the predictions add."""
    for file in filter(None, (data.eval, data.test)):
        check_added(file.path, file.columns, data.names, reject_below)


def check_added(path: str, columns: list[str], names: list[str], reject_below: float = 0.0) -> None:
    """Check one file's columns. Raises: see `check_columns`."""
    if clash := set(columns).intersection(added_columns(names, reject_below)):
        raise UserError(
            f"{path} has a column '{min(clash)}', which the predictions would add: rename it"
        )


@contextmanager
def prediction_writer(
    path: Path, columns: list[str], names: list[str], safe: bool = False, reject_below: float = 0.0
) -> Iterator[Callable[[pd.DataFrame, Predictions], None]]:
    """Open a file with one row per input row, in order. Yields a function that adds a chunk.

    A row has the input's `columns` and the `added_columns`. Strings are quoted, to keep any text.
    safe: put an apostrophe before text that a spreadsheet would execute as a formula
    (https://owasp.org/www-community/attacks/CSV_Injection). reject_below: if it is not 0, the
    column `rejected` says whether the confidence is lower, as True or False.
    """

    def cell(text: str) -> str:
        return f"'{text}" if safe and text.startswith(FORMULA_STARTS) else text

    with writing(path), open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(map(cell, [*columns, *added_columns(names, reject_below)]))

        def add(table: pd.DataFrame, found: Predictions) -> None:
            figures = np.hstack([found.confidence[:, None], found.probability]).astype(float)
            values = np.round(figures, 6).tolist()
            labels, rejected = found.named(names), found.confidence < reject_below
            for row, label, unsure, (confidence, *rest) in zip(
                table.to_numpy(), labels, rejected, values, strict=True
            ):
                marked = [bool(unsure)] if reject_below else []
                writer.writerow([*map(cell, [*row, label]), confidence, *marked, *rest])

        yield add
