"""The baselines: figures checked by hand, and the same files as a tuned run."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from conftest import REAL_DATA, ROWS, write_csv
from model.folders import locate
from runtime.machine import pick_machine
from script import baseline
from test_main import RESULTS, load

METHODS = ("majority", "lookup", "tfidf", "tfidf-svm", "embeddings", "combined")


@pytest.fixture
def run_baseline(files, tmp_path, backbone):
    """Call a baseline on the small files; returns the output folder."""

    def call(method: str, *flags: str):
        folder = tmp_path / method
        if method in ("embeddings", "combined"):
            flags = ("--model_name_or_path", backbone, *flags)
        assert baseline.main([method, *files, "--output_dir", str(folder), *flags]) == 0
        return folder

    return call


@pytest.mark.parametrize("method", METHODS)
def test_a_baseline_writes_the_same_files_and_figures_as_a_tuned_run(
    run, run_baseline, backbone, method
):
    tuned, folder = run(), run_baseline(method)
    training = {"metrics.jsonl", "README.md"}
    assert {path.name for path in folder.iterdir()} == RESULTS - training
    one, other = (load(each, "all_results.json") for each in (tuned, folder))
    scores = {name for name in one if name.startswith(("eval_", "test_"))}
    assert scores == {name for name in other if name.startswith(("eval_", "test_"))}
    header = [(each / "predictions.csv").read_text().split("\n")[0] for each in (tuned, folder)]
    assert header[0] == header[1]
    assert load(tuned, "evaluation.json").keys() == load(folder, "evaluation.json").keys()
    features = ("embeddings", "combined")
    expected = backbone if method in features else method
    assert load(folder, "run.json")["backbone"] == expected


def test_a_text_of_the_validation_file_alone_is_seen_in_the_test_file(
    run_baseline, tmp_path, caplog
):
    """It chose epoch, calibration and weights. In the validation file itself it is unseen."""
    caplog.set_level("INFO")
    rows = [("SONG", "1"), ("fish", "0"), ("drum", "1"), ("three", "2")]
    folder = run_baseline("majority", "--test_file", write_csv(tmp_path / "t.csv", rows))
    results = load(folder, "all_results.json")
    assert (results["eval_seen_share"], results["test_seen_share"]) == (0.5, 0.5)
    assert results["test_accuracy_unseen"] == 0  # "drum" and "three", without "song"
    assert "25.0 % of them with a text from the training file, 25.0 % of them with" in caplog.text
    assert "training or validation file" in (folder / "report.html").read_text()


def test_a_look_up_repeats_seen_labels_and_else_predicts_the_most_frequent(run_baseline, tmp_path):
    """It finds "fish" regardless of case; "drum" on its own is unseen."""
    test = write_csv(
        tmp_path / "t.csv", [("FISH ", "0"), ("goal of  the team", "2"), ("drum", "1")]
    )
    found = pd.read_csv(run_baseline("lookup", "--test_file", test) / "predictions.csv")
    assert found["predicted"].tolist() == [0, 2, 0]  # labels 0 and 1: four of eleven rows each
    assert found["confidence"][0] > 0.99
    shares = [4 / 11, 4 / 11, 3 / 11]
    np.testing.assert_allclose(found.iloc[2, 4:].astype(float), shares, atol=1e-5)
    most = pd.read_csv(run_baseline("majority", "--test_file", test) / "predictions.csv")
    np.testing.assert_allclose(most.iloc[:, 4:].astype(float), [shares] * 3, atol=1e-5)


def test_the_linear_model_learns_and_chooses_its_strength_by_validation(run_baseline, tmp_path):
    path = write_csv(tmp_path / "same.csv", ROWS)
    for method, strengths in (
        ("tfidf", baseline.STRENGTHS), ("tfidf-svm", baseline.SVM_STRENGTHS)
    ):  # fmt: skip
        folder = run_baseline(method, "--validation_file", path, "--test_file", path)
        assert load(folder, "all_results.json")["test_accuracy"] == 1.0
        assert load(folder, "all_results.json")["C"] in strengths[1:-1]


@pytest.mark.parametrize("method", METHODS)
def test_baselines_predict_several_labels_per_row(run_baseline, tmp_path, method):
    rows = [(text, f"{label}|{(int(label) + 1) % 3}") for text, label in ROWS]
    path = write_csv(tmp_path / "several.csv", rows)
    flags = [word for name in ("train", "validation", "test") for word in (f"--{name}_file", path)]
    flags += ["--problem_type", "multi_label_classification"]
    results = load(run_baseline(method, *flags), "all_results.json")
    # each label applies to most rows, so majority predicts all three, which no row has
    if method == "majority":
        assert results["test_accuracy"] == 0.0
    else:
        assert results["test_accuracy"] >= 0.9  # the embeddings are those of a random backbone


def test_a_baseline_draws_the_same_rows_as_a_tuned_run(run, run_baseline, tmp_path):
    """With seed 4 these five rows are drawn; none has label 0, which then has probability 0."""
    drawn = write_csv(tmp_path / "drawn.csv", [ROWS[row] for row in (5, 7, 8, 9, 10)])
    flags = ["--max_train_samples", "5", "--seed", "4", "--test_file", drawn]
    folders = [run(*flags), *(run_baseline(method, *flags) for method in METHODS)]
    for folder in folders:
        results = load(folder, "all_results.json")
        assert (results["train_rows"], results["test_seen_share"]) == (5, 1.0)
        settings = load(folder, "run.json")["settings"]
        assert (settings["max_train_samples"], settings["seed"]) == (5, 4)
    found = pd.read_csv(folder / "predictions.csv")  # of the last, a linear model
    assert found.iloc[:, 4].max() < found.iloc[:, 5:].min(axis=None)
    np.testing.assert_allclose(found.iloc[:, 4:].sum(axis=1), 1, atol=1e-5)


def test_user_errors_are_one_line(capsys, files, tmp_path):
    assert baseline.main(["nothing"]) == 2
    assert baseline.main(["tfidf", "--seed", "1"]) == 2  # without --max_train_samples
    assert "--seed has no effect on a baseline" in capsys.readouterr().err
    sampled = ["tfidf", *files, "--max_train_samples", "2", "--seed", "1"]
    assert baseline.main([*sampled, "--output_dir", str(tmp_path / "few")]) == 2
    assert "train.csv: the 2 rows drawn have one label: raise" in capsys.readouterr().err
    assert baseline.main(["tfidf", "--learning_rate=1"]) == 2
    assert "--learning_rate has no effect on a baseline" in capsys.readouterr().err
    argv = ["majority", *files, "--output_dir", str(tmp_path / "out"), "--train_file", "absent.csv"]
    assert baseline.main(argv) == 2
    assert capsys.readouterr().err.count("error: absent.csv") == 1
    assert baseline.main(["tfidf", "--help"]) == 0
    assert "words and pairs of words" in capsys.readouterr().out
    path = write_csv(tmp_path / "signs.csv", [("!", "0"), ("?", "1"), ("...", "2")])
    argv[0], argv[-1] = "tfidf", path
    assert baseline.main(argv) == 2
    assert "no text in the training file contains a word" in capsys.readouterr().err


def test_embeddings_are_the_mean_of_the_last_states(backbone):
    """Compared with transformers; texts of several lengths share a batch."""
    texts = ["the big cat", "fish", "a new song of the band", "fish"]
    embed = baseline.embedder(locate(backbone), pick_machine("fp32"))
    tokenizer, model = AutoTokenizer.from_pretrained(backbone), BertModel.from_pretrained(backbone)
    for text, found in zip(texts, embed(texts), strict=True):
        with torch.no_grad():
            states = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(states.mean(dim=0), dim=0)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real data is not in ../shared/data")
def test_a_look_up_scores_as_measured_on_the_published_split(tmp_path):
    splits = REAL_DATA / "seed_splits"
    argv = ["lookup", "--output_dir", str(tmp_path / "out")]
    for name, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        argv += [f"--{name}_file", str(splits / f"{file}_simple.csv")]
    assert baseline.main(argv) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["test_accuracy"] == pytest.approx(0.9298, abs=0.0005)
    assert results["test_seen_share"] == pytest.approx(0.869, abs=0.001)
