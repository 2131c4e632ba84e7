"""Learning curve of a study: accuracy on unseen texts by number of training texts.

Runs are the dictionaries of `script.study.compare.plan`; their "size" is the number of training
rows to draw at random, or None for all rows. Points are the rows of `summarise`.
"""

import argparse
import math

import numpy as np
import pandas as pd

from runtime.files import UserError
from script.study.significance import Scores

LAST = 3  # sizes, the largest ones, over which the effect of a doubling is measured
NOTE = (
    "What the last doublings of the training texts brought, by least squares over the largest "
    "sizes (up to three). This extrapolates nothing: the next doubling may bring less."
)


def parse_size(text: str) -> int | None:
    """Return a number of training rows, or None for `all`. Raises: ArgumentTypeError."""
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}': use positive numbers of rows, or all")
    return int(text)


def in_order(sizes: list[int | None]) -> list[int | None]:
    """Return the distinct sizes, ascending, with all rows last."""
    return sorted(set(sizes), key=lambda size: size or math.inf)


def check_sizes(sizes: list[int | None], path: str, rows: int) -> None:
    """Check that each size leaves rows out. Raises: UserError naming the training file."""
    if large := [size for size in sizes if size and size >= rows]:
        raise UserError(
            f"{path} has {rows} rows: --train_sizes {large[0]} leaves none out, use 'all' instead"
        )


def largest(runs: list[dict]) -> list[dict]:
    """Return the runs of each protocol with its largest size, the ones for the main tables."""
    sizes: dict[str, list] = {}
    for run in runs:
        sizes.setdefault(run["protocol"], []).append(run["size"])
    most = {protocol: in_order(found)[-1] for protocol, found in sizes.items()}
    return [run for run in runs if run["size"] == most[run["protocol"]]]


def summarise(runs: list[dict]) -> list[dict]:
    """Compute the points: accuracy over distinct unseen texts and its 95 % interval, by
    method and size; see `Scores`.
    """
    found: dict[tuple, list[dict]] = {}
    for run in runs:
        if run["protocol"] == "unseen" and not run["predictions"]["seen"].all():
            found.setdefault((run["method"], run["size"]), []).append(run)
    points = []
    for (method, _), ours in found.items():
        table = pd.concat(run["predictions"] for run in ours)
        scores = Scores(table[~table["seen"]])
        size = float(np.mean([run["results"]["train_rows"] for run in ours]))
        point = {"method": method, "size": size, "mean": scores.mean}
        points.append(point | {"interval": scores.interval(), "runs": len(ours)})
    return points


def by_method(points: list[dict]) -> dict[str, list[dict]]:
    """Group the points by method, each with ascending sizes."""
    groups: dict[str, list[dict]] = {}
    for point in sorted(points, key=lambda point: point["size"]):
        groups.setdefault(point["method"], []).append(point)
    return {method: groups[method] for method in dict.fromkeys(one["method"] for one in points)}


def table(points: list[dict]) -> list[list[str]]:
    """Format the points as a table, method by size, whose first row is the header."""
    sizes = [f"{size:,.0f}" for size in sorted({point["size"] for point in points})]
    rows = [["method", *sizes]]
    for method, ours in by_method(points).items():
        cells = {}
        for point in ours:
            low, high = (100 * end for end in point["interval"])
            cell = f"{100 * point['mean']:.1f} ({low:.1f} to {high:.1f}) %"
            cells[f"{point['size']:,.0f}"] = cell
        rows.append([method, *(cells.get(size, "-") for size in sizes)])
    return rows


def doubling(points: list[dict]) -> float:
    """Return the slope of accuracy against log2 of the size, by least squares."""
    sizes, means = ([point[key] for point in points] for key in ("size", "mean"))
    return float(np.polyfit(np.log2(sizes), means, 1)[0])


def sentences(points: list[dict]) -> list[str]:
    """Say what the last doublings of the training texts brought each method, after `NOTE`."""
    said = [NOTE]
    for method, ours in by_method(points).items():
        last = ours[-LAST:]
        ends = [f"{100 * p['mean']:.1f} % with {p['size']:,.0f}" for p in (last[0], last[-1])]
        words = f"{method}: {ends[0]} training texts"
        if len(last) > 1:
            gain = round(100 * doubling(last), 1)
            verb = "brought" if gain >= 0 else "cost"
            words += f", {ends[1]}; each doubling {verb} {abs(gain):.1f} points"
        said.append(f"{words}.")
    return said


def format_curve(sizes: list[list[str]], said: list[str]) -> str:
    """Format the learning curve for the console: its table, then its sentences."""
    header, *rows = sizes
    text = pd.DataFrame(rows, columns=header).to_string(index=False)
    title = "accuracy on unseen texts by number of training texts (95 % interval):"
    return "\n".join([title, text, *said])
