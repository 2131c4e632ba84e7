"""Rows whose label is the least plausible to models that did not see their text.

N rows, C classes.
"""

import numpy as np
import pandas as pd

from runtime.labels import label_key, label_numbers
from script.study.runs import NO_MEMBERS, Run
from script.study.significance import group

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


def file_margins(runs: list[Run]) -> pd.DataFrame:
    """Compute the margins of a test file's unseen texts, by the average of runs that scored it.

    Returns a table with `COLUMNS`.
    """
    record, split = runs[0].scored
    columns = [f"probability_{name}" for name in record["labels"]]
    probability = np.mean([run.scored[1].table[columns].to_numpy(dtype=float) for run in runs], 0)
    labels = [label for (label,) in split.labels]
    margin, suggestion = label_margins(labels, probability, record["labels"])
    table = {"text": split.texts, "label": labels, "suggestion": suggestion}
    table |= {"margin": margin.round(6), "file": record["data"]["test"]["path"], "row": split.rows}
    return pd.DataFrame(table)[~runs[0].predictions["seen"].to_numpy()]


def least_plausible(runs: list[Run]) -> pd.DataFrame:
    """Return the rows of negative margin, the least plausible first; each text and label once."""
    reviewers = [r for r in runs if r.protocol == "unseen" and r.method not in NO_MEMBERS]
    tables = [file_margins(ours) for ours in group(reviewers, lambda run: run.data).values()]
    table = pd.concat([pd.DataFrame(columns=COLUMNS), *tables]).sort_values("margin", kind="stable")
    return table[table["margin"] < 0].drop_duplicates(["text", "label"]).head(LISTED)
