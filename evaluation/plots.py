"""The pictures of a run and of a study, as SVG."""

import io
from collections.abc import Iterator

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
DRAWN = 50  # labels at most in a picture; there are tables too
INK = "#123456"  # becomes the page's colour of text, dark or light
STYLE = {
    "text.parse_math": False,  # a $ in a label is a $
    "svg.fonttype": "none",  # words stay words, in the page's font
    "svg.hashsalt": "report",  # the same picture gives the same bytes
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 10, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip


def svg(figure: Figure, words: str) -> Markup:
    """A figure as an element of the page, which `words` describe to who cannot see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    picture = file.getvalue()
    picture = picture[picture.index("<svg") :].replace(INK, "currentColor")
    label = f'<svg role="img" aria-label="{escape(words)}"'
    return Markup(picture.replace("<svg", label, 1))  # matplotlib escapes what it draws


def learning_curves(records: list[dict]) -> list[Markup]:
    """Loss of training and validation by epoch, and the accuracy of validation."""
    steps = [line for line in records if "loss" in line]
    epochs = [line for line in records if "eval_loss" in line]
    pictures = []
    for key, title in (("loss", "loss"), ("accuracy", "accuracy, validation")):
        figure = Figure(figsize=(4, 3))
        axis = figure.subplots()
        words = f"Learning curve of {title}."
        if key == "loss" and steps:
            by_step = [x["loss"] for x in steps]
            axis.plot([x["epoch"] for x in steps], by_step, color=BLUE, label="training")
            words += f" In training it goes from {by_step[0]:.2f} to {by_step[-1]:.2f}."
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


def confusion(labels: list[str], counts: list[list[int]]) -> Markup:
    """Rows are the true labels; a cell's colour is its share of its row."""
    table = np.array(counts)
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
    return svg(figure, f"Confusion matrix: {right:.1%} of the rows lie on the diagonal.")


def class_bars(labels: list[str], f1: list[float], support: list[int]) -> Markup:
    """F1 of each label, with its rows."""
    figure = Figure(figsize=(6, 0.35 * len(labels) + 1))
    axis = figure.subplots()
    names = [f"{name} ({rows:,})" for name, rows in zip(labels, support, strict=True)]
    bars = axis.barh(names, f1, color=BLUE)
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set(xlim=(0, 1.1), xlabel="F1 (rows in brackets)")
    axis.invert_yaxis()
    low = labels[int(np.argmin(f1))]
    return svg(figure, f"F1 of each label, lowest for {low} with {min(f1):.2f}.")


def reliability(bins: dict[str, list[float]]) -> Markup:
    """Share of right predictions by their confidence; calibrated ones lie on the diagonal."""
    rows, hits, sure = (np.array(bins[name]) for name in ("rows", "hits", "confidence"))
    there = rows > 0
    figure = Figure(figsize=(4, 4))
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], "--", color=INK, linewidth=1, label="calibrated")
    axis.plot(sure[there] / rows[there], hits[there] / rows[there], color=BLUE)
    area = 300 * rows[there] / rows.sum() + 10
    axis.scatter(sure[there] / rows[there], hits[there] / rows[there], area, color=BLUE,
                 clip_on=False, label="this model; area: rows")  # fmt: skip
    axis.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.03))
    axis.legend(loc="upper left")
    error = np.abs(hits - sure).sum() / rows.sum()
    return svg(figure, f"Reliability curve; confidence is off by {error:.1%} on average.")


def by_method(axis: Axes, rows: list[dict]) -> str:
    """Draw the test accuracy of each method on seen and unseen texts, with its spread over runs.

    Returns the same in words, as `curves_by_method` does.
    """
    names = [row["method"] for row in rows]
    words = []
    for column, color, mark in (("on seen", BLUE, "s"), ("on unseen", ORANGE, "o")):
        there = [row for row in rows if row[column] is not None]
        if there:
            axis.errorbar(
                [row[column] for row in there], [names.index(row["method"]) for row in there],
                xerr=[row[f"{column} sd"] or 0 for row in there],
                fmt=mark, color=color, capsize=3, label=f"{column} texts",
            )  # fmt: skip
            words += [f"{row['method']} {column} {row[column]:.3f}" for row in there]
    axis.set(xlim=(0, 1.02), xlabel="test accuracy", ylim=(len(names) - 0.5, -0.5))
    axis.set_yticks(range(len(names)), names)
    axis.grid(axis="x", alpha=0.3)
    return f"Test accuracy: {'; '.join(words)}."


def curves_by_method(axis: Axes, runs: list[dict]) -> str:
    """Draw the validation accuracy after each epoch, its mean over the runs of each method."""
    words = []
    for (method, mark), color in zip(
        (("full", "o"), ("prefix", "s"), ("input prefix", "^")), (BLUE, ORANGE, GREEN), strict=True
    ):
        lines = [x for run in runs if run["method"] == method for x in run["records"]]
        found: dict[int, list[float]] = {}
        for line in lines:
            if "eval_accuracy" in line:
                found.setdefault(line["epoch"], []).append(line["eval_accuracy"])
        if found:
            means = [np.mean(values) for values in found.values()]
            axis.plot(list(found), means, marker=mark, color=color, label=method)
            words.append(f"{method} from {means[0]:.3f} to {means[-1]:.3f}")
    axis.set(xlabel="epoch", ylabel="validation accuracy")
    axis.xaxis.get_major_locator().set_params(integer=True)
    return f"Validation accuracy by epoch: {'; '.join(words)}."


def study_figures(runs: list[dict], rows: list[dict]) -> Iterator[tuple[str, Figure, str]]:
    """The pictures of a study, with a panel for each protocol: name, figure, and its words."""
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    for name, draw, things in (("accuracy", by_method, rows), ("curves", curves_by_method, runs)):
        figure = Figure(figsize=(4.3 * len(protocols), 3.2))
        axes = figure.subplots(1, len(protocols), sharey=name == "accuracy", squeeze=False)[0]
        words = []
        for axis, protocol in zip(axes, protocols, strict=True):
            words.append(draw(axis, [one for one in things if one["protocol"] == protocol]))
            axis.set_title(f"protocol {protocol}", fontsize=10)
        marks = {}
        for axis in axes:
            marks |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if marks:  # else nothing was tuned, and there are no curves
            figure.legend(marks.values(), marks, loc="outside upper center", ncols=3)
            yield name, figure, " ".join(words)


def study_pictures(runs: list[dict], rows: list[dict]) -> dict[str, str]:
    """The pictures of a study as SVG files of their own."""
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "path"}):
        pictures = {}
        for name, figure, _ in study_figures(runs, rows):
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            pictures[name] = file.getvalue().replace(INK, "#222222")
    return pictures
