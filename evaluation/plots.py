"""The plots of a run and of a study, as SVG.

To add a plot of a run, write a function that returns its pictures and give it a heading in
`RUN_PLOTS`; report.html shows it.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, repeat
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.metrics import IN_MATRIX

# The palette of Okabe & Ito, which colour-blind people can distinguish.
COLORS = BLUE, ORANGE, *_ = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
DRAWN = IN_MATRIX  # labels at most in a picture; the tables have all of them
FEW = 20  # predictions; with fewer behind it, a point of the reliability curve says little
MARKED = 20  # a curve of fewer points shows them
WIDE = "\u0900"  # letters from this one on are mostly drawn twice as wide as Latin ones
INK = "#123456"  # becomes the page's text colour, dark or light
STYLE = Path(__file__).with_name("report.mplstyle")


class Run(NamedTuple):
    """What the plots of a run are drawn from."""

    labels: list[str]
    details: dict  # of the scored file, from evaluation.json
    records: list[dict]  # the lines of metrics.jsonl


def svg(figure: Figure, words: str) -> Markup:
    """Render a figure as an SVG element, with `words` that describe it to screen readers."""
    file = io.StringIO()
    with warnings.catch_warnings():  # the browser picks a font, which has more than matplotlib's
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    picture = file.getvalue()
    picture = picture[picture.index("<svg") :].replace(INK, "currentColor")
    label = f'<svg role="img" aria-label="{escape(words)}"'
    return Markup(picture.replace("<svg", label, 1))  # matplotlib escapes what it draws


def room_for(labels: list[str]) -> float:
    """Return the inches that labels beside an axis take at most, with the axis' title."""
    letters = max(len(label) + sum(letter >= WIDE for letter in label) for label in labels)
    return max(1.5, 0.3 + 0.1 * letters)


def learning_curves(run: Run) -> list[Markup]:
    """Draw training and validation loss by epoch, and validation accuracy."""
    steps = [line for line in run.records if "loss" in line]
    epochs = [line for line in run.records if "eval_loss" in line]
    pictures = []
    for key, title in (("loss", "loss"), ("accuracy", "validation accuracy")):
        figure = Figure(figsize=(4, 3))
        axis = figure.subplots()
        words = f"Learning curve of {title}."
        if key == "loss" and steps:
            by_step = [x["loss"] for x in steps]
            marker = "o" if len(steps) < MARKED else None  # a single point has no line
            at = [x["epoch"] for x in steps]
            axis.plot(at, by_step, marker=marker, markersize=4, color=BLUE, label="training")
            words += f" In training it goes from {by_step[0]:.2f} to {by_step[-1]:.2f}."
        if epochs:
            at, values = [x["epoch"] for x in epochs], [x[f"eval_{key}"] for x in epochs]
            axis.plot(at, values, "o-", color=ORANGE, label="validation")
            best = (np.argmin if key == "loss" else np.argmax)(values)
            words += f" On validation it is best after epoch {at[best]}, with {values[best]:.3f}."
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            if key == "loss":
                axis.legend()
            pictures.append(svg(figure, words))
    return pictures


def confusion(run: Run) -> list[Markup]:
    """Draw the confusion matrix: a row per true label, each cell coloured by its share of it."""
    labels = run.labels
    if run.details["confusion"] is None or len(labels) > DRAWN:
        return []
    table = np.array(run.details["confusion"])
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    size = max(2, 0.45 * len(labels)) + room_for(labels)
    figure = Figure(figsize=(size, size))
    axis = figure.subplots()
    axis.pcolormesh(share, cmap="Blues", vmin=0, vmax=1)  # vectors, where imshow puts a bitmap
    axis.invert_yaxis()
    places = np.arange(len(labels)) + 0.5
    axis.set(xlabel="predicted label", ylabel="true label", xticks=places, yticks=places)
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticklabels(labels, **slanted if max(map(len, labels)) > 3 else {})
    axis.set_yticklabels(labels)
    axis.spines[:].set_visible(False)
    if len(labels) <= 20:
        for row, column in np.ndindex(table.shape):
            color = "white" if share[row, column] > 0.5 else "black"
            axis.text(
                column + 0.5, row + 0.5, table[row, column], ha="center", va="center", color=color
            )
    right = table.trace() / max(table.sum(), 1)
    return [svg(figure, f"Confusion matrix: {right:.1%} of the rows lie on the diagonal.")]


