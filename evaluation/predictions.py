"""Predictions: probabilities, predicted labels and confidence of rows, computed once.

N rows, C classes.
"""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch

from dataset import LABEL_SEPARATOR, Data
from runtime.files import UserError, writing


@dataclass(frozen=True)
class Predictions:
    """Predictions of N rows, derived from their logits."""

    logits: torch.Tensor  # float32 [N, C]
    probability: np.ndarray  # softmax over the classes, or a sigmoid for each: float32 [N, C]
    label: np.ndarray  # class numbers [N]; several labels a row: [N, C] of 0 and 1
    confidence: np.ndarray  # probability of the prediction [N]

    @classmethod
    def of(cls, logits: torch.Tensor, multi_label: bool) -> Self:
        """Derive predictions from logits; multi-label: every label of probability 0.5 or more."""
        if multi_label:
            probability = logits.sigmoid().numpy()
            label = (probability >= 0.5).astype(int)
            confidence = np.maximum(probability, 1 - probability).prod(axis=1)
        else:
            probability = logits.softmax(dim=1).numpy()
            label, confidence = probability.argmax(axis=1), probability.max(axis=1)
        return cls(logits, probability, label, confidence)

    def take(self, rows: np.ndarray) -> Self:
        """Return the predictions of the selected rows, bool [N]."""
        return type(self)(*(part[rows] for part in vars(self).values()))

    def is_right(self, label_ids: np.ndarray) -> np.ndarray:
        """Return whether each row is right, bool [N]; multi-label: all of its labels."""
        right = self.label == label_ids
        return right.all(axis=1) if label_ids.ndim == 2 else right


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
    path: Path, columns: list[str], names: list[str]
) -> Iterator[Callable[[pd.DataFrame, Predictions], None]]:
    """Open predictions.csv: one row per input row, in order. Yields a function that adds a chunk.

    A row has the input's `columns` and the `added_columns`. Strings are quoted, to keep any text.
    """
    with writing(path), open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow([*columns, *added_columns(names)])

        def add(table: pd.DataFrame, found: Predictions) -> None:
            if found.label.ndim == 2:
                labels = [LABEL_SEPARATOR.join(compress(names, row)) for row in found.label]
            else:
                labels = [names[number] for number in found.label]
            figures = np.hstack([found.confidence[:, None], found.probability]).astype(float)
            rows = zip(table.to_numpy(), labels, np.round(figures, 6).tolist(), strict=True)
            for row, label, values in rows:
                writer.writerow([*row, label, *values])

        yield add
