"""Rows whose label is the least plausible to models that did not see their text.

N rows, C classes.
"""

import numpy as np
import pandas as pd

COLUMNS = ["text", "label", "suggestion", "margin", "file"]
LISTED = 200


def label_margins(table: pd.DataFrame, probability: np.ndarray, names: list[str]) -> pd.DataFrame:
    """Return suggestion and margin of each row of a table with the columns text and label.

    The margin is the probability of the row's label minus that of the most probable other label,
    the suggestion: the normalised margin of Northcutt et al. 2021, "Confident learning",
    https://arxiv.org/abs/1911.00068. probability: [N, C], in the order of `names`.
    """
    rows, own = np.arange(len(table)), table["label"].map(names.index).to_numpy()
    others = probability.copy()
    others[rows, own] = -1
    best = others.argmax(axis=1)
    margin = probability[rows, own] - others[rows, best]
    suggestion = [names[number] for number in best]
    return table[["text", "label"]].assign(suggestion=suggestion, margin=margin.round(6))


def least_plausible(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of negative margin, the least plausible first; each text and label once."""
    found = pd.concat(tables)[COLUMNS].sort_values("margin", kind="stable")
    return found[found["margin"] < 0].drop_duplicates(["text", "label"]).head(LISTED)
