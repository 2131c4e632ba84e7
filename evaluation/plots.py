"""The plots of a run and of a study, as SVG.

To add a plot of a run, write a function that returns its pictures and give it a heading in
`RUN_PLOTS`; report.html shows it.
"""

import io
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito's colours, which colour-blind people can tell apart.
COLORS = BLUE, ORANGE, *_ = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
DRAWN = 50  # labels at most in a picture; there are tables too
INK = "#123456"  # becomes the page's colour of text, dark or light
STYLE = Path(__file__).with_name("report.mplstyle")


class Run(NamedTuple):
    """What the plots of a run are drawn from."""

    labels: list[str]
    details: dict  # of the scored file, from evaluation.json
    records: list[dict]  # the lines of metrics.jsonl


def svg(figure: Figure, words: str) -> Markup:
    """A figure as an element of the page, with `words` that describe it to screen readers."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    picture = file.getvalue()
    picture = picture[picture.index("<svg") :].replace(INK, "currentColor")
    label = f'<svg role="img" aria-label="{escape(words)}"'
    return Markup(picture.replace("<svg", label, 1))  # matplotlib escapes what it draws


def learning_curves(run: Run) -> list[Markup]:
    """Loss of training and validation by epoch, and the accuracy on validation."""
    steps = [line for line in run.records if "loss" in line]
    epochs = [line for line in run.records if "eval_loss" in line]
    pictures = []
    for key, title in (("loss", "loss"), ("accuracy", "accuracy, validation")):
        figure = Figure(figsize=(4, 3))
        axis = figure.subplots()
        words = f"Learning curve of {title}."
        if key == "loss" and steps:
            by_step = [x["loss"] for x in steps]
            axis.plot([x["epoch"] for x in steps], by_step, color=BLUE, label="training")
            words += f" In training it falls from {by_step[0]:.2f} to {by_step[-1]:.2f}."
        if epochs:
            at, values = [x["epoch"] for x in epochs], [x[f"eval_{key}"] for x in epochs]
            axis.plot(at, values, "o-", color=ORANGE, label="validation")
            best = (np.argmin if key == "loss" else np.argmax)(values)
            words += f" On validation it is best after epoch {at[best]}, with {values[best]:.3f}."
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            axis.legend()
            pictures.append(svg(figure, words))
    return pictures


def confusion(run: Run) -> list[Markup]:
    """Confusion matrix: rows are the true labels, a cell's colour is its share of its row."""
    labels = run.labels
    if run.details["confusion"] is None or len(labels) > DRAWN:
        return []
    table = np.array(run.details["confusion"])
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    size = max(3.5, 0.45 * len(labels) + 1.5)
    figure = Figure(figsize=(size, size))
    axis = figure.subplots()
    axis.pcolormesh(share, cmap="Blues", vmin=0, vmax=1)  # vectors, where imshow puts a bitmap
    axis.invert_yaxis()
    places = np.arange(len(labels)) + 0.5
    axis.set(xlabel="predicted", ylabel="true", xticks=places, yticks=places)
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
    """F1 of each label, with its number of rows."""
    labels, f1, support = run.labels, run.details["f1"], run.details["support"]
    if len(labels) > DRAWN:
        return []
    figure = Figure(figsize=(6, 0.35 * len(labels) + 1))
    axis = figure.subplots()
    names = [f"{name} ({rows:,})" for name, rows in zip(labels, support, strict=True)]
    bars = axis.barh(names, f1, color=BLUE)
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set(xlim=(0, 1.1), xlabel="F1 (rows in brackets)")
    axis.invert_yaxis()
    low = labels[int(np.argmin(f1))]
    return [svg(figure, f"F1 of each label, lowest for {low} with {min(f1):.2f}.")]


def reliability(run: Run) -> list[Markup]:
    """Share of right predictions by their confidence; calibrated ones are on the diagonal."""
    bins = run.details["reliability"]
    rows, hits, confidence = (np.array(bins[name]) for name in ("rows", "hits", "confidence"))
    error = np.abs(hits - confidence).sum() / rows.sum()
    used = rows > 0
    x, y = confidence[used] / rows[used], hits[used] / rows[used]
    area = 300 * rows[used] / rows.sum() + 10
    figure = Figure(figsize=(4, 4))
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], "--", color=INK, linewidth=1, label="calibrated")
    axis.plot(x, y, color=BLUE)
    axis.scatter(x, y, area, color=BLUE, clip_on=False, label="this model; area: rows")
    axis.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.03))
    axis.legend(loc="upper left")
    return [svg(figure, f"Reliability curve; confidence is off by {error:.1%} on average.")]


RUN_PLOTS = {
    "Learning": learning_curves,
    "Which labels are confused": confusion,
    "Is its confidence justified?": reliability,
    "F1 of each label": class_bars,
}


def run_plots(run: Run) -> dict[str, list[Markup]]:
    """The pictures of a run by their headings; a plot that does not apply is left out."""
    with matplotlib.style.context(STYLE):
        plots = {heading: draw(run) for heading, draw in RUN_PLOTS.items()}
    return {heading: pictures for heading, pictures in plots.items() if pictures}


def by_method(axis: Axes, rows: list[dict]) -> str:
    """Draw the test accuracy of each method on seen and unseen texts, with its spread over runs.

    Returns the same in words, as `curves_by_method` does.
    """
    names = [row["method"] for row in rows]
    words = []
    for column, color, mark in (("on seen", BLUE, "s"), ("on unseen", ORANGE, "o")):
        some = [row for row in rows if row[column] is not None]
        if some:
            values = [row[column] for row in some]
            places = [names.index(row["method"]) for row in some]
            spread = [row[f"{column} sd"] or 0 for row in some]
            axis.errorbar(
                values,
                places,
                xerr=spread,
                fmt=mark,
                color=color,
                capsize=3,
                label=f"{column} texts",
            )
            words += [f"{row['method']} {column} {row[column]:.3f}" for row in some]
    axis.set(xlim=(0, 1.02), xlabel="test accuracy", ylim=(len(names) - 0.5, -0.5))
    axis.set_yticks(range(len(names)), names)
    axis.grid(axis="x", alpha=0.3)
    return f"Test accuracy: {'; '.join(words)}."


def curves_by_method(axis: Axes, runs: list[dict]) -> str:
    """Draw the validation accuracy after each epoch, as its mean over the runs of each method."""
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
    """The plots of a study, with a panel for each protocol: name, figure, and its words."""
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    for name, draw, things in (("accuracy", by_method, rows), ("curves", curves_by_method, runs)):
        figure = Figure(figsize=(4.3 * len(protocols), 3.4))
        axes = figure.subplots(1, len(protocols), sharey=name == "accuracy", squeeze=False)[0]
        words, marks = [], {}
        for axis, protocol in zip(axes, protocols, strict=True):
            words.append(draw(axis, [one for one in things if one["protocol"] == protocol]))
            axis.set_title(f"protocol {protocol}", fontsize=10)
            marks |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if marks:  # otherwise nothing was tuned, and there are no curves
            figure.legend(marks.values(), marks, loc="outside upper center", ncols=3)
            yield name, figure, " ".join(words)


def study_pictures(runs: list[dict], rows: list[dict]) -> dict[str, str]:
    """The plots of a study as SVG files of their own."""
    with matplotlib.style.context([STYLE, {"svg.fonttype": "path"}]):
        pictures = {}
        for name, figure, _ in study_figures(runs, rows):
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            pictures[name] = file.getvalue().replace(INK, "#222222")
    return pictures