def class_bars(run: Run) -> list[Markup]:
    """Draw the F1 of each label, with its number of rows."""
    labels, f1, support = run.labels, run.details["f1"], run.details["support"]
    if len(labels) > DRAWN:
        return []
    names = [f"{name} ({rows:,})" for name, rows in zip(labels, support, strict=True)]
    figure = Figure(figsize=(4 + room_for(names), 0.35 * len(labels) + 1))
    axis = figure.subplots()
    bars = axis.barh(names, f1, color=BLUE)
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set(xlim=(0, 1.1), xlabel="F1 (rows in brackets)")
    axis.invert_yaxis()
    low = labels[int(np.argmin(f1))]
    return [svg(figure, f"F1 of each label, lowest for {low} with {min(f1):.2f}.")]


def reliability(run: Run) -> list[Markup]:
    """Draw accuracy by confidence; a calibrated model is on the diagonal.

    Each point says how many predictions it stands for (with several labels: one for each label);
    neighbouring bins with few share a point.
    """
    bins = np.array([run.details["reliability"][name] for name in ("rows", "hits", "confidence")])
    error = np.abs(bins[1] - bins[2]).sum() / bins[0].sum()
    rows, hits, confidence = merge_sparse(bins)
    x, y = confidence / rows, hits / rows
    figure = Figure(figsize=(4, 4))
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], "--", color=INK, linewidth=1, label="calibrated")
    axis.plot(x, y, "o-", color=BLUE, clip_on=False, label="this model, with predictions per point")
    for place, count in zip(zip(x, y, strict=True), rows, strict=True):
        axis.annotate(f"{count:,.0f}", place, (5, -11), textcoords="offset points", fontsize=8)
    axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.03))
    axis.legend(loc="upper left")
    return [svg(figure, f"Reliability curve; confidence is off by {error:.1%} on average.")]


def coverage(run: Run) -> list[Markup]:
    """Draw the accuracy on the most confident rows by their share of all rows."""
    figure = Figure(figsize=(4, 4))
    axis = figure.subplots()
    words = []
    for (name, points), color in zip(run.details["coverage"].items(), COLORS, strict=False):
        _, share, accuracy = np.array(points).T
        axis.plot(100 * share, 100 * accuracy, "o-", color=color, markersize=4, label=name)
        words += [f"{name}: {accuracy[0]:.1%} of all, {accuracy[-1]:.1%} of {share[-1]:.1%}"]
    axis.set(xlabel="most confident rows, %", ylabel="accuracy, %", xlim=(0, 102))
    axis.legend(loc="lower left")
    return [svg(figure, f"Accuracy on the most confident rows. {'; '.join(words)}.")]


def merge_sparse(bins: np.ndarray) -> np.ndarray:
    """Merge neighbouring bins, [3, BINS], until each has `FEW` predictions or one is left."""
    merged: list[np.ndarray] = []
    for one in bins.T:
        if merged and merged[-1][0] < FEW:
            merged[-1] = merged[-1] + one
        else:
            merged.append(one)
    if len(merged) > 1 and merged[-1][0] < FEW:
        merged[-2:] = [merged[-2] + merged[-1]]
    return np.array(merged).T


RUN_PLOTS = {
    "How it learned": learning_curves,
    "Which labels it confuses": confusion,
    "Can its confidence be trusted?": reliability,
    "What if unsure rows are rejected?": coverage,
    "F1 of each label": class_bars,
}


def run_plots(run: Run) -> dict[str, list[Markup]]:
    """Draw the pictures of a run, by heading; a plot that does not apply is left out."""
    with matplotlib.style.context(STYLE):
        plots = {heading: draw(run) for heading, draw in RUN_PLOTS.items()}
    return {heading: pictures for heading, pictures in plots.items() if pictures}


PANELS = {
    "original": "original protocol: texts recur in the test file",
    "unseen": "unseen protocol: every test text is new",
}


def by_method(axis: Axes, rows: list[dict], names: list[str]) -> str:
    """Draw each method's test accuracy on seen and unseen texts, with its 95 % interval.

    names: the methods of all panels, which share an axis. Returns a description in words, as
    `curves_by_method` does.
    """
    words = []
    for column, color, mark in (("on seen", BLUE, "s"), ("on unseen", ORANGE, "o")):
        some = [row for row in rows if row[column] is not None]
        if some:
            values = [100 * row[column] for row in some]
            places = [names.index(row["method"]) for row in some]
            ends = [row[f"{column} interval"] for row in some]
            axis.errorbar(
                values,
                places,
                xerr=error_bars(values, ends),
                fmt=mark,
                color=color,
                capsize=3,
                label=f"{column.removeprefix('on ')} texts",
            )
            words += [f"{row['method']} {column} {row[column]:.3f}" for row in some]
    axis.set(xlim=(0, 102), xlabel="test accuracy, %", ylim=(len(names) - 0.5, -0.5))
    axis.set_yticks(range(len(names)), names)
    axis.grid(axis="x", alpha=0.3)
    return f"Test accuracy: {'; '.join(words)}."


