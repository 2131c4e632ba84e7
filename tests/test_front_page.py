"""The tables of the project's pages."""

import json

import pytest

from script.study import front_page

INTERVALS = {f"{name} interval": [0.5, 0.75] for name in ("accuracy", "on seen", "on unseen")}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Write the rows of methods as (data, method, validation, test, macro F1) to a folder."""
    monkeypatch.setattr(front_page, "RESULTS", tmp_path)

    def write(*rows: tuple) -> None:
        names = ("data", "method", "validation", "on unseen", "macro F1")
        table = [dict(zip(names, row, strict=True)) | INTERVALS for row in rows]
        for row in table:
            row["accuracy"] = row["of rows"] = row["on unseen"]
        (tmp_path / "methods.json").write_text(json.dumps(table))

    return write


def test_the_validation_files_choose_the_best_free_baseline(results):
    results(
        ("raw", "look-up", 0.6, 0.4, 0.1),
        ("raw", "combined, SVM", 0.5, 0.9, 0.1),
        ("raw", "full", 0.9, 0.7, 0.2),
        ("emotion", "full", 0.9, 0.8, 0.61),
        ("emotion", "lora", 0.9, 0.7, 0.62),
    )
    header, _, *rows = front_page.TABLES["front"]().splitlines()
    assert header == "| method | titles | tweets, macro F1 |"
    assert rows == [
        "| best free baseline | 40.0 |  |",
        "| full fine-tuning | **70.0** | 61.0 |",
        "| LoRA |  | **62.0** |",
    ]
    assert "| dictionary | **40.0** |  |" in front_page.TABLES["free"]()
    assert "| full fine-tuning | **70.0 (50.0–75.0)** |" in front_page.TABLES["titles"]()


def test_setfit_stands_beside_the_methods(results, tmp_path):
    results(("emotion-8", "full", 0.6, 0.4, 0.3))
    rows = (
        {"test_accuracy": 0.4, "test_macro_f1": 0.5},
        {"test_accuracy": 0.6, "test_macro_f1": 0.5},
    )
    runs = dict(zip(("emotion-8/0", "emotion-8/1"), rows, strict=True)) | {"emotion-64/0": rows[1]}
    (tmp_path / "setfit.json").write_text(json.dumps(runs))
    lines = front_page.TABLES["few"]().splitlines()
    assert lines[-2:] == [
        "| full fine-tuning | 40.0 / 30.0 |  |",
        "| SetFit | **50.0 / 50.0** | 60.0 / 50.0 |",
    ]


def test_the_tests_are_a_row_for_each_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(front_page, "RESULTS", tmp_path)
    test = {"data": "raw", "named": "full:best free", "difference": 0.021}
    test |= {"interval": [-0.001, 0.043], "p_holm": 0.00512, "shown": False}
    tests = [test, test | {"data": "emotion", "shown": True}]
    (tmp_path / "tests.json").write_text(json.dumps(tests))
    cell = "+2.1 (-0.1 to +4.3), p = 0.0051"
    row = f"| full fine-tuning against best free | {cell} | **{cell}** |"
    assert front_page.TABLES["tests"]().splitlines()[2:] == [row]


def test_a_page_is_filled_between_its_marks_and_nowhere_else(monkeypatch):
    monkeypatch.setitem(front_page.TABLES, "front", lambda: "| new |")
    page = "a\n\n<!-- front -->\n| old |\n| rows |\n<!-- end -->\n\n<!-- note -->\nb\n"
    assert front_page.filled(page) == page.replace("| old |\n| rows |", "| new |")
