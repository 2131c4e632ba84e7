"""Using a trained model: labels by name, remembered columns, single texts, from Python."""

import csv
import hashlib
import io
import json
import re
import sys
from pathlib import Path

import pytest

import main
from model import load as load_classifier


def load(folder: Path, name: str):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def read_csv(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_split_record(folder: Path, **content) -> None:
    """Write a split.json that lists the split files in a folder."""
    names = ("train.csv", "val.csv", "test.csv")
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "split.json").write_text(json.dumps({"files": sums, **content}))


def test_labels_have_the_names_of_the_split_record_everywhere(run, tmp_path):
    """The same run otherwise: classes keep their order, so every figure is the same."""
    numbers = run(name="numbers")
    names = {"0": "pets", "1": "music", "2": "sports"}
    write_split_record(tmp_path, label_names=names)
    named = run(name="named")
    assert load(named, "config.json")["id2label"] == names
    one, other = (read_csv(folder / "predictions.csv") for folder in (numbers, named))
    assert [names[row["predicted"]] for row in one] == [row["predicted"] for row in other]
    assert [row["probability_2"] for row in one] == [row["probability_sports"] for row in other]
    assert [row["label"] for row in other] == [row["label"] for row in one]  # the input is kept
    for name in ("README.md", "report.html"):
        assert "sports" in (named / name).read_text(encoding="utf-8")
    before, after = (load(folder, "all_results.json") for folder in (numbers, named))
    assert before["test_accuracy"] == after["test_accuracy"]
    assert before["test_loss"] == after["test_loss"]
    (tmp_path / "split.json").unlink()  # a model folder remembers the names
    argv = ["--do_predict", "--model_name_or_path", str(named), "--precision", "fp32"]
    argv += ["--test_file", str(tmp_path / "test.csv"), "--output_dir", str(tmp_path / "again")]
    assert main.main(argv) == 0
    assert read_csv(tmp_path / "again" / "predictions.csv") == other


def test_a_split_record_of_other_files_names_no_labels(run, tmp_path):
    write_split_record(tmp_path, label_names={"0": "pets"})
    with open(tmp_path / "train.csv", "a") as file:
        file.write("one more cat,0\n")
    assert load(run(), "run.json")["labels"] == ["0", "1", "2"]


def test_columns_come_from_the_split_record_which_the_run_records(run, tmp_path):
    for name in ("train.csv", "val.csv", "test.csv"):
        text = (tmp_path / name).read_text().replace("text,label", "title,kind", 1)
        (tmp_path / name).write_text(text)
    columns = {"text_column_names": ["title"], "label_column_name": "kind"}
    write_split_record(tmp_path, columns=columns, protocol="own", parameters={"seed": 7})
    record = load(run(), "run.json")
    assert record["settings"]["label_column_name"] == "kind"
    assert record["split"] == {"protocol": "own", "parameters": {"seed": 7}}


def test_the_label_column_is_no_text_column(run, capsys):
    run("--label_column_name", "text", status=2)
    assert "'text' is the label column" in capsys.readouterr().err


def test_texts_of_the_command_line_are_labelled_without_files(run, monkeypatch, capsys, tmp_path):
    folder = run()
    before = sorted(tmp_path.iterdir())
    rows = read_csv(folder / "predictions.csv")
    argv = ["--do_predict", "--model_name_or_path", str(folder), "--precision", "fp32", "--text"]
    capsys.readouterr()
    assert main.main([*argv, *(row["text"] for row in rows[:2])]) == 0
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(row["text"] for row in rows[:2])))
    assert main.main([*argv, "-"]) == 0
    lines = printed.splitlines()
    why = [line for line in lines if "without the word: " in line]
    assert len(why) == 2  # each text has two words
    assert capsys.readouterr().out.splitlines() == [line for line in lines if line not in why]
    first = lines[:2]
    assert first[0] == rows[0]["text"]
    assert first[1].split()[1] == rows[0]["predicted"]
    assert float(first[1].split()[0]) == pytest.approx(float(rows[0]["confidence"]), abs=1e-4)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("flags", [(), ("--prefix",), ("--tuning_method", "bias")])
def test_a_classifier_from_python_predicts_as_main_does(run, flags):
    folder = run(*flags)
    classifier = load_classifier(folder, "fp32")
    rows = read_csv(folder / "predictions.csv")
    for found, row in zip(classifier([row["text"] for row in rows]), rows, strict=True):
        assert found["label"] == row["predicted"]
        assert found["confidence"] == pytest.approx(float(row["confidence"]), abs=1e-5)
        assert list(found["probabilities"]) == ["0", "1", "2"]
    assert classifier(rows[0]["text"])[0]["label"] == rows[0]["predicted"]
    assert classifier([]) == []
    assert classifier("cat " * 100)[0]["label"] in list("012")  # longer than max_seq_length


@pytest.mark.parametrize("flags", [(), ("--prefix",), ("--tuning_method", "bias")])
def test_the_python_lines_of_the_model_card_run(run, flags):
    """Those of this project, and of transformers or PEFT if the folder loads there."""
    card = (run(*flags) / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == (1 if "bias" in flags else 2)
    for block in blocks:
        exec(block, {})
