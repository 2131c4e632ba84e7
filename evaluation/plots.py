"""The plots of a run, as SVG.

To add a plot of a run, write a function that returns its pictures and give it a heading in
`RUN_PLOTS`; report.html shows it.
"""

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from evaluation.metrics import IN_MATRIX, calibration_error

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


def svg_file(figure: Figure, **options) -> str:
    """Render a figure as an SVG file; options: of `savefig`."""
    file = io.StringIO()
    with warnings.catch_warnings():  # the browser picks a font, which has more than matplotlib's
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, **options)
    return file.getvalue()


def svg(figure: Figure, words: str) -> Markup:
    """Render a figure as an SVG element, with `words` that describe it to screen readers."""
    _, _, picture = svg_file(figure, transparent=True).partition("<svg")
    label = f'<svg role="img" aria-label="{escape(words)}"'
    return Markup(label + picture.replace(INK, "currentColor"))  # matplotlib escapes what it draws


def room_for(labels: list[str]) -> float:
    """Return the inches that labels beside an axis take at most, with the axis' title."""
    letters = max(len(label) + sum(letter >= WIDE for letter in label) for label in labels)
    return max(1.5, 0.3 + 0.1 * letters)


def learning_curves(run: Run) -> list[Markup]:
    """Draw training and validation loss by epoch, and validation accuracy."""

    def points(key: str) -> tuple[list[float], list[float]]:
        lines = [line for line in run.records if key in line]
        return [line["epoch"] for line in lines], [line[key] for line in lines]

    pictures = []
    for key, title in (("loss", "loss"), ("accuracy", "validation accuracy")):
        axis = Figure(figsize=(4, 3)).subplots()
        words = f"Learning curve of {title}."
        epochs, values = points(key)  # of training, which has no accuracy
        if values:
            marker = "o" if len(values) < MARKED else None  # a single point has no line
            axis.plot(epochs, values, marker=marker, markersize=4, color=BLUE, label="training")
            words += f" In training it goes from {values[0]:.2f} to {values[-1]:.2f}."
        epochs, values = points(f"eval_{key}")
        if values:
            axis.plot(epochs, values, "o-", color=ORANGE, label="validation")
            best = (np.argmin if key == "loss" else np.argmax)(values)
            words += (
                f" On validation it is best after epoch {epochs[best]}, with {values[best]:.3f}."
            )
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            if key == "loss":
                axis.legend()
            pictures.append(svg(axis.figure, words))
    return pictures


def confusion(run: Run) -> list[Markup]:
    """Draw the confusion matrix: a row per true label, each cell coloured by its share of it."""
    labels = run.labels
    if run.details["confusion"] is None or len(labels) > DRAWN:
        return []
    table = np.array(run.details["confusion"])
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    size = max(2, 0.45 * len(labels)) + room_for(labels)
    axis = Figure(figsize=(size, size)).subplots()
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
    return [svg(axis.figure, f"Confusion matrix: {right:.1%} of the rows lie on the diagonal.")]


def class_bars(run: Run) -> list[Markup]:
    """Draw the F1 of each label, with its number of rows."""
    labels, f1, support = run.labels, run.details["f1"], run.details["support"]
    if len(labels) > DRAWN:
        return []
    names = [f"{name} ({rows:,})" for name, rows in zip(labels, support, strict=True)]
    axis = Figure(figsize=(4 + room_for(names), 0.35 * len(labels) + 1)).subplots()
    bars = axis.barh(names, f1, color=BLUE)
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set(xlim=(0, 1.1), xlabel="F1 (rows in brackets)")
    axis.invert_yaxis()
    low = labels[int(np.argmin(f1))]
    return [svg(axis.figure, f"F1 of each label, lowest for {low} with {min(f1):.2f}.")]


def reliability(run: Run) -> list[Markup]:
    """Draw accuracy by confidence; a calibrated model is on the diagonal.

    Each point says how many predictions it stands for (with several labels: one for each label);
    neighbouring bins with few share a point.
    """
    bins = np.array([run.details["reliability"][name] for name in ("rows", "hits", "confidence")])
    rows, hits, confidence = merge_sparse(bins)
    x, y = confidence / rows, hits / rows
    axis = Figure(figsize=(4, 4)).subplots()
    axis.plot([0, 1], [0, 1], "--", color=INK, linewidth=1, label="calibrated")
    axis.plot(x, y, "o-", color=BLUE, clip_on=False, label="this model, with predictions per point")
    for place, count in zip(zip(x, y, strict=True), rows, strict=True):
        axis.annotate(f"{count:,.0f}", place, (5, -11), textcoords="offset points", fontsize=8)
    axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.03))
    axis.legend(loc="upper left")
    error = calibration_error(bins)
    return [svg(axis.figure, f"Reliability curve; confidence is off by {error:.1%} on average.")]


def coverage(run: Run) -> list[Markup]:
    """Draw the accuracy on the most confident rows by their share of all rows."""
    axis = Figure(figsize=(4, 4)).subplots()
    words = []
    for (name, points), color in zip(run.details["coverage"].items(), COLORS, strict=False):
        _, share, accuracy = np.array(points).T
        axis.plot(100 * share, 100 * accuracy, "o-", color=color, markersize=4, label=name)
        words += [f"{name}: {accuracy[0]:.1%} of all, {accuracy[-1]:.1%} of {share[-1]:.1%}"]
    axis.set(xlabel="most confident rows, %", ylabel="accuracy, %", xlim=(0, 102))
    axis.legend(loc="lower left")
    return [svg(axis.figure, f"Accuracy on the most confident rows. {'; '.join(words)}.")]


def merge_sparse(bins: np.ndarray) -> np.ndarray:
    """Merge neighbouring bins, [3, BINS], until each has `FEW` predictions or one is left."""
    merged: list[np.ndarray] = []
    for column in bins.T:
        if merged and merged[-1][0] < FEW:
            merged[-1] = merged[-1] + column
        else:
            merged.append(column)
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
