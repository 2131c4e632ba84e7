"""Whole runs on the tiny BERT: the files they leave, and what is refused."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import main
from conftest import ROOT, ROWS, one_line, write_csv
from dataset import read_split
from runtime.file_format import FileFormat

RESULTS = set(
    "README.md all_results.json evaluation.json metrics.jsonl predictions.csv report.html "
    "run.json validation_predictions.csv".split()
)
FULL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "config.json"}
REQUIRED = set(
    "eval_accuracy eval_macro_f1 test_accuracy test_macro_f1 test_accuracy_seen "
    "test_accuracy_unseen test_seen_share trainable_parameters total_parameters train_runtime "
    "train_samples_per_second".split()
)
PROBE, BIAS = ("--tuning_method", "probe"), ("--tuning_method", "bias")


def load(folder: Path, name: str):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("flags", "model"), [((), FULL), (("--prefix",), ADAPTER), (PROBE, ADAPTER), (BIAS, ADAPTER)]
)
def test_a_run_writes_exactly_its_files(run, flags, model):
    folder = run(*flags)
    assert {path.name for path in folder.iterdir()} == RESULTS | model
    record = load(folder, "run.json")
    assert set(record["files"]) == RESULTS | model
    assert record["labels"] == ["0", "1", "2"]
    assert set(record["data"]) == {"train", "eval", "test"}
    train = record["data"]["train"]
    assert train["sha256"] == hashlib.sha256(Path(train["path"]).read_bytes()).hexdigest()
    assert set(load(folder, "all_results.json")) >= REQUIRED
    assert load(folder, "all_results.json")["test_seen_share"] == 0.5
    os.umask(umask := os.umask(0o022))
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}


def test_a_model_card_without_an_evaluation_says_so(backbone, files, tmp_path, capsys):
    argv = ["--do_train", *files[:2], "--model_name_or_path", backbone, "--num_train_epochs", "1"]
    argv += ["--max_seq_length", "16"]
    assert main.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    assert "neither evaluated nor tested" in (tmp_path / "out" / "README.md").read_text()
    assert "validation" not in capsys.readouterr().out


def test_prediction_uses_the_columns_of_training(run, tmp_path):
    rows = [(i, text, "a word", label) for i, (text, label) in enumerate(ROWS)]
    path = write_csv(tmp_path / "columns.csv", rows, ("id", "title", "tags", "category"))
    named = ["--text_column_names", "title,tags", "--text_column_delimiter", " : "]
    files = [word for name in ("train", "validation", "test") for word in (f"--{name}_file", path)]
    folder = run(*named, "--label_column_name", "category", *files)
    argv = ["--do_predict", "--model_name_or_path", str(folder), "--precision", "fp32"]
    argv += ["--test_file", path, "--output_dir", str(tmp_path / "again")]
    assert main.main(argv) == 0
    mine, first = (load(path, "all_results.json") for path in (tmp_path / "again", folder))
    assert mine["test_loss"] == pytest.approx(first["test_loss"], abs=1e-6)


def test_made_up_texts_are_mentioned_next_to_every_figure(run, files, tmp_path):
    sha256 = hashlib.sha256((tmp_path / "test.csv").read_bytes()).hexdigest()
    for made_up in (True, False):
        split = {"synthetic": made_up, "files": {"test.csv": sha256}}
        (tmp_path / "split.json").write_text(json.dumps(split))
        folder = run("--overwrite_output_dir")
        assert load(folder, "run.json")["synthetic"] == made_up
        for name in ("README.md", "report.html"):
            text = (folder / name).read_text(encoding="utf-8").lower()
            assert ("say nothing about real data" in text) == made_up


def test_without_the_packages_one_line_says_what_to_run(tmp_path):
    flags = ["--do_train", "--output_dir", str(tmp_path / "out")]
    shown = subprocess.run(
        [sys.executable, "-S", "main.py", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 2
    assert "error: torch is not installed here; run bash script/run_og.sh once" in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize("flags", [(), ("--prefix",), PROBE, BIAS])
def test_a_model_or_adapter_folder_alone_predicts_the_same(trained, flags, tmp_path):
    """With or without labels, in any order: the same probabilities, row for row."""
    folder = trained(*flags)
    first = pd.read_csv(folder / "predictions.csv", dtype=str)
    rows = [(i, text) for i, (text, _) in enumerate(ROWS[4:6])]
    new = write_csv(tmp_path / "new.csv", rows, ("id", "text"))
    argv = ["--do_predict", "--model_name_or_path", str(folder), "--precision", "fp32"]
    again, alone = tmp_path / "again", tmp_path / "alone"
    for test, out in ((str(tmp_path / "test.csv"), again), (new, alone)):
        assert main.main([*argv, "--test_file", test, "--output_dir", str(out)]) == 0
    second = pd.read_csv(again / "predictions.csv", dtype=str)
    assert second["predicted"].equals(first["predicted"])
    for column in ("probability_0", "probability_1", "probability_2"):
        assert (second[column].astype(float) - first[column].astype(float)).abs().max() < 2e-6
    scored, unscored = load(again, "all_results.json"), load(alone, "all_results.json")
    assert scored["test_accuracy"] == load(folder, "all_results.json")["test_accuracy"]
    assert "test_accuracy" not in unscored
    written = {path.name for path in alone.iterdir()}
    assert written == {"all_results.json", "predictions.csv", "run.json"}
    third = pd.read_csv(alone / "predictions.csv", dtype=str)
    columns = "id text predicted confidence probability_0 probability_1 probability_2"
    assert list(third.columns) == columns.split()
    assert third.loc[1, "probability_0"] == second.loc[0, "probability_0"]


def test_predictions_keep_the_input_rows_in_order(trained, tmp_path):
    table = pd.read_csv(trained() / "predictions.csv")
    assert table["text"].tolist() == [ROWS[5][0], "big team", "a dog", ROWS[5][0]]
    probability = table[["probability_0", "probability_1", "probability_2"]]
    assert (probability.sum(axis=1) - 1).abs().max() < 1e-5
    assert (table["confidence"] == probability.max(axis=1)).all()
    assert (table["predicted"] == probability.to_numpy().argmax(axis=1)).all()


def test_transformers_loads_a_model_folder_with_the_label_names(run, tmp_path):
    train = write_csv(tmp_path / "named.csv", [(text, f"class {label}") for text, label in ROWS])
    flags = ["--train_file", train, "--validation_file", train, "--test_file", train]
    folder = run(*flags)
    table = pd.read_csv(folder / "predictions.csv")
    classify = pipeline("text-classification", model=str(folder), top_k=None)
    for row in table.to_dict("records"):
        found = {item["label"]: item["score"] for item in classify([row["text"]])[0]}
        for name, value in found.items():
            assert value == pytest.approx(row[f"probability_{name}"], abs=2e-6)
        assert max(found, key=found.get) == row["predicted"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(ROWS[0][0], return_tensors="pt")
    with torch.no_grad():
        probability = model(**tokens).logits.softmax(-1)[0]
    expected = table.loc[0, [f"probability_class {i}" for i in range(3)]].astype(float)
    assert probability.tolist() == pytest.approx(expected.tolist(), abs=2e-6)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 16


def test_several_labels_per_row_work_from_training_to_prediction(run, tmp_path):
    rows = [(text, "a|b" if "and" in text else "a" if "the" in text else "") for text, _ in ROWS]
    path = write_csv(tmp_path / "multi.csv", rows)
    files = ["--train_file", path, "--validation_file", path, "--test_file", path]
    for flags in ([], ["--prefix"]):
        kind = ["--problem_type", "multi_label_classification"]
        folder = run(*files, *flags, *kind, name=f"m{len(flags)}")
        results = load(folder, "all_results.json")
        assert {"eval_micro_f1", "test_macro_f1"} <= set(results)
        table = pd.read_csv(folder / "predictions.csv", keep_default_na=False)
        for row in table.to_dict("records"):
            expected = "|".join(name for name in "ab" if row[f"probability_{name}"] >= 0.5)
            assert row["predicted"] == expected
        again = tmp_path / f"again{len(flags)}"
        argv = ["--do_predict", "--model_name_or_path", str(folder), "--test_file", path]
        assert main.main([*argv, "--output_dir", str(again), "--precision", "fp32"]) == 0
        assert load(again, "all_results.json")["test_micro_f1"] == results["test_micro_f1"]


def test_a_dozen_labels_keep_their_order_in_a_model_folder(run, tmp_path):
    """config.json sorts its keys as text, where 10 comes before 2."""
    path = write_csv(tmp_path / "many.csv", [(ROWS[i % 11][0], i % 12) for i in range(24)])
    folder = run("--train_file", path, "--validation_file", path, "--test_file", path)
    argv = ["--do_eval", "--model_name_or_path", str(folder), "--validation_file", path]
    assert main.main([*argv, "--output_dir", str(tmp_path / "eval"), "--precision", "fp32"]) == 0
    for key in ("eval_loss", "eval_accuracy"):
        first, again = (load(tmp_path / name, "all_results.json")[key] for name in ("out", "eval"))
        assert first == pytest.approx(again, rel=1e-5)
    assert load(tmp_path / "eval", "run.json")["labels"] == [str(i) for i in range(12)]


def test_each_epoch_is_saved_on_request(run):
    folder = run("--save_strategy", "epoch")
    assert {"checkpoint-3", "checkpoint-6"} <= {path.name for path in folder.iterdir()}
    AutoModelForSequenceClassification.from_pretrained(folder / "checkpoint-3")


def test_a_finished_run_is_not_overwritten(run, trained, capsys):
    folder = trained()
    before = hashes(folder)
    run(status=2)
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert hashes(folder) == before


def test_overwriting_removes_only_what_the_program_wrote(run):
    folder = run("--save_strategy", "epoch")
    (folder / "notes.txt").write_text("mine")
    run("--prefix", "--overwrite_output_dir")
    assert {path.name for path in folder.iterdir()} == RESULTS | ADAPTER | {"notes.txt"}


@pytest.mark.parametrize("name", ["README.md", "checkpoint-3"])
def test_foreign_files_are_not_overwritten(run, tmp_path, capsys, name):
    folder = tmp_path / "out"
    (folder / name).mkdir(parents=True)
    run("--overwrite_output_dir", status=2)
    assert f"contains files this program did not write: {name};" in capsys.readouterr().err


def test_a_forged_list_of_files_removes_nothing_else(run, trained, tmp_path):
    folder = trained()
    (tmp_path / "precious").write_text("mine")
    record = load(folder, "run.json")
    record["files"] += ["..", ".", "", "../precious", "/etc/hosts"]
    (folder / "run.json").write_text(json.dumps(record))
    run("--overwrite_output_dir")
    assert (tmp_path / "precious").read_text() == "mine"
    assert {path.name for path in folder.iterdir()} == RESULTS | FULL


def test_any_text_is_unchanged_in_the_predictions(run, tmp_path):
    texts = ["a\rb", "c\nd", 'e "f"', " g ", "NA", "h,i", "עברית 🎉"]
    path = write_csv(tmp_path / "t.csv", [(text, "007") for text in texts], ("text", "note"))
    folder = run("--test_file", path)
    back = read_split(folder / "predictions.csv", FileFormat(), needs_labels=False)
    assert back.texts == texts
    assert back.table["note"].tolist() == ["007"] * len(texts)


def test_bfloat16_and_settings_reach_the_model(run):
    flags = ["--hidden_dropout_prob", "0.25", "--max_train_samples", "8"]
    folder = run("--prefix", "--precision", "bf16", *flags)
    assert load(folder, "config.json")["hidden_dropout_prob"] == 0.25
    assert load(folder, "all_results.json")["train_rows"] == 8
    assert load(folder, "run.json")["settings"]["precision"] == "bf16"


def test_another_problem_type_than_in_training_is_refused(trained, tmp_path, capsys):
    argv = [
        "--do_predict",
        "--model_name_or_path",
        str(trained()),
        "--output_dir",
        str(tmp_path / "p"),
    ]
    argv += ["--problem_type", "multi_label_classification"]
    assert main.main([*argv, "--test_file", str(tmp_path / "test.csv")]) == 2
    assert "out was tuned for single_label" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--learning_rate", "1e20"),
        ("--test_file", "nowhere.csv"),
        ("--label_column_name", "category"),
        ("--model_name_or_path", "no-such-model"),
        ("--max_seq_length", "65"),
    ],
)
def test_a_failed_run_prints_one_line_and_keeps_earlier_results(run, trained, capsys, flags):
    folder = trained()
    before = hashes(folder)
    capsys.readouterr()
    run("--overwrite_output_dir", *flags, status=2)
    said = capsys.readouterr()
    one_line((2, said.err))
    assert said.out == ""
    assert {path: sha for path, sha in hashes(folder).items() if "unfinished" not in path} == before


def test_an_output_folder_that_is_a_file_is_refused(run, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    run(status=2)
    assert "error: --output_dir" in capsys.readouterr().err


def test_a_refused_run_leaves_no_folder(run, tmp_path):
    assert not run("--train_file", str(tmp_path / "none.csv"), status=2).exists()


def test_a_column_that_the_predictions_add_is_refused_before_training(run, tmp_path, capsys):
    path = write_csv(tmp_path / "t.csv", [("a", "0", "x")], ("text", "label", "predicted"))
    run("--test_file", path, status=2)
    assert "has a column 'predicted'" in capsys.readouterr().err


def test_an_untuned_model_does_not_predict(run, backbone, files, tmp_path, capsys):
    argv = ["--do_predict", "--model_name_or_path", backbone, *files[4:]]
    assert main.main([*argv, "--output_dir", str(tmp_path / "out")]) == 2
    assert "is not tuned yet" in capsys.readouterr().err


def test_a_prefix_of_the_wrong_shape_is_refused(trained, tmp_path, capsys):
    folder = trained("--prefix")
    config = load(folder, "adapter_config.json")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 4}))
    argv = ["--do_predict", "--model_name_or_path", str(folder)]
    argv += ["--test_file", str(tmp_path / "test.csv"), "--output_dir", str(tmp_path / "p")]
    assert main.main(argv) == 2
    assert "prompt_embeddings does not fit" in capsys.readouterr().err


def test_user_errors_are_one_line_in_a_shell(backbone, tmp_path):
    """Exit status 2, one error line and no traceback, also in a folder with blanks."""
    out = tmp_path / "my ü folder"
    command = [sys.executable, str(Path(main.__file__)), "--output_dir", str(out), "--do_evil"]
    command += ["--model_name_or_path", backbone]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_neither_a_closed_pipe_nor_the_locale_changes_the_results(
    trained, backbone, files, tmp_path
):
    expected = (trained() / "predictions.csv").read_bytes()
    command = [sys.executable, main.__file__, "--do_train", "--do_eval", "--do_predict", *files]
    command += ["--model_name_or_path", backbone, "--output_dir", str(tmp_path / "o")]
    command += ["--num_train_epochs", "2", "--per_device_train_batch_size", "4"]
    command += ["--precision", "fp32", "--max_seq_length", "16"]
    command += ["--hidden_dropout_prob", "0", "--rdrop_alpha", "0"]
    command += ["--load_best_model_at_end"]
    shell = f"{shlex.join(command)} | true; exit ${{PIPESTATUS[0]}}"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "predictions.csv").read_bytes() == expected
