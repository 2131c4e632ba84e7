"""The page of a study (report.html) and its plots.

A row is one of `summarise`, a point one of `learning_curve`. Each function that draws on an axis
returns a description of it in words.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, repeat
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.pages import fill
from evaluation.plots import BLUE, COLORS, INK, ORANGE, STYLE, svg, svg_file
from script.study.runs import Run
from script.study.significance import group

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
    return f"Test accuracy: {'; '.join(words)}."


def draw_curves(axis: Axes, runs: list[Run]) -> str:
    """Draw each tuned method's validation accuracy by epoch, averaged over its runs."""
    words = []
    tuned = group((run for run in runs if run.records), lambda run: run.method)
    for (method, ours), color, mark in zip(tuned.items(), cycle(COLORS), cycle(MARKS)):
        lines = [line for run in ours for line in run.records if "eval_accuracy" in line]
        if lines:  # otherwise not evaluated during training
            means = pd.DataFrame(lines).groupby("epoch")["eval_accuracy"].mean()
            axis.plot(means, marker=mark, markersize=4, color=color, label=method)
            words.append(f"{method} from {means.iloc[0]:.3f} to {means.iloc[-1]:.3f}")
    axis.set(xlabel="epoch", ylabel="validation accuracy")
    axis.xaxis.get_major_locator().set_params(integer=True)
    return f"Validation accuracy by epoch: {'; '.join(words)}."


def size_figure(runs: list[Run], points: Sequence[dict]) -> tuple[Figure, str]:
    """Draw accuracy on unseen texts by number of training texts; return it with its description.

    Tuned methods have the colours of `draw_curves`; baselines are dashed.
    """
    axis, words = Figure(figsize=(6.2, 4.8)).subplots(), []
    axis.set_xscale("log", base=2)
    tuned = {run.method for run in runs if run.records}
    looks = {True: zip(cycle(COLORS), cycle(MARKS)), False: zip(repeat(INK), cycle("PX*"))}
    for method, ours in group(points, lambda point: point["method"]).items():
        color, mark = next(looks[method in tuned])
        sizes, means = [point["size"] for point in ours], [100 * point["mean"] for point in ours]
        bars = error_bars(means, [point["interval"] for point in ours])
        line = "-" if method in tuned else "--"
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


def study_figures(runs: list[Run], rows: list[dict]) -> Iterator[tuple[str, Figure, str]]:
    """Draw the plots of a study, a panel per protocol: name, figure and description of each."""
    by_protocol = group(rows, lambda row: row["protocol"])
    runs_by_protocol = group(runs, lambda run: run.protocol)
    draw_rows = partial(draw_accuracies, names=list(dict.fromkeys(row["method"] for row in rows)))
    for name, draw, parts in (
        ("accuracy", draw_rows, by_protocol),
        ("curves", draw_curves, runs_by_protocol),
    ):
        figure = Figure(figsize=(4.3 * len(by_protocol), 3.4))
        axes = figure.subplots(1, len(by_protocol), sharey=name == "accuracy", squeeze=False)[0]
        words, marks = [], {}
        for axis, protocol in zip(axes, by_protocol, strict=True):
            words.append(draw(axis, parts.get(protocol, [])))
            axis.set_title(PANELS[protocol], fontsize=10)
            marks |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if marks:  # otherwise nothing was tuned, and there are no curves
            figure.legend(marks.values(), marks, loc="outside upper center", ncols=3)
            yield name, figure, " ".join(words)


def study_pictures(
    runs: list[Run], rows: list[dict], points: Sequence[dict] = ()
) -> dict[str, str]:
    """Render the plots of a study as SVG files, by name."""
    with matplotlib.style.context([STYLE, {"svg.fonttype": "path"}]):
        figures = {name: figure for name, figure, _ in study_figures(runs, rows)}
        if points:
            figures["learning_curve"], _ = size_figure(runs, points)
        return {name: svg_file(figure).replace(INK, "#222222") for name, figure in figures.items()}


def render_study(
    main_runs: list[Run], rows: list[dict], points: list[dict], **shown: str | list | pd.DataFrame
) -> str:
    """Render the page of a study, see `script.study.compare`.

    main_runs, rows: the runs behind the main tables, and their summary. points: the learning curve,
    may be empty. shown: everything else that study.html shows, by its names there.
    """
    runs = group(main_runs, lambda run: run.protocol)
    rows = group(rows, lambda row: row["protocol"])
    with matplotlib.style.context(STYLE):
        protocols = [
            [svg(figure, words) for _, figure, words in study_figures(runs[name], rows[name])]
            for name in rows
        ]
        curve = svg(*size_figure(main_runs, points)) if points else ""
    return fill(
        "study.html",
        Path(__file__).parent,
        protocols=protocols,
        curve=curve,
        folds=len({run.data for run in runs.get("unseen", [])}),
        cards=[row for row in rows.get("unseen", []) if row["on unseen"] is not None],
        **shown,
    )
