"""Using a trained model: labels by name, remembered columns, single texts, from Python."""

import csv
import hashlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import dataset
import main
from conftest import one_line, write_csv
from model import load as load_classifier
from model.folders import BUNDLED_NAME, locate
from runtime import machine
from runtime.batches import UNREADABLE, encode, rows_of, unreadable
from runtime.columns import precision_for
from runtime.files import UserError


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


def test_texts_of_the_command_line_are_labelled_without_files(
    trained, monkeypatch, capsys, tmp_path
):
    folder = trained()
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


KINDS = [(), ("--prefix",), ("--prefix", "--num_prefixes", "2")]
KINDS += [("--tuning_method", method) for method in ("lora", "probe", "bias")]


@pytest.mark.parametrize("flags", KINDS)
def test_a_classifier_from_python_predicts_as_main_does(trained, flags):
    folder = trained(*flags)
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
def test_the_python_lines_of_the_model_card_run(trained, flags):
    """Those of this project, and of transformers or PEFT if the folder loads there."""
    card = (trained(*flags) / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == (1 if "bias" in flags else 2)
    for block in blocks:
        exec(block, {})


def test_texts_of_every_kind_are_labelled_or_refused_by_number(trained):
    """A missing text had the prediction of another one, and a table a single prediction."""
    classifier = load_classifier(trained(), "fp32")
    texts = ["drum and bass", "a cat", "coach"]
    expected = classifier(texts)
    for kind in (tuple, pd.Series, np.array, iter):
        assert classifier(kind(texts)) == expected
    for given, said in (
        (["drum", None, "cat"], "text 2 is missing"),
        (pd.Series(["drum", "cat", np.nan]), "text 3 is missing"),
        (pd.array([pd.NA], dtype="string"), "text 1 is missing"),
        (["drum", " "], "text 2 is blank"),
        ("", "text 1 is blank"),
        ([("a", "b")], "text 1 is of type tuple"),
        ([5], "text 1 is of type int"),
        (["\ud800"], "text 1 is not UTF-8"),
        (pd.DataFrame({"text": texts}), "texts are of type DataFrame"),
        (np.array([texts]), "texts are of type ndarray"),
        ({"a cat": 1}, "texts are of type dict"),
        (None, "texts are of type NoneType"),
    ):
        with pytest.raises(UserError, match=said):
            classifier(given)
    with pytest.raises(TypeError):  # not the tokens of "cat"
        encode(classifier.tokenizer, rows_of(["drum", None, "cat"]), 8)


def test_loading_a_model_changes_nothing_in_the_program_that_does_it(trained, monkeypatch):
    folder, called = trained("--prefix"), []
    for name in ("set_num_threads", "use_deterministic_algorithms", "manual_seed"):
        monkeypatch.setattr(torch, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    monkeypatch.delenv("OMP_NUM_THREADS")
    before, verbosity = torch.get_rng_state(), transformers.logging.get_verbosity()
    load_classifier(folder, "fp32")
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    machine.pick_machine("fp32")
    assert not called
    assert transformers.logging.get_verbosity() == verbosity == transformers.logging.WARNING


def test_texts_and_files_obey_the_same_rules(trained, predict, monkeypatch, capsys, tmp_path):
    """Blank texts are refused by number or dropped; longer texts are cut to --max_seq_length."""
    folder = trained()
    argv = ["--do_predict", "--model_name_or_path", str(folder), "--precision", "fp32"]

    def label(*flags: str, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        capsys.readouterr()
        status = main.main([*argv, "--text", *flags])
        return status, *capsys.readouterr()

    def first_column(printed: str) -> list[str]:
        return [line for line in printed.splitlines() if not line.startswith(" ")]

    lines, texts = "a cat\n\ncoach\n", ("a cat", " ", "coach")
    for flags, given in ((texts, ""), (("-",), lines)):
        status, _, error = label(*flags, lines=given)
        assert "text 2 is blank" in (said := one_line((status, error))) and "--drop_empty" in said
        status, out, _ = label(*flags, "--drop_empty", lines=given)
        assert (status, first_column(out)) == (0, ["a cat", "coach"])
    assert "there is no text" in one_line(label("-")[::2])
    (tmp_path / "blank.csv").write_text("text\na cat\n\ncoach\n")
    blank = ("--test_file", str(tmp_path / "blank.csv"))
    assert "the text is blank in row 2" in one_line(predict(folder, *blank))
    assert predict(folder, *blank, "--drop_empty")[0] == 0
    cut, text = ("--max_seq_length", "4"), "three race and four ball and a big old team of blue"
    (tmp_path / "long.csv").write_text(f"text\n{text}\n")
    assert predict(folder, "--test_file", str(tmp_path / "long.csv"), *cut)[0] == 0
    row = read_csv(tmp_path / "predicted" / "predictions.csv")[0]
    best = label(text, *cut)[1].splitlines()[1].split()
    assert best == [f"{float(row['confidence']):.4f}", row["predicted"]]
    assert label(text)[1].splitlines()[1].split() != best


def test_a_model_predicts_in_the_precision_that_it_was_calibrated_in(
    trained, monkeypatch, tmp_path
):
    """Measured again, `auto` may pick another one."""
    folder = trained("--prefix")
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(folder, checkpoint)
    state = {"run": {"settings": {"precision": "fp32"}}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "run.json").unlink()
    for gain, recorded, expected in ((9, "fp32", "fp32"), (9, "bf16", "bf16"), (0, "bf16", "fp32")):
        monkeypatch.setattr(machine, "bfloat16_gain", lambda gain=gain: gain)
        record = load(folder, "run.json")
        record["settings"]["precision"] = recorded
        (folder / "run.json").write_text(json.dumps(record))
        assert load_classifier(folder).machine.precision == expected
        assert load_classifier(folder, "bf16").machine.precision == "bf16"
        argv = ["--do_predict", "--model_name_or_path", str(folder), "--overwrite_output_dir"]
        argv += ["--test_file", str(tmp_path / "test.csv"), "--output_dir", str(tmp_path / "p")]
        assert main.main(argv) == 0
        assert load(tmp_path / "p", "run.json")["settings"]["precision"] == expected
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: 9)
    assert load_classifier(checkpoint).machine.precision == "fp32"
    assert precision_for("auto", [folder, checkpoint]) == "auto"  # they differ


@pytest.mark.parametrize(
    "flags", [(), ("--prefix",), ("--prefix", "--num_prefixes", "2"), ("--rdrop_alpha", "1")]
)
def test_no_warning_of_a_run_comes_twice(run, predict, monkeypatch, caplog, tmp_path, flags):
    """Each file is encoded up to three times, and the test file in chunks."""
    monkeypatch.setattr(dataset, "CHUNK_ROWS", 2)
    for name in ("train", "val", "test"):
        rows = [(f"中文 的 {number} 中 文 cat", number % 3) for number in range(12)]
        write_csv(tmp_path / f"{name}.csv", rows)

    def said() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
        assert len({*found}) == len(found)
        assert all(len(line.replace(str(tmp_path), "")) <= 300 for line in found)
        caplog.clear()
        return [line for line in found if "are cut" in line or "are unknown" in line]

    folder = run("--max_seq_length", "4", *flags)
    lines = said()
    for name, rows in (("train", 12), ("val", 12), ("test", 2)):
        shown = f"{name}.csv: {rows} of {rows} texts (rows 1 to {rows}) are longer than 4 tokens"
        assert sum(shown in line for line in lines) == 1
    language = [line for line in lines if "train.csv: 100 % of the tokens are unknown" in line]
    assert (len(lines), len(language)) == (4, 1)
    assert predict(folder)[0] == 0
    assert [f"{tmp_path}/test.csv: " in line for line in said()] == [True, True]


@pytest.mark.parametrize(
    ("texts", "known"),
    [
        (["We went to the park, it was great! 😂", "iPhone 15: what's new?", "café, naïve"], True),
        (["今天天气很好我们去公园散步", "这部电影非常精彩值得一看"], False),
        (["iPhone 15 Pro 开箱视频 unboxing", "BTS 新歌 MV 首播 Official Video"], False),
        (["Сегодня хорошая погода, мы идем в парк", "Новый клип: видео"], False),
        (["오늘 날씨가 좋아서 공원에 갔다", "이 영화는 정말 재미있어요"], False),
        ([], True),
    ],
)
def test_texts_in_a_script_that_the_model_does_not_know_are_noticed(texts, known):
    """Russian and Korean have few unknown tokens: they fall apart into letters."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(locate(BUNDLED_NAME).backbone)
    share = unreadable(tokenizer, tokenizer(texts)["input_ids"] if texts else [])
    assert (share < UNREADABLE / 2) if known else (share > UNREADABLE)
