"""Rows whose label is the least plausible to models that did not see their text.

N rows, C classes.
"""

import numpy as np
import pandas as pd

from runtime.labels import label_key, label_numbers
from script.study.runs import NO_MEMBERS, Run, group

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


def least_plausible(runs: list[Run]) -> pd.DataFrame:
    """Return the test rows of negative margin, the least plausible first; each text and label once.

    The rows are those of unseen texts, the margins by the average of the runs that scored a file.
    """
    reviewers = [r for r in runs if r.protocol == "unseen" and r.method not in NO_MEMBERS]
    tables = [pd.DataFrame(columns=COLUMNS)]
    for first, *others in group(reviewers, lambda run: run.data).values():
        names, rows = first.record["labels"], first.rows
        columns = [f"probability_{name}" for name in names]
        shares = [run.rows.table[columns].to_numpy(dtype=float) for run in (first, *others)]
        labels = [label for (label,) in rows.labels]
        margin, suggestion = label_margins(labels, np.mean(shares, axis=0), names)
        table = {"text": rows.texts, "label": labels, "suggestion": suggestion}
        table |= {"margin": margin.round(6), "file": first.record["data"]["test"]["path"]}
        table = pd.DataFrame(table | {"row": rows.rows})
        tables.append(table[(table["margin"] < 0) & ~first.predictions["seen"]])
    table = pd.concat(tables).sort_values("margin", kind="stable")
    return table.drop_duplicates(["text", "label"]).head(LISTED)
