"""The page of a study (report.html) and its plots.

A row is one of `summarise`, a point one of `learning_curve`. A plot comes with a description of it
in words.
"""

from itertools import cycle, repeat
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.pages import fill
from evaluation.plots import BLUE, COLORS, INK, ORANGE, STYLE, svg, svg_file
from script.study.runs import group, is_tuned

PANELS = {
    "original": "original protocol: texts recur in the test file",
    "unseen": "unseen protocol: every test text is new",
}
MARKS = "os^vD"  # of tuned methods


def error_bars(percentages: list[float], intervals: list[list[float]]) -> np.ndarray:
    """Return how far below and above the percentages their intervals reach: [2, N]."""
    return np.abs(100 * np.array(intervals).T - percentages)


def draw_accuracies(axis: Axes, rows: list[dict], names: list[str]) -> str:
    """Draw each method's test accuracy on seen and unseen texts, with its 95 % interval.

    names: the methods of all panels, which share an axis.
    """
    words = []
    for column, color, mark in (("on seen", BLUE, "s"), ("on unseen", ORANGE, "o")):
        known = [row for row in rows if row[column] is not None]
        if known:
            values = [100 * row[column] for row in known]
            heights = [names.index(row["method"]) for row in known]
            bars = error_bars(values, [row[f"{column} interval"] for row in known])
            look = {"fmt": mark, "color": color, "capsize": 3}
            label = f"{column.removeprefix('on ')} texts"
            axis.errorbar(values, heights, xerr=bars, label=label, **look)
            words += [f"{row['method']} {column} {row[column]:.3f}" for row in known]
    axis.set(xlim=(0, 102), xlabel="test accuracy, %", ylim=(len(names) - 0.5, -0.5))
    axis.set_yticks(range(len(names)), names)
    axis.grid(axis="x", alpha=0.3)
    return f"{axis.get_title()}: {'; '.join(words)}."


def accuracy_plot(rows: list[dict]) -> tuple[Figure, str]:
    """Draw the methods' accuracies, a panel per protocol."""
    protocols = group(rows, lambda row: row["protocol"])
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(1 + 4.3 * len(protocols), 1.4 + 0.25 * len(names)))
    axes = figure.subplots(1, len(protocols), sharey=True, squeeze=False)[0]
    words, marks = [], {}
    for axis, (protocol, ours) in zip(axes, protocols.items(), strict=True):
        axis.set_title(PANELS[protocol], fontsize=10)
        words.append(draw_accuracies(axis, ours, names))
        marks |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(marks.values(), marks, loc="outside upper center", ncols=2)
    return figure, f"Test accuracy. {' '.join(words)}"


def size_plot(points: list[dict]) -> tuple[Figure, str]:
    """Draw accuracy on unseen texts by number of training texts; baselines are dashed."""
    axis, words = Figure(figsize=(6.2, 4.8)).subplots(), []
    axis.set_xscale("log", base=2)
    looks = {True: zip(cycle(COLORS), cycle(MARKS)), False: zip(repeat(INK), cycle("PX*"))}
    for method, ours in group(points, lambda point: point["method"]).items():
        color, mark = next(looks[is_tuned(method)])
        sizes, means = [point["size"] for point in ours], [100 * point["mean"] for point in ours]
        bars = error_bars(means, [point["interval"] for point in ours])
        line = "-" if is_tuned(method) else "--"
        look = {"color": color, "marker": mark, "linestyle": line, "markersize": 5, "capsize": 3}
        axis.errorbar(sizes, means, bars, label=method, **look)
        by_size = (f"{y:.1f} % with {size:,.0f}" for size, y in zip(sizes, means, strict=True))
        words.append(f"{method} {', '.join(by_size)}")
    ticks = sorted({point["size"] for point in points})
    axis.set_xticks(ticks, [f"{size:,.0f}" for size in ticks], rotation=30)
    axis.minorticks_off()
    axis.set(xlabel="training texts (log scale)", ylabel="accuracy on unseen texts, %")
    axis.grid(alpha=0.3)
    axis.figure.legend(loc="outside upper center", ncols=3)
    return axis.figure, f"Accuracy on unseen texts by number of training texts: {'; '.join(words)}."


def draw_plots(rows: list[dict], points: list[dict]) -> dict[str, tuple[Figure, str]]:
    """Draw the plots of a study by name; points: may be empty."""
    with matplotlib.style.context(STYLE):
        drawn = {"accuracy": accuracy_plot(rows)}
        return drawn | ({"learning_curve": size_plot(points)} if points else {})


def plot_files(drawn: dict[str, tuple[Figure, str]]) -> dict[str, str]:
    """Return the plots as files: names and contents."""
    with matplotlib.style.context([STYLE, {"svg.fonttype": "path"}]):
        return {
            f"{name}.svg": svg_file(figure).replace(INK, "#222222")
            for name, (figure, _) in drawn.items()
        }


def render_study(rows: list[dict], points: list[dict], **values) -> dict[str, str]:
    """Render the page of a study and its plots: file names and contents.

    points: may be empty. values: everything else that study.html shows, by its names there.
    """
    drawn = draw_plots(rows, points)
    with matplotlib.style.context(STYLE):
        pictures = {name: svg(*plot) for name, plot in drawn.items()}
    page = fill("study.html", Path(__file__).parent, rows=rows, pictures=pictures, **values)
    return {"report.html": page, **plot_files(drawn)}