def curves_by_method(axis: Axes, runs: list[dict]) -> str:
    """Draw each method's validation accuracy by epoch, averaged over its runs."""
    words = []
    tuned = dict.fromkeys(run["method"] for run in runs if run["records"])
    for method, color, mark in zip(tuned, cycle(COLORS), cycle("os^vD")):
        found: dict[int, list[float]] = {}
        for line in (one for run in runs if run["method"] == method for one in run["records"]):
            if "eval_accuracy" in line:
                found.setdefault(line["epoch"], []).append(line["eval_accuracy"])
        if not found:  # not evaluated during training
            continue
        means = [np.mean(values) for values in found.values()]
        axis.plot(list(found), means, marker=mark, markersize=4, color=color, label=method)
        words.append(f"{method} from {means[0]:.3f} to {means[-1]:.3f}")
    axis.set(xlabel="epoch", ylabel="validation accuracy")
    axis.xaxis.get_major_locator().set_params(integer=True)
    return f"Validation accuracy by epoch: {'; '.join(words)}."


def study_figures(runs: list[dict], rows: list[dict]) -> Iterator[tuple[str, Figure, str]]:
    """Draw the plots of a study, a panel per protocol: name, figure and description of each."""
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    draw_rows = partial(by_method, names=list(dict.fromkeys(row["method"] for row in rows)))
    for name, draw, things in (("accuracy", draw_rows, rows), ("curves", curves_by_method, runs)):
        figure = Figure(figsize=(4.3 * len(protocols), 3.4))
        axes = figure.subplots(1, len(protocols), sharey=name == "accuracy", squeeze=False)[0]
        words, marks = [], {}
        for axis, protocol in zip(axes, protocols, strict=True):
            words.append(draw(axis, [one for one in things if one["protocol"] == protocol]))
            axis.set_title(PANELS[protocol], fontsize=10)
            marks |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if marks:  # otherwise nothing was tuned, and there are no curves
            figure.legend(marks.values(), marks, loc="outside upper center", ncols=3)
            yield name, figure, " ".join(words)


def error_bars(percentages: list[float], intervals: list[list[float]]) -> np.ndarray:
    """Return how far below and above the percentages their intervals reach: [2, N]."""
    return np.abs(100 * np.array(intervals).T - percentages)


def size_figures(runs: list[dict], points: Sequence[dict]) -> Iterator[tuple[str, Figure, str]]:
    """Draw accuracy on unseen texts by number of training texts, as `study_figures` yields plots.

    Tuned methods have the colours of `curves_by_method`; baselines are dashed. points: method,
    size, mean and interval of each; without points there is no plot.
    """
    if not points:
        return
    figure, words = Figure(figsize=(6.2, 4.8)), []
    axis = figure.subplots()
    axis.set_xscale("log", base=2)
    has_curve = {run["method"] for run in runs if run["records"]}
    looks = {True: zip(cycle(COLORS), cycle("os^vD")), False: zip(repeat(INK), cycle("PX*"))}
    for method in dict.fromkeys(point["method"] for point in points):
        color, mark = next(looks[method in has_curve])
        ours = [point for point in points if point["method"] == method]
        x, means = [point["size"] for point in ours], [100 * point["mean"] for point in ours]
        spread = error_bars(means, [point["interval"] for point in ours])
        line = "-" if method in has_curve else "--"
        look = {"color": color, "marker": mark, "linestyle": line, "markersize": 5, "capsize": 3}
        axis.errorbar(x, means, spread, **look, label=method)
        by_size = (f"{y:.1f} % with {size:,.0f}" for size, y in zip(x, means, strict=True))
        words.append(f"{method} {', '.join(by_size)}")
    ticks = sorted({point["size"] for point in points})
    axis.set_xticks(ticks, [f"{size:,.0f}" for size in ticks], rotation=30)
    axis.minorticks_off()
    axis.set(xlabel="training texts (log scale)", ylabel="accuracy on unseen texts, %")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    yield (
        "learning_curve",
        figure,
        f"Accuracy on unseen texts by number of training texts: {'; '.join(words)}.",
    )


def study_pictures(
    runs: list[dict], rows: list[dict], points: Sequence[dict] = ()
) -> dict[str, str]:
    """Render the plots of a study as SVG files, by name."""
    with matplotlib.style.context([STYLE, {"svg.fonttype": "path"}]):
        pictures = {}
        for name, figure, _ in (*study_figures(runs, rows), *size_figures(runs, points)):
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            pictures[name] = file.getvalue().replace(INK, "#222222")
    return pictures
