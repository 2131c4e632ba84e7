"""The tables of a study: figures by protocol and method, and accuracy by number of training rows.

A row or a point is a dictionary, as in study.json; a table of formatted cells is a DataFrame.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from evaluation.intervals import BINS
from evaluation.metrics import calibration_error, confidence_counts
from evaluation.tables import shown
from model.schedule import coming_texts
from script.study.runs import Run, group
from script.study.significance import scores_of

ACCURACIES = {  # columns of the table: over the texts of which `seen`
    "accuracy": (True, False),
    "on seen": (True,),
    "on unseen": (False,),
}
count = "{:,.0f}".format


def size(value: float) -> str:
    return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.0f} kB" if value else "-"


# Columns of the table that are means of the runs' figures: keys in all_results.json, and formats.
MEANS = {
    "seen": ("test_seen_share", shown),
    "of rows": ("test_accuracy", shown),
    "macro F1": ("test_macro_f1", shown),
    "log loss": ("test_loss", shown),
    "ECE": ("test_ece", shown),
    "by chance": ("test_ece_by_chance", shown),
    "trained": ("trainable_parameters", lambda value: count(value) if value else "-"),
    "bytes": ("stored_bytes", size),
    "seconds": ("train_runtime", count),
    "rows/s": ("predict_samples_per_second", count),
    "memory": ("peak_memory_bytes", lambda value: f"{value / 2**30:.2f} GiB"),
    "schedule": (
        "schedule_seen_share",
        lambda share: f"{coming_texts(share)}, {100 * share:.0f} %",
    ),
}
POOLED = "pooled ECE"  # of the rows of all runs together: less of it is chance
FORMATS = {column: form for column, (_, form) in MEANS.items()} | {POOLED: shown}
LAST = 3  # sizes, the largest ones, over which the effect of a doubling is measured
NOTE = (
    "What the last doublings of the training texts brought, by least squares over the largest "
    "sizes (up to three). This extrapolates nothing: the next doubling may bring less."
)


def summarise(runs: list[Run]) -> list[dict]:
    """Compute the columns of the table by protocol and method, and the accuracies' intervals."""
    rows = []
    for (protocol, method), ours in group(runs, lambda run: (run.protocol, run.method)).items():
        row = {"protocol": protocol, "method": method, "runs": len(ours)}
        table = pd.concat(run.predictions for run in ours)
        for column, seen in ACCURACIES.items():
            scores = scores_of(ours, seen)
            row[column] = scores and scores.mean
            row[f"{column} interval"] = scores and scores.interval()
            chosen = table.loc[table["seen"].isin(seen), ["confidence", "right"]].to_numpy(float)
            error = calibration_error(confidence_counts(*chosen.T, BINS)) if len(chosen) else None
            row[POOLED + f" {column}".removesuffix(" accuracy")] = error
        for column, (key, _) in MEANS.items():
            values = [run.results[key] for run in ours if run.results.get(key) is not None]
            row[column] = float(np.mean(values)) if values else None
        rows.append(row)
    return rows


def format_summary(rows: list[dict]) -> pd.DataFrame:
    """Format the rows of `summarise`."""

    def cells(row: dict) -> Iterator[str]:
        yield from (row["protocol"], row["method"], str(row["runs"]))
        for column in ACCURACIES:
            ends = row[f"{column} interval"]
            yield f"{row[column]:.4f} ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "-"
        for column, form in FORMATS.items():
            yield "-" if row[column] is None else form(row[column])

    columns = ["protocol", "method", "runs", *ACCURACIES, *FORMATS]
    return pd.DataFrame(map(cells, rows), columns=columns)


def learning_curve(runs: list[Run]) -> list[dict]:
    """Compute the points of the learning curve, by method and size.

    Each has the accuracy over distinct unseen texts and its 95 % interval, see `Scores`.
    """
    unseen = [run for run in runs if run.protocol == "unseen"]
    points = []
    for (method, _), ours in group(unseen, lambda run: (run.method, run.size)).items():
        if scores := scores_of(ours, (False,)):
            rows = float(np.mean([run.results["train_rows"] for run in ours]))
            point = {"method": method, "size": rows, "mean": scores.mean}
            points.append(point | {"interval": scores.interval(), "runs": len(ours)})
    return points


def format_curve(points: list[dict]) -> pd.DataFrame:
    """Format the points of `learning_curve`, method by size."""
    cells: dict[str, dict[float, str]] = {}
    for point in points:
        low, high = (100 * end for end in point["interval"])
        cell = f"{100 * point['mean']:.1f} ({low:.1f} to {high:.1f}) %"
        cells.setdefault(point["method"], {})[point["size"]] = cell
    table = pd.DataFrame.from_dict(cells, orient="index").sort_index(axis=1).fillna("-")
    return table.rename(columns=count).rename_axis("method").reset_index()


def doublings(points: list[dict]) -> list[str]:
    """Say what the last doublings of the training texts brought each method, after `NOTE`."""
    sentences = [NOTE]
    for method, ours in group(points, lambda point: point["method"]).items():
        sizes, means = ([point[key] for point in ours[-LAST:]] for key in ("size", "mean"))
        if len(sizes) > 1:
            slope, _ = np.polyfit(np.log2(sizes), means, 1)
            sentences.append(f"{method}: {100 * slope:+.1f} points for each doubling.")
    return sentences
