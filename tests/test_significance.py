"""Two runs on the same rows: which one is better, and could it be chance?"""

import json

import numpy as np
import pandas as pd
import pytest

from conftest import one_line, write_csv
from script.study import significance
from script.study.significance import (
    Scores,
    difference_interval,
    holm,
    paired_test,
    read_predictions,
)


@pytest.fixture
def finished(tmp_path):
    """Write the files of a finished run; rows: text, label, predicted."""

    def write(name: str, rows: list[tuple[str, str, str]], problem: str = "single_label") -> str:
        (tmp_path / name).mkdir()
        settings = {
            "text_column_names": ["text"],
            "text_column_delimiter": " ",
            "label_column_name": "label",
            "problem_type": f"{problem}_classification",
            "csv_encoding": "cp1252",  # of the input; predictions are UTF-8
            "drop_empty": False,
        }
        (tmp_path / name / "run.json").write_text(json.dumps({"settings": settings, "files": []}))
        write_csv(tmp_path / name / "predictions.csv", rows, header=["text", "label", "predicted"])
        return str(tmp_path / name)

    return write


def test_a_run_is_as_good_as_itself(run):
    folder = run()
    accuracy = read_predictions(folder).groupby("text")["right"].mean().mean()
    line = significance.compare([folder], [folder])
    assert line.startswith(f"{100 * accuracy:.2f} % against {100 * accuracy:.2f} %: +0.00 points")
    assert "p = 1.0000" in line and "1 pairs of runs" in line


def test_accuracies_and_p_are_over_distinct_texts(finished):
    """10 texts with two rows each: ONE is right in all, OTHER in one; p = 2 / 2 ** 10."""
    texts = [f"text {number}" for number in range(10)]
    ones = [finished(f"one {n}", [(t, "1", "1") for t in texts]) for n in range(2)]
    last = [(text, "1.0", "2") for text in texts[:9]] + [(texts[9], "1", "1")]
    others = [finished("other 0", [(f"{t}!", "1", "0") for t in texts]), finished("other 1", last)]
    line = significance.compare(ones, others)
    assert line == (
        "100.00 % against 5.00 %: +95.00 points (+47.20 to +100.00), p = 0.0020 (10 distinct "
        "texts, 20 rows, 2 pairs of runs)"
    )
    wrong, right = (pd.DataFrame({"text": texts, "run": 0, "right": r}) for r in (False, True))
    test = paired_test(Scores(wrong), Scores(right))
    assert (test.one, test.other, test.difference, test.texts) == (0, 1, 1, 10)
    assert test.p == pytest.approx(2 / 2**10)


def test_different_texts_or_a_single_text_are_not_compared():
    a, b, ab = (
        Scores(pd.DataFrame({"text": list(texts), "run": 0, "right": True}))
        for texts in ("a", "b", "ab")
    )
    assert paired_test(a, a) is paired_test(a, b) is paired_test(ab, a) is None
    assert paired_test(ab, ab).p == 1


def test_several_labels_per_row_are_a_set(finished):
    rows = [("a", "x|y", "y|x"), ("b", "x", ""), ("c", "", ""), ("d", "x|y", "x")]
    folder = finished("several", rows, problem="multi_label")
    assert read_predictions(folder)["right"].tolist() == [True, False, True, False]


def test_a_single_label_may_contain_the_label_separator(finished):
    assert read_predictions(finished("one", [("a", "x|y", "x|y")]))["right"].tolist() == [True]


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
    assert found.interval[0] < 0.8 < 1 == found.interval[1] == found.difference


def test_p_values_are_corrected_as_by_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["one", "--against", "other"], "one and {}other did not predict the same rows"),
        (["one", "--against", "none"], "none contains no finished run"),
        (["one", "--against", "unlabelled"], "no column 'label'"),
        (["one", "--against", "one"], "share fewer than two distinct texts"),
        (["one", "one", "--against", "one"], "2 folders against 1: pass equal numbers"),
    ],
)
def test_user_errors_are_one_line(finished, tmp_path, capsys, flags, said):
    finished("one", [("a", "1", "1")])
    finished("other", [("a", "2", "1")])
    finished("unlabelled", [])
    write_csv(tmp_path / "unlabelled" / "predictions.csv", [("a", "1")], ["text", "predicted"])
    folders = [word if word.startswith("--") else f"{tmp_path}/{word}" for word in flags]
    try:
        status = significance.main(folders)
    except SystemExit as ended:
        status = ended.code
    assert said.format(f"{tmp_path}/") in one_line((status, capsys.readouterr().err))
