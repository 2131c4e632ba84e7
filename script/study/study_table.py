"""The table of a study: figures by protocol and method.

Runs are the dictionaries of `script.study.compare.read`.
"""

import numpy as np
import pandas as pd

from evaluation.intervals import BINS
from evaluation.metrics import calibration_error, confidence_counts
from model.schedule import coming_texts
from script.study.significance import Scores

ACCURACIES = {  # columns of the table: over the texts of which `seen`
    "accuracy": (True, False),
    "on seen": (True,),
    "on unseen": (False,),
}
MEANS = {  # columns of the table: means of the runs' figures, with their keys in all_results.json
    "seen": "test_seen_share",
    "macro F1": "test_macro_f1",
    "log loss": "test_loss",
    "ECE": "test_ece",
    "by chance": "test_ece_by_chance",
    "trained": "trainable_parameters",
    "bytes": "stored_bytes",
    "seconds": "train_runtime",
    "rows/s": "predict_samples_per_second",
    "memory": "peak_memory_bytes",
    "schedule": "schedule_seen_share",
}
COLUMNS = [*ACCURACIES, *MEANS, "pooled ECE"]  # the last: of the rows of all runs together


def summarise(runs: list[dict]) -> list[dict]:
    """Compute the columns of the table by protocol and method, and the accuracies' intervals."""
    rows = []
    for protocol, method in dict.fromkeys((run["protocol"], run["method"]) for run in runs):
        ours = [run for run in runs if (run["protocol"], run["method"]) == (protocol, method)]
        row = {"protocol": protocol, "method": method, "runs": len(ours)}
        predictions = pd.concat(run["predictions"] for run in ours)
        for column, which in ACCURACIES.items():
            table = predictions[predictions["seen"].isin(which)]
            scores = Scores(table) if len(table) else None
            row[column] = scores and scores.mean
            row[f"{column} interval"] = scores and scores.interval()
        for column, key in MEANS.items():
            values = [run["results"][key] for run in ours if run["results"].get(key) is not None]
            row[column] = float(np.mean(values)) if values else None
        row["pooled ECE"] = pooled_error(ours)
        rows.append(row)
    return rows


def pooled_error(runs: list[dict]) -> float:
    """Compute the calibration error of the test rows of all runs together.

    With more rows, less of it is chance; errors in opposite directions cancel.
    """
    counts = 0
    for run in runs:
        confidence = run["scored"][1].table["confidence"].to_numpy(dtype=float)
        counts += confidence_counts(confidence, run["predictions"]["right"].to_numpy(), BINS)
    return calibration_error(counts)


def format_cell(row: dict, column: str) -> str:
    """Format a cell of the table."""
    value, ends = row[column], row.get(f"{column} interval")
    if value is None or (column in ("trained", "bytes") and not value):
        return "-"
    if column == "schedule":
        return f"{coming_texts(value)}, {100 * value:.0f} %"
    if column == "memory":
        return f"{value / 2**30:.2f} GiB"
    if column == "bytes":
        return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.0f} kB"
    if column in ("trained", "seconds", "rows/s"):
        return f"{value:,.0f}"
    return f"{value:.4f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")
