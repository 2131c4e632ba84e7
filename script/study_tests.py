"""Paired tests of a study: which methods differ on unseen texts, and which beat the baselines.

Runs are the dictionaries of `script.compare.read`.
"""

from itertools import combinations

import numpy as np
import pandas as pd

from evaluation.paired import paired_test

SIGNIFICANT = 0.05


def test_pairs(runs: list[dict], training_keys: dict[str, set[str]]) -> list[dict]:
    """Compare each pair of methods of a protocol on the same unseen texts; see `paired_test`.

    training_keys: of the texts in the training file of each data folder.
    """
    unseen: dict[tuple, list[pd.DataFrame]] = {}
    for run in runs:
        table = run["predictions"]
        is_seen = table["text"].isin(training_keys[run["data"]])
        unseen.setdefault((run["protocol"], run["method"]), []).append(table[~is_seen])
    tests = []
    for (protocol, one), (other_protocol, other) in combinations(unseen, 2):
        if protocol == other_protocol:
            tables = pd.concat(unseen[protocol, one]), pd.concat(unseen[protocol, other])
            if test := paired_test(*tables):
                row = {"protocol": protocol, "one": one, "other": other}
                row |= {"texts": test.texts, "difference": test.difference, "p": test.p}
                tests.append(row)
    return tests


def against_free(runs: list[dict], tests: list[dict]) -> list[str]:
    """Name each tuned method that is not shown to beat the best baseline on unseen texts.

    The validation files choose the best baseline.
    """
    found = []
    for protocol in dict.fromkeys(run["protocol"] for run in runs):
        here = [run for run in runs if run["protocol"] == protocol]
        tuned = dict.fromkeys(run["method"] for run in here if run["tuned"])
        scores: dict[str, list[float]] = {}
        for run in here:
            if run["method"] not in (*tuned, "ensemble"):
                scores.setdefault(run["method"], []).append(run["results"]["eval_accuracy"])
        if not scores:
            continue
        best = max(scores, key=lambda method: np.mean(scores[method]))
        for test in tests:
            if (test["protocol"], test["one"]) == (protocol, best) and test["other"] in tuned:
                points = f"{100 * test['difference']:+.2f} points, p = {test['p']:.4f}"
                if test["difference"] <= 0 or test["p"] >= SIGNIFICANT:
                    found.append(
                        f"{protocol}: {test['other']} is not shown to beat {best}, which costs "
                        f"next to nothing ({points})."
                    )
    return found


def format_tests(tests: list[dict]) -> str:
    """Format the paired tests, one per line."""
    lines = ["paired permutation tests on unseen texts:"]
    for test in tests:
        pair = f"{test['protocol']:9} {test['other']} against {test['one']}"
        points = f"{100 * test['difference']:+.2f} points, p = {test['p']:.4f}"
        lines.append(f"{pair}: {points} ({test['texts']:,} texts)")
    return "\n".join(lines)
