"""Two methods on the same texts: which one is better, and could it be chance?"""

import numpy as np
import pandas as pd
import pytest

from script.study.significance import Scores, difference_interval, holm, paired_test


def test_p_is_over_distinct_texts():
    """Of 10 texts all are right or all wrong, in two runs each: p = 2 / 2 ** 10."""
    texts = [f"text {number}" for number in range(10)] * 2
    runs = [0] * 10 + [1] * 10
    wrong, right = (
        Scores(pd.DataFrame({"text": texts, "run": runs, "right": r})) for r in (False, True)
    )
    assert (wrong.mean, right.mean) == (0, 1)
    test = paired_test(wrong, right)
    assert (test["difference"], test["texts"]) == (1, 10)
    assert test["p"] == pytest.approx(2 / 2**10)


def test_different_texts_or_a_single_text_are_not_compared():
    a, b, ab = (
        Scores(pd.DataFrame({"text": list(texts), "run": 0, "right": True}))
        for texts in ("a", "b", "ab")
    )
    assert paired_test(a, a) is paired_test(a, b) is paired_test(ab, a) is None
    assert paired_test(ab, ab)["p"] == 1


def runs(random, texts: int, count: int, share: float, spread: float) -> pd.DataFrame:
    """Draw runs of a method on the same texts; spread: standard deviation between seeds."""
    shares = share + random.normal(0, spread, count)
    right = [random.random(texts) < one for one in shares]
    tables = [pd.DataFrame({"text": range(texts), "right": one}) for one in right]
    return pd.concat(table.assign(run=number) for number, table in enumerate(tables))


@pytest.mark.parametrize("seeds", [1, 4])
def test_intervals_of_a_study_cover_seeds_if_there_are_several(seeds):
    """Seeds differ by 4 points; a single run cannot know that."""
    random, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(100):
        one, other = (Scores(runs(random, 1000, seeds, 0.6, 0.04)) for _ in range(2))
        low, high = difference_interval(one, other)
        covered += [one.interval()[0] <= 0.6 <= one.interval()[1], low <= 0 <= high]
    assert ((covered >= 90) == (seeds > 1)).all()


def test_texts_that_all_agree_still_leave_some_doubt():
    right, wrong = (pd.DataFrame({"text": range(10), "run": 0, "right": r}) for r in (True, False))
    assert Scores(right).interval()[0] < 0.8
    found = paired_test(Scores(wrong), Scores(right))
    assert found["interval"][0] < 0.8 < 1 == found["interval"][1] == found["difference"]


def test_p_values_are_corrected_as_by_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []
