"""The page of a study (report.html) and its plots."""

import io
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, repeat
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.pages import fill
from evaluation.plots import BLUE, COLORS, INK, ORANGE, STYLE, svg

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


def render_study(
    main_runs: list[dict],
    rows: list[dict],
    points: list[dict],
    **shown: str | list,
) -> str:
    """Render the page of a study, see `script.study.compare`.

    main_runs, rows: the runs behind the main tables, and their summary. points: the learning curve,
    may be empty. shown: everything else that study.html shows, by its names there.
    """

    def of(things: list[dict], protocol: str) -> list[dict]:
        return [one for one in things if one["protocol"] == protocol]

    protocols = []
    with matplotlib.style.context(STYLE):
        for protocol in dict.fromkeys(row["protocol"] for row in rows):
            figures = study_figures(of(main_runs, protocol), of(rows, protocol))
            protocols.append([svg(figure, words) for _, figure, words in figures])
        curves = [svg(figure, words) for _, figure, words in size_figures(main_runs, points)]
    return fill(
        "study.html",
        Path(__file__).parent,
        protocols=protocols,
        curves=curves,
        folds=len({run["data"] for run in of(main_runs, "unseen")}),
        cards=[row for row in of(rows, "unseen") if row["on unseen"] is not None],
        **shown,
    )
