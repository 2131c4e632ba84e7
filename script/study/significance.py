"""Test whether one method is better than another on the same rows, from finished runs.

    .venv/bin/python -m script.study.significance ONE... --against OTHER...

ONE and OTHER are folders of finished runs. The n-th ONE is compared with the n-th OTHER, for
instance two methods on the same folds; their test files must have the same labels row by row. The
texts may differ, for instance if one method was tuned on cleaned titles. The 95 % interval is over
texts and, if several ONEs or OTHERs have the same test file, seeds; p ignores seeds.

T distinct texts, K runs.
"""

import math
import sys
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd
from scipy.stats import permutation_test
from scipy.stats import t as student

from dataset import Split, read_split
from evaluation.intervals import LEVEL, NORMAL, wilson
from runtime.file_format import LABEL_SEPARATOR, FileFormat
from runtime.files import UserError, run_and_report
from runtime.flags import Parser
from runtime.labels import label_key
from runtime.record import RUN_FILE, read_record

T = TypeVar("T")
RESAMPLES = 9999


class PairedTest(NamedTuple):
    """Result of `paired_test`."""

    one: float  # accuracy
    other: float
    difference: float  # of the accuracies, other - one
    interval: list[float]  # its two ends: 95 %, over texts and, if there are several, seeds
    p: float  # two-sided, at least 0.0002; over texts only
    texts: int  # number of distinct texts


def read_run(folder: str | Path) -> tuple[dict, Split]:
    """Read a finished run's record and its predictions, as the rows of the test file.

    Raises: UserError if the folder has no finished run or its predictions have no labels.
    """
    record = read_record(Path(folder) / RUN_FILE)
    if not (settings := record.get("settings")):
        raise UserError(f"{folder} contains no finished run: pass the folder of one")
    form = FileFormat.from_settings(settings).written_here()
    return record, read_split(Path(folder) / "predictions.csv", form)


def read_predictions(folder: str | Path) -> pd.DataFrame:
    """Read a run's predictions, see `read_run` and `answers`; the column run is the folder."""
    return answers(read_run(folder)[1]).assign(run=str(folder))


def answers(split: Split) -> pd.DataFrame:
    """Return predictions as columns text (key), labels, answer (as written) and right."""
    labels = [frozenset(map(label_key, names)) for names in split.labels]
    written = split.table["predicted"]
    lists = ([*filter(None, answer.split(LABEL_SEPARATOR))] for answer in written)
    names = lists if split.multi_label else ([answer] for answer in written)
    right = [label == {*map(label_key, name)} for label, name in zip(labels, names, strict=True)]
    return pd.DataFrame({"text": split.keys, "labels": labels, "answer": written, "right": right})


