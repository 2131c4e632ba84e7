"""The rows of the test and the validation file, with what the model predicts for them, as CSV."""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset import Data, Split
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


@dataclass(frozen=True)
class Options:
    """What a user may choose about a file of predictions."""

    safe: bool = False  # put an apostrophe before what a spreadsheet would execute as a formula
    reject_below: float = 0.0  # if not 0, the column `rejected` says whether confidence is lower


def predict_file(
    classify: Callable[[Split], torch.Tensor],
    chunks: Iterable[Split],
    columns: list[str],
    path: Path,
    names: list[str],
    multi_label: bool,
    options: Options = Options(),
    use: Callable[[Split, Predictions], None] = lambda chunk, predictions: None,
) -> int:
    """Write a CSV file with a row per input row, in order; returns the number of rows.

    A row has the input's `columns` and the `added_columns`. Strings are quoted, to keep any text
    (formulas: https://owasp.org/www-community/attacks/CSV_Injection).

    classify: rows -> logits, float32 [N, C]. names: the C labels. use: called with each chunk.
    Raises: UserError if the file cannot be written.
    """

    def cell(text: str) -> str:
        return f"'{text}" if options.safe and text.startswith(FORMULA_STARTS) else text

    rows, below = 0, options.reject_below
    with writing(path), open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(map(cell, [*columns, *added_columns(names, below)]))
        for chunk in chunks:
            predictions = Predictions.from_logits(classify(chunk), multi_label)
            confidence = predictions.confidence
            figures = np.hstack([confidence[:, None], predictions.probability]).astype(float)
            for row, label, unsure, (first, *rest) in zip(
                chunk.table.to_numpy(),
                predictions.named(names),
                (confidence < below).tolist(),
                np.round(figures, 6).tolist(),
                strict=True,
            ):
                marked = [unsure] if below else []
                writer.writerow([*map(cell, [*row, label]), first, *marked, *rest])
            rows += len(chunk)
            use(chunk, predictions)
    return rows
