"""Rows whose label is the least plausible to models that did not see their text.

N rows, C classes.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from dataset import Split
from runtime.labels import label_key, label_numbers

COLUMNS = ["text", "label", "suggestion", "margin", "file", "row"]
LISTED, SHOWN = 200, 20  # in the file, and in the report


def label_margins(
    labels: list[str], probability: np.ndarray, names: list[str]
) -> tuple[np.ndarray, list[str]]:
    """Return the margin of each label, float [N], and the most probable other label.

    The margin is the difference of their probabilities: the normalised margin of Northcutt et al.
    2021, "Confident learning", https://arxiv.org/abs/1911.00068. probability: [N, C], in the order
    of `names`.
    """
    numbers = label_numbers(names)
    rows, own = np.arange(len(labels)), np.array([numbers[label_key(label)] for label in labels])
    others = probability.copy()
    others[rows, own] = -1
    best = others.argmax(axis=1)
    return probability[rows, own] - others[rows, best], [names[number] for number in best]


def file_margins(runs: list[tuple[dict, Split]], seen_keys: set[str]) -> pd.DataFrame:
    """Average the test predictions of runs on the same file, and compute the margins of its labels.

    runs: from `read_run`. seen_keys: of the texts to leave out. Returns a table with `COLUMNS`.
    """
    if not runs:
        return pd.DataFrame(columns=COLUMNS)
    record, split = runs[0]
    names = record["labels"]
    columns = [f"probability_{name}" for name in names]
    each = [other.table[columns].to_numpy(dtype=float) for _, other in runs]
    margin, suggestion = label_margins([one for (one,) in split.labels], np.mean(each, 0), names)
    found = pd.DataFrame({"text": split.texts, "label": [one for (one,) in split.labels]})
    found = found.assign(suggestion=suggestion, margin=margin.round(6), row=split.rows)
    found["file"] = record["data"]["test"]["path"]
    return found[[key not in seen_keys for key in split.keys]][COLUMNS]


def least_plausible(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of negative margin, the least plausible first; each text and label once."""
    found = pd.concat([pd.DataFrame(columns=COLUMNS), *tables]).sort_values("margin", kind="stable")
    return found[found["margin"] < 0].drop_duplicates(["text", "label"]).head(LISTED)
