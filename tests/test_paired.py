"""Two runs on the same rows: which one is better, and can it be chance?"""

import json
import sys

import numpy as np
import pytest

from conftest import write_csv
from script import paired


@pytest.fixture
def finished(tmp_path):
    """Write what a run leaves of its predictions; rows: text, label, predicted."""

    def write(name: str, rows: list[tuple[str, str, str]], problem: str = "single_label") -> str:
        (tmp_path / name).mkdir()
        settings = {
            "text_column_names": ["text"],
            "text_column_delimiter": " ",
            "label_column_name": "label",
            "problem_type": f"{problem}_classification",
            "csv_encoding": "cp1252",  # of what was read; predictions are UTF-8
            "drop_empty": False,
        }
        (tmp_path / name / "run.json").write_text(json.dumps({"settings": settings, "files": []}))
        write_csv(tmp_path / name / "predictions.csv", rows, header=["text", "label", "predicted"])
        return str(tmp_path / name)

    return write


def test_a_run_is_as_good_as_itself(run):
    folder = run()
    accuracy = json.loads((folder / "all_results.json").read_text())["test_accuracy"]
    line = paired.compare([folder], [folder])
    assert line.startswith(f"{100 * accuracy:.2f} % against {100 * accuracy:.2f} %: +0.00 points")
    assert "p = 1.0000 (pairs of runs: 1" in line


def test_difference_and_spread_are_over_rows_and_p_over_distinct_texts(finished):
    """10 texts, each in two rows: one is right for all, the other for one row; p = 2 / 2 ** 10."""
    texts = [f"text {number}" for number in range(10)]
    ones = [finished(f"one {n}", [(t, "1", "1") for t in texts]) for n in range(2)]
    last = [(text, "1.0", "2") for text in texts[:9]] + [(texts[9], "1", "1")]
    others = [finished("other 0", [(f"{t}!", "1", "0") for t in texts]), finished("other 1", last)]
    line = paired.compare(ones, others)
    assert line.startswith("100.00 % against 5.00 %: +95.00 ± 7.07 points, ")
    assert "(pairs of runs: 2, 20 rows, 10 distinct texts)" in line
    difference, p = paired.exchange_test(np.zeros(10), np.ones(10))
    assert difference == 1 and p == pytest.approx(2 / 2**10) and f"p = {p:.4f}" in line


def test_several_labels_a_row_are_a_set(finished):
    rows = [("a", "x|y", "y|x"), ("b", "x", ""), ("c", "", ""), ("d", "x|y", "x")]
    folder = finished("several", rows, problem="multi_label")
    assert paired.predicted(folder)["right"].tolist() == [True, False, True, False]


def test_a_label_may_hold_the_sign_that_separates_several(finished):
    assert paired.predicted(finished("one", [("a", "x|y", "x|y")]))["right"].tolist() == [True]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["one", "--against", "other"], "one and {}other have not predicted the same rows"),
        (["one", "--against", "none"], "none holds no finished run"),
        (["one", "--against", "unlabelled"], "no column 'label'"),
        (["one", "one", "--against", "one"], "2 folders against 1: give as many"),
    ],
)
def test_what_cannot_be_compared_is_one_line(finished, tmp_path, monkeypatch, capsys, flags, said):
    finished("one", [("a", "1", "1")])
    finished("other", [("a", "2", "1")])
    finished("unlabelled", [])
    write_csv(tmp_path / "unlabelled" / "predictions.csv", [("a", "1")], ["text", "predicted"])
    folders = [word if word.startswith("--") else f"{tmp_path}/{word}" for word in flags]
    monkeypatch.setattr(sys, "argv", ["paired", *folders])
    with pytest.raises(SystemExit) as ended:
        paired.main()
    assert ended.value.code == 2
    assert said.format(f"{tmp_path}/") in capsys.readouterr().err.splitlines()[-1]
