"""The plots of a run, as SVG.

To add a plot of a run, write a function that yields its axes and give it a heading in `RUN_PLOTS`;
report.html shows it.
"""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.metrics import calibration_error

# The palette of Okabe & Ito, which colour-blind people can distinguish.
COLORS = BLUE, ORANGE, *_ = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
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


Plots = Iterator[tuple[Axes, str]]  # with a description in words


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


def new_axis(width: float, height: float, **settings) -> Axes:
    """Return the axis of a new figure of this size in inches; settings: its labels and limits."""
    axis = Figure(figsize=(width, height)).subplots()
    axis.set(**settings)
    return axis


def learning_curves(run: Run) -> Plots:
    """Draw loss and accuracy by epoch, in training and on the validation file."""
    for key in ("loss", "accuracy"):
        axis, words = new_axis(4, 3, xlabel="epoch", title=key), f"Learning curve of {key}."
        for name, label, color in ((key, "training", BLUE), (f"eval_{key}", "validation", ORANGE)):
            points = [(line["epoch"], line[name]) for line in run.records if name in line]
            if points:
                marker = "o" if len(points) < MARKED else None  # a single point has no line
                axis.plot(
                    *np.transpose(points), marker=marker, markersize=4, color=color, label=label
                )
                words += f" {label}: from {points[0][1]:.3f} to {points[-1][1]:.3f}."
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            axis.legend()
            yield axis, words


def confusion(run: Run) -> Plots:
    """Draw the confusion matrix: a row per true label, each cell coloured by its share of it."""
    labels = run.labels
    if run.details["confusion"] is None:
        return
    table = np.array(run.details["confusion"])
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    letters = max(len(label) + sum(letter >= WIDE for letter in label) for label in labels)
    size = max(2, 0.45 * len(labels)) + max(1.5, 0.3 + 0.1 * letters)  # cells, and room for labels
    places = np.arange(len(labels)) + 0.5
    ticks = {"xticks": places, "yticks": places, "yticklabels": labels}
    axis = new_axis(size, size, xlabel="predicted label", ylabel="true label", **ticks)
    axis.pcolormesh(share, cmap="Blues", vmin=0, vmax=1)  # vectors, where imshow puts a bitmap
    axis.invert_yaxis()
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticklabels(labels, **slanted if max(map(len, labels)) > 3 else {})
    axis.spines[:].set_visible(False)
    for row, column in np.ndindex(table.shape if len(labels) <= 20 else (0, 0)):
        look = {"ha": "center", "va": "center"}
        look["color"] = "white" if share[row, column] > 0.5 else "black"
        axis.text(column + 0.5, row + 0.5, table[row, column], **look)
    right = table.trace() / max(table.sum(), 1)
    yield axis, f"Confusion matrix: {right:.1%} of the rows lie on the diagonal."


def reliability(run: Run) -> Plots:
    """Draw accuracy by confidence; a calibrated model is on the diagonal.

    Each point says how many predictions it stands for (with several labels: one for each label);
    neighbouring bins with few share a point.
    """
    bins = np.array([run.details["reliability"][name] for name in ("rows", "hits", "confidence")])
    rows, hits, confidence = merge_sparse(bins)
    x, y = confidence / rows, hits / rows
    axis = new_axis(4, 4, xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.03))
    axis.plot([0, 1], [0, 1], "--", color=INK, linewidth=1, label="calibrated")
    axis.plot(x, y, "o-", color=BLUE, clip_on=False, label="this model, with predictions per point")
    for place, count in zip(zip(x, y, strict=True), rows, strict=True):
        axis.annotate(f"{count:,.0f}", place, (5, -11), textcoords="offset points", fontsize=8)
    axis.legend(loc="lower right")
    error = calibration_error(bins)
    yield axis, f"Reliability curve; confidence is off by {error:.1%} on average."


def coverage(run: Run) -> Plots:
    """Draw the accuracy on the most confident rows by their share of all rows."""
    labels = {"xlabel": "most confident rows, %", "ylabel": "accuracy, %"}
    axis, words = new_axis(4, 4, xlim=(0, 102), **labels), []
    for (name, points), color in zip(run.details["coverage"].items(), COLORS, strict=False):
        _, share, accuracy = np.array(points).T
        axis.plot(100 * share, 100 * accuracy, "o-", color=color, markersize=4, label=name)
        words += [f"{name}: {accuracy[0]:.1%} of all, {accuracy[-1]:.1%} of {share[-1]:.1%}"]
    axis.legend(loc="lower left")
    yield axis, f"Accuracy on the most confident rows. {'; '.join(words)}."


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
}


def run_plots(run: Run) -> dict[str, list[Markup]]:
    """Draw the pictures of a run, by heading; a plot that does not apply is left out."""
    with matplotlib.style.context(STYLE):
        plots = {
            heading: [svg(axis.figure, words) for axis, words in draw(run)]
            for heading, draw in RUN_PLOTS.items()
        }
    return {heading: pictures for heading, pictures in plots.items() if pictures}