def group(things: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    """Group things by a key, in the order in which the keys occur first."""
    groups: dict[Hashable, list[T]] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return groups


class Scores:
    """The share of right predictions of each distinct text, in all runs of a method.

    Texts and runs (seeds) are two crossed sources of variance, as in Owen 2007, "The pigeonhole
    bootstrap". The variance of the mean is the sum of two estimates: that of the texts' shares,
    / T; and that of the means of runs on the same texts, / K. Unlike a bootstrap's they are not too
    small for two or three runs. What varies from text to text in one run counts in both, so the sum
    is a little too large. A single run says nothing about seeds: the first part is then all.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        """table: rows of any number of runs, with the columns `text`, `run` and `right`."""
        table = table.astype({"right": float})
        grid = table.pivot_table(index="text", columns="run", values="right")  # [T, K]
        self.texts = grid.mean(axis=1)
        self.mean = float(self.texts.mean())
        self.seeds: list[tuple[float, int]] = []  # variances of the mean, degrees of freedom
        for runs in group(grid, lambda run: tuple(grid[run].notna())).values():  # on the same texts
            means, share = grid[runs].mean(), grid[runs[0]].notna().mean()
            if len(runs) > 1:
                self.seeds.append((share**2 * means.var() / len(runs), len(runs) - 1))

    def interval(self) -> list[float]:
        """Return the two ends of the 95 % interval of the mean.

        The interval is Wilson's with as many independent texts as would have the variance.
        """
        size = len(self.texts)
        error = margin([(self.texts.var(ddof=0) / size, size - 1), *self.seeds])
        if error > 0:
            size = self.mean * (1 - self.mean) * (NORMAL / error) ** 2
        return wilson(self.mean, size)


def margin(variances: list[tuple[float, int]]) -> float:
    """Return half the width of the 95 % interval of a mean with these variances.

    variances: independent ones, with their degrees of freedom, which are combined as in
    Satterthwaite 1946.
    """
    total = sum(variance for variance, _ in variances)
    if not total:
        return 0.0
    freedom = total**2 / sum(variance**2 / max(1, degrees) for variance, degrees in variances)
    return float(student.ppf(0.5 + LEVEL / 2, freedom) * math.sqrt(total))


def difference_interval(one: Scores, other: Scores) -> list[float]:
    """Return the two ends of the 95 % interval of other's mean minus one's, on the same texts.

    Half a text is added to each of the four outcomes, so that it is right if all texts agree
    (Agresti & Min 2005, "Simple improved confidence intervals for comparing matched proportions").
    """
    differences = other.texts - one.texts
    size = len(differences) + 2
    mean = differences.sum() / size
    variance = (((differences**2).sum() + 1) / size - mean**2) / size
    error = margin([(variance, size - 1), *one.seeds, *other.seeds])
    return [max(-1.0, float(mean - error)), min(1.0, float(mean + error))]


def paired_test(one: Scores, other: Scores) -> PairedTest | None:
    """Compare two methods on the same texts; return None if the texts differ or are fewer than two.

    Each distinct text has the same weight. The permutation test swaps the two scores of texts at
    random, as if the methods were equal: its p holds for these runs. The interval of the difference
    also covers other seeds, as far as several runs predicted the same texts.
    """
    if not one.texts.index.equals(other.texts.index) or len(one.texts) < 2:
        return None
    test = permutation_test(
        [one.texts.to_numpy(), other.texts.to_numpy()],
        lambda a, b, axis: np.mean(b - a, axis=axis),
        vectorized=True,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=200,
        rng=0,
    )
    difference, p = float(test.statistic), float(test.pvalue)
    interval = difference_interval(one, other)
    return PairedTest(one.mean, other.mean, difference, interval, p, len(one.texts))


def describe(difference: float, interval: list[float], p: float) -> str:
    """Return the result of a paired test in words."""
    points, low, high = (100 * share for share in (difference, *interval))
    return f"{points:+.2f} points ({low:+.2f} to {high:+.2f}), p = {p:.4f}"


def holm(p: list[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979, "A simple sequentially rejective
    multiple test procedure"): those below 0.05 are all true with a probability of 95 %.
    """
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)].tolist()


def compare(ones: list[str], others: list[str]) -> str:
    """Return a line with both accuracies over distinct texts, their difference, its 95 % interval
    and its p-value.

    Raises: UserError if a folder has no finished run, or two runs predicted different rows.
    """
    tables = []
    for one, other in zip(ones, others, strict=True):
        left, right = read_predictions(one), read_predictions(other)
        if left["labels"].tolist() != right["labels"].tolist():
            raise UserError(f"{one} and {other} did not predict the same rows: pair other runs")
        tables.append((left, right.assign(text=left["text"])))
    lefts, rights = (pd.concat(column) for column in zip(*tables, strict=True))
    test = paired_test(Scores(rights), Scores(lefts))
    if test is None:
        raise UserError("the runs share fewer than two distinct texts: use larger test files")
    return (
        f"{100 * test.other:.2f} % against {100 * test.one:.2f} %: "
        f"{describe(test.difference, test.interval, test.p)} "
        f"({test.texts:,} distinct texts, {len(lefts):,} rows, {len(ones)} pairs of runs)"
    )


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    parser = Parser("python -m script.study.significance", __doc__)
    parser.add_argument("one", nargs="+")
    parser.add_argument("--against", nargs="+", required=True, metavar="OTHER")
    args = parser.parse_args(argv)
    if len(args.one) != len(args.against):
        parser.error(f"{len(args.one)} folders against {len(args.against)}: pass equal numbers")
    return run_and_report(lambda: print(compare(args.one, args.against)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
