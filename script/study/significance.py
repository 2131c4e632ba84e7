"""Statistics of a study: intervals over texts and seeds, and the tests of its comparisons.

The few comparisons that are tested are named before the runs. T distinct texts, K runs.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import permutation_test
from scipy.stats import t as student

from evaluation.intervals import LEVEL, NORMAL, wilson
from runtime.files import read_json, to_json, write_text
from script.study.runs import Run, group, is_tuned

RESAMPLES = 9999
# Method and method that it is compared with; the validation files choose a "best" one.
COMPARISONS = ["full:best free", "prefix:full", "4 prefixes:full", "ensemble:best single"]
BEST = {
    "best free": lambda method: not is_tuned(method) and method != "ensemble",
    "best single": lambda method: method != "ensemble",
}
SIGNIFICANT = 0.05


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


def scores_of(runs: list[Run], seen: tuple[bool, ...] = (True, False)) -> Scores | None:
    """Return the scores of all runs of a method on the texts of these `seen`, if there are any."""
    table = pd.concat(run.predictions for run in runs)
    table = table[table["seen"].isin(seen)]
    return Scores(table) if len(table) else None


def paired_test(one: Scores, other: Scores) -> dict | None:
    """Compare two methods on the same texts; return None if the texts differ or are fewer than two.

    Each distinct text has the same weight. The permutation test swaps the two scores of texts at
    random, as if the methods were equal: its two-sided p, at least 0.0002, holds for these runs.
    The interval of the difference, other - one, also covers other seeds, as far as several runs
    predicted the same texts.
    """
    if not one.texts.index.equals(other.texts.index) or len(one.texts) < 2:
        return None
    shares = np.stack([one.texts, other.texts])  # [2, T]
    differ = shares[0] != shares[1]
    if differ.sum() < 2:
        differ[:] = True
    test = permutation_test(
        [*shares[:, differ]],  # a swap of equal scores changes nothing: leaving it out saves time
        lambda a, b, axis: np.sum(b - a, axis=axis) / len(differ),
        vectorized=True,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=200,
        rng=0,
    )
    result = {"texts": len(one.texts), "difference": float(test.statistic)}
    return result | {"interval": difference_interval(one, other), "p": float(test.pvalue)}


def holm(p: list[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979, "A simple sequentially rejective
    multiple test procedure"): those below 0.05 are all true with a probability of 95 %.
    """
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)].tolist()


def comparison(text: str) -> str:
    """Check one of --compare. Raises: ArgumentTypeError."""
    method, _, other = text.partition(":")
    if not method or not other or method == other:
        raise argparse.ArgumentTypeError(f"'{text}': name two methods, such as full:prefix")
    return text


def name_comparisons(comparisons: list[str], folder: Path, runs: list[Run]) -> bool:
    """Record the comparisons, unless a run of the study in this folder has already begun.

    Returns whether they are those that were recorded before the first run.
    """
    path = folder / "comparisons.json"
    if not any(run.folder.with_suffix(".log").exists() for run in runs):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, to_json(comparisons))
    return comparisons == (read_json(path, list) if path.exists() else COMPARISONS)


def validation_accuracy(runs: list[Run]) -> float:
    """Return the mean accuracy on the validation files, on their unseen texts if there are any."""
    unseen, whole = (
        [run.results.get(f"eval_accuracy{kind}") for run in runs] for kind in ("_unseen", "")
    )
    return float(np.mean(whole if None in unseen else unseen))


def compare_named(runs: list[Run], comparisons: list[str]) -> list[dict]:
    """Test the comparisons whose methods were both run, by protocol, on unseen texts.

    See `paired_test`; the p values are also corrected for the number of tests, see `holm`.
    """
    tests = []
    for protocol, ours in group(runs, lambda run: run.protocol).items():
        methods = group(ours, lambda run: run.method)
        for text in comparisons:
            other, _, named = text.partition(":")
            one = named
            if named in BEST:
                rivals = {name: methods[name] for name in filter(BEST[named], methods)}
                one = max(rivals, key=lambda name: validation_accuracy(rivals[name]), default=None)
            if one == other or not {one, other} <= methods.keys():
                continue
            scores = [scores_of(methods[name], (False,)) for name in (one, other)]
            if None not in scores and (test := paired_test(*scores)):
                row = {"protocol": protocol, "one": one, "other": other, "named": text}
                tests.append(row | test)
    correct(tests)
    return tests


def correct(tests: list[dict]) -> None:
    """Correct the p values of tests for their number, and say which differences are shown."""
    for test, corrected in zip(tests, holm([test["p"] for test in tests]), strict=True):
        low, high = test["interval"]
        test["p_holm"] = corrected
        test["shown"] = corrected < SIGNIFICANT and not low <= 0 <= high


def sentence(test: dict) -> str:
    """Return the result of a comparison in words."""
    points, low, high = (100 * share for share in (test["difference"], *test["interval"]))
    verdict = "a difference" if test["shown"] else "not significant"
    return (
        f"{test['other']} against {test['one']}: {points:+.2f} points ({low:+.2f} to {high:+.2f}), "
        f"p = {test['p']:.4f}, with Holm's correction {test['p_holm']:.4f}: {verdict}"
    )
