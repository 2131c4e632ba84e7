"""Tests of a study: the few comparisons that were named before its runs, on unseen texts."""

import argparse
from pathlib import Path

import numpy as np

from runtime.files import read_json, to_json, write_text
from script.study.runs import Run, scores_of
from script.study.significance import describe, group, holm, paired_test

# Method and method that it is compared with; the validation files choose a "best" one.
COMPARISONS = ["full:best free", "prefix:full", "4 prefixes:full", "ensemble:best single"]
BEST = {
    "best free": lambda run: not run.tuned and run.method != "ensemble",
    "best single": lambda run: run.method != "ensemble",
}
SIGNIFICANT = 0.05


def comparison(text: str) -> str:
    """Check one of --compare. Raises: ArgumentTypeError."""
    one, _, other = text.partition(":")
    if not one or not other or one == other:
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


def best(methods: dict[str, list[Run]], kind: str) -> str | None:
    """Return the method, of a kind in `BEST`, that is best on the validation files.

    It is the accuracy on their unseen texts that counts, if they have any.
    """

    def accuracy(run: Run) -> float:
        unseen = run.results.get("eval_accuracy_unseen")
        return run.results["eval_accuracy"] if unseen is None else unseen

    means = {
        method: np.mean([accuracy(run) for run in ours])
        for method, ours in methods.items()
        if BEST[kind](ours[0])
    }
    return max(means, key=means.get, default=None)


def compare_named(runs: list[Run], comparisons: list[str]) -> list[dict]:
    """Test the comparisons whose methods were both run, by protocol; see `paired_test`.

    Their p values are also corrected for the number of tests, see `holm`.
    """
    tests = []
    for protocol, ours in group(runs, lambda run: run.protocol).items():
        methods = group(ours, lambda run: run.method)
        for text in comparisons:
            other, _, named = text.partition(":")
            one = best(methods, named) if named in BEST else named
            if one == other or not {one, other} <= methods.keys():
                continue
            scores = [scores_of(methods[name], (False,)) for name in (one, other)]
            if None not in scores and (test := paired_test(*scores)):
                row = {"protocol": protocol, "one": one, "other": other, "named": text}
                row |= {"texts": test.texts, "difference": test.difference}
                tests.append(row | {"interval": test.interval, "p": test.p})
    for test, corrected in zip(tests, holm([test["p"] for test in tests]), strict=True):
        low, high = test["interval"]
        test["p_holm"] = corrected
        test["shown"] = corrected < SIGNIFICANT and not low <= 0 <= high
    return tests


def sentence(test: dict) -> str:
    """Return the result of a test in words."""
    verdict = "a difference" if test["shown"] else "not significant"
    return (
        f"{test['other']} against {test['one']}: "
        f"{describe(test['difference'], test['interval'], test['p'])}, with Holm's correction "
        f"{test['p_holm']:.4f}: {verdict}"
    )
