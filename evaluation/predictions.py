"""predictions.csv: the rows of the test file, with what the model predicts for them."""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from dataset import Data
from model.predictions import Predictions
from runtime.files import UserError, writing

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def added_columns(names: list[str]) -> list[str]:
    """Return the columns that predictions.csv adds to the input's columns."""
    return ["predicted", "confidence", *(f"probability_{name}" for name in names)]


def check_columns(data: Data) -> None:
    """Check the test file. Raises: UserError if it has a column that the predictions add."""
    if data.test is None:
        return
    if clash := set(data.test.columns).intersection(added_columns(data.names)):
        raise UserError(
            f"{data.test.path} has a column '{min(clash)}', which the predictions would add: "
            "rename it"
        )


@contextmanager
def prediction_writer(
    path: Path, columns: list[str], names: list[str], safe: bool = False
) -> Iterator[Callable[[pd.DataFrame, Predictions], None]]:
    """Open predictions.csv: one row per input row, in order. Yields a function that adds a chunk.

    A row has the input's `columns` and the `added_columns`. Strings are quoted, to keep any text.
    safe: put an apostrophe before text that a spreadsheet would execute as a formula
    (https://owasp.org/www-community/attacks/CSV_Injection).
    """

    def cell(text: str) -> str:
        return f"'{text}" if safe and text.startswith(FORMULA_STARTS) else text

    with writing(path), open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(map(cell, [*columns, *added_columns(names)]))

        def add(table: pd.DataFrame, found: Predictions) -> None:
            figures = np.hstack([found.confidence[:, None], found.probability]).astype(float)
            values = np.round(figures, 6).tolist()
            for row, label, rest in zip(table.to_numpy(), found.named(names), values, strict=True):
                writer.writerow([*map(cell, [*row, label]), *rest])

        yield add
