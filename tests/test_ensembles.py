"""Ensembles of prefixes and of runs, and calibrated confidence."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import main
from conftest import ROWS, one_line, write_csv
from dataset import Data
from evaluation.calibration import Calibration, calibrate, figures
from evaluation.metrics import Tally
from evaluation.predictions import FILES
from model import load as load_model
from model.predictions import Predictions
from script import baseline, ensemble
from test_main import PROBE, RESULTS, load

# two whole batches, since each row of a step weighs the same; the gradient is not clipped
ALIKE = ("--max_train_samples", "8", "--max_grad_norm", "1e9", "--load_best_model_at_end", "False")


def probabilities(folder: Path, name: str = "predictions.csv") -> np.ndarray:
    return pd.read_csv(folder / name).filter(like="probability_").to_numpy(float)


def test_prefixes_trained_side_by_side_are_those_trained_alone(run):
    """The first has the seed, the start and the row order of a single prefix."""
    alone = run("--prefix", *ALIKE, name="alone")
    together = run("--prefix", "--num_prefixes", "2", *ALIKE, name="together")
    found, other, expected = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (together / "prefix-1", together / "prefix-2", alone)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-4)
        assert (other[name] - found[name]).abs().max() > 1e-3
    stored = [load(folder, "all_results.json")["stored_parameters"] for folder in (together, alone)]
    assert stored[0] == 2 * stored[1]


def test_an_ensemble_averages_its_prefixes_and_loads_everywhere(
    run, backbone, predict, tmp_path, capsys
):
    folder = run("--prefix", "--num_prefixes", "3", "--text_column_names", "text")
    assert {path.name for path in folder.iterdir()} == RESULTS | {f"prefix-{n}" for n in (1, 2, 3)}
    assert predict(folder)[0] == 0
    mean = probabilities(folder)
    np.testing.assert_allclose(probabilities(tmp_path / "predicted"), mean, atol=2e-6)
    members = [folder / f"prefix-{number}" for number in (1, 2, 3)]
    each = []
    for member in members:
        assert predict(member)[0] == 0
        each.append(probabilities(tmp_path / "predicted"))
    np.testing.assert_allclose(np.mean(each, axis=0), mean, atol=2e-6)
    assert predict(folder, "--prefix_paths", str(folder))[0] == 0
    np.testing.assert_allclose(probabilities(tmp_path / "predicted"), mean, atol=2e-6)
    text = pd.read_csv(folder / "predictions.csv")["text"][1]
    found = load_model(folder, "fp32")(text)[0]["probabilities"]
    np.testing.assert_allclose(list(found.values()), mean[1], atol=2e-6)
    frozen = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=3)
    peer = PeftModel.from_pretrained(frozen, str(folder), subfolder="prefix-2").eval()
    with torch.no_grad():
        logits = peer(**AutoTokenizer.from_pretrained(backbone)(text, return_tensors="pt")).logits
    np.testing.assert_allclose(logits.softmax(1)[0], each[1][1], atol=2e-6)
    shutil.copytree(folder, tmp_path / "part")
    for number, flags in ((3, ()), (1, ("--prefix_paths", str(tmp_path / "part")))):
        shutil.rmtree(tmp_path / "part" / f"prefix-{number}")
        assert f"part lacks prefix-{number}" in one_line(predict(tmp_path / "part", *flags))
        shutil.copytree(folder / f"prefix-{number}", tmp_path / "part" / f"prefix-{number}")
    assert 'subfolder="prefix-1"' in (folder / "README.md").read_text()
    argv = ["--do_train", "--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "no")]
    capsys.readouterr()
    status = main.main([*argv, "--train_file", str(tmp_path / "train.csv")])
    assert "cannot be tuned further together" in one_line((status, capsys.readouterr().err))


@pytest.mark.parametrize("flags", [("--prefix_depth", "input"), ("--prefix_projection",)])
def test_some_prefixes_can_only_be_trained_alone(capsys, flags):
    with pytest.raises(SystemExit):
        main.main(["--do_train", "--output_dir", "no", "--prefix", "--num_prefixes", "2", *flags])
    assert "several prefixes need --prefix_depth all" in capsys.readouterr().err


def audited(label_ids: np.ndarray, seen: int | None = None) -> Data:
    """Return data whose validation file has these labels; its first rows have a seen text."""
    count = len(label_ids)
    rows = {"label_ids": label_ids, "keys": [f"{row}" for row in range(count)]}
    split = type("Split", (), rows | {"__len__": lambda self: count})()
    keys = None if seen is None else frozenset(split.keys[:seen])
    return Data([], None, split, None, keys)


def draw(logits: torch.Tensor, random: np.random.Generator, multi_label: bool = False):
    """Draw labels from the probabilities of logits [N, C]."""
    if multi_label:
        return (random.random(logits.shape) < logits.sigmoid().numpy()).astype(np.float32)
    return np.array([random.choice(len(p), p=p) for p in logits.double().softmax(1).numpy()])


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("members", [1, 3])
def test_calibration_finds_the_temperature_and_biases(members, multi_label):
    """Labels are drawn from the probabilities, then the logits are made too large and shifted."""
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(0, 2, (4000, 3))).float()
    label_ids = draw(logits, random, multi_label)
    biases = torch.tensor([0.5, -0.4, -0.1])
    wrong = (3 * (logits - biases)).expand(members, -1, -1)
    calibration, found = calibrate(wrong, audited(label_ids))
    assert found["temperature"] == pytest.approx(3, rel=0.1)
    torch.testing.assert_close(calibration.biases, biases, rtol=0, atol=0.1)
    assert found["calibration_biases"] == calibration.biases.tolist()
    assert found["calibration_ece_before"] > 0.1 and found["calibration_ece_after"] < 0.04
    assert found["calibration_loss_after"] < found["calibration_loss_before"]
    assert found["calibration_loss_after"] == figures(calibration(wrong), label_ids)["loss"]
    rounded = wrong * (1 + 1e-7 * torch.from_numpy(random.normal(size=(4000, 3))))
    again, _ = calibrate(rounded.float(), audited(label_ids))
    assert again.temperature == pytest.approx(calibration.temperature, abs=1e-6)
    torch.testing.assert_close(again.biases, calibration.biases, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [8, 20, 50, 263])
def test_few_rows_do_not_spoil_a_calibrated_model(rows):
    """On many other rows, the mean log loss of 20 draws rises by 0.02 at most, the ECE by 0.03."""
    random = np.random.default_rng(0)
    others = torch.from_numpy(random.normal(0, 2, (4000, 6))).float()
    labels = draw(others, random)
    before, after = figures(others[None], labels), []
    for _ in range(20):
        logits = torch.from_numpy(random.normal(0, 2, (rows, 6))).float()
        calibration, found = calibrate(logits[None], audited(draw(logits, random)))
        assert bool(found) == (rows >= 20)
        after.append(figures(calibration(others)[None], labels))
    assert np.mean([one["loss"] for one in after]) < before["loss"] + 0.02
    assert np.mean([one["ece"] for one in after]) < before["ece"] + 0.03


def test_calibration_uses_the_rows_that_are_like_those_to_come():
    """All rows if at least half have a seen text, else unseen ones; none if they are too few.

    The confidence is 0.73. Seen texts are all right, unseen ones half of the time.
    """
    row = np.arange(100)
    label_ids = row % 2
    for seen, used in ((50, 100), (49, 51), (100, 100), (0, 100)):
        right = np.where((row < seen) | (row % 4 < 2), label_ids, 1 - label_ids)
        logits = torch.nn.functional.one_hot(torch.from_numpy(right), 2).float()[None]
        calibration, found = calibrate(logits, audited(label_ids, seen))
        assert found["calibration_rows"] == used
        assert found["calibration_unseen_only"] == (used == 51)
        assert (calibration.temperature > 1) == (seen < 50)
    few = np.arange(30) % 2
    logits = torch.zeros(1, 30, 2)
    assert calibrate(logits, audited(few, 11)) == (Calibration(), {})
    assert calibrate(logits, audited(few, 10))[1]["calibration_rows"] == 20


@pytest.mark.parametrize("flags", [(), ("--prefix",), PROBE])
def test_stored_models_are_calibrated(run, predict, tmp_path, flags):
    """The reloaded model gives the same probabilities, on both files."""
    val = write_csv(tmp_path / "more.csv", [*ROWS, *ROWS])
    folder = run("--validation_file", val, *flags)
    assert load(folder, "all_results.json")["temperature"] != pytest.approx(1, abs=1e-3)
    assert predict(folder, "--test_file", val)[0] == 0
    np.testing.assert_allclose(
        probabilities(tmp_path / "predicted"),
        probabilities(folder, "validation_predictions.csv"),
        atol=2e-6,
    )


def test_unsure_predictions_are_marked_on_request(trained, predict, tmp_path):
    folder = trained()
    table = pd.read_csv(folder / "predictions.csv")
    limit = float(table["confidence"].median())
    assert predict(folder, "--reject_below", str(limit))[0] == 0
    found = pd.read_csv(tmp_path / "predicted" / "predictions.csv")
    kept = table["confidence"] >= limit
    assert found["rejected"].tolist() == (~kept).tolist() and 0 < kept.sum() < len(kept)
    pd.testing.assert_frame_equal(found.drop(columns="rejected"), table)
    results = load(tmp_path / "predicted", "all_results.json")
    assert results["test_rejected_share"] == 1 - kept.mean()
    right = table["predicted"] == table["label"]
    assert results["test_accuracy_kept"] == right[kept].mean()


def test_coverage_is_what_sorting_by_confidence_gives():
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(0, 2, (3000, 4))).float()
    label_ids = random.integers(0, 4, 3000)
    found, tally = Predictions.from_logits(logits, False), Tally()
    for part in np.array_split(np.arange(3000), 7):
        tally.add(found.take(part), label_ids[part])
    points = tally.coverage()
    assert points[0][1:] == [1.0, tally.hits / 3000]
    for threshold, share, accuracy in points:
        kept = found.confidence >= threshold
        assert share == pytest.approx(kept.mean(), abs=1e-3)
        assert accuracy == pytest.approx((found.label == label_ids)[kept].mean(), abs=2e-3)


@pytest.fixture
def two_runs(run, files, backbone, tmp_path) -> list[str]:
    """A tuned run and a baseline on the same files."""
    files[3] = write_csv(tmp_path / "more.csv", [*ROWS, *ROWS])  # enough to calibrate
    flags = ("--validation_file", files[3], "--num_train_epochs", "8")
    tuned, tfidf = run(*flags, name="tuned"), tmp_path / "tfidf"
    assert baseline.main(["tfidf", *files, "--output_dir", str(tfidf)]) == 0
    return [str(tuned), str(tfidf)]


def test_an_ensemble_of_runs_is_their_weighted_average(two_runs, tmp_path, capsys):
    folder = tmp_path / "both"
    assert ensemble.main([*two_runs, "--output_dir", str(folder)]) == 0
    training = {"metrics.jsonl", "README.md"}
    assert {path.name for path in folder.iterdir()} == RESULTS - training
    record, results = load(folder, "run.json"), load(folder, "all_results.json")
    weights = [record["settings"]["weights"].get(name, 0) for name in two_runs]
    assert sum(weights) == pytest.approx(1)
    for name in FILES.values():
        each = np.stack([probabilities(Path(one), name) for one in two_runs])
        power = np.tensordot(weights, each, axes=1) ** (1 / results["temperature"])
        power *= np.exp(results["calibration_biases"])
        expected = power / power.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probabilities(folder, name), expected, atol=1e-4)
    assert results["test_seen_share"] == 0.5
    assert ensemble.main([*two_runs, "--output_dir", str(folder)]) == 2  # must not be replaced
    overwrite = "--overwrite_output_dir"
    assert ensemble.main([*two_runs, "--output_dir", str(folder), overwrite]) == 0
    for place in (two_runs[0], str(tmp_path)):  # nor may a run of its own
        assert ensemble.main([*two_runs, "--output_dir", place, overwrite]) == 2
        assert f"contains the run {two_runs[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("multi_label", [False, True])
def test_selection_takes_what_helps_and_nothing_else(multi_label):
    """Two runs with independent errors are both taken, a random one is not."""
    random = np.random.default_rng(0)
    label_ids = random.integers(0, 2, 2000)
    good = [np.where(random.random(2000) < 0.8, label_ids, 1 - label_ids) for _ in range(2)]
    sure = [np.where(one == 1, 0.8, 0.2) for one in good]
    columns = [*sure, random.uniform(0.01, 0.99, 2000)]
    probability = np.stack([np.stack([1 - one, one], axis=1) for one in columns])
    if multi_label:
        label_ids = np.eye(2, dtype=np.float32)[label_ids]
    one, other, useless = ensemble.select(probability, label_ids)
    assert abs(one - other) <= 2 and one > 0 and useless == 0


def test_runs_that_do_not_belong_together_are_refused(two_runs, run, files, tmp_path, capsys):
    def refused(*folders: str) -> str:
        capsys.readouterr()
        status = ensemble.main([*folders, "--output_dir", str(tmp_path / "no")])
        return one_line((status, capsys.readouterr().err))

    other = write_csv(tmp_path / "other.csv", ROWS[:5])
    elsewhere = str(run("--test_file", other, name="elsewhere"))
    assert "different data.test" in refused(*two_runs, elsewhere)
    assert "contains no finished run" in refused(two_runs[0], str(tmp_path))
    Path(two_runs[1], "validation_predictions.csv").unlink()
    assert "lacks validation_predictions.csv" in refused(*two_runs)
    path = Path(two_runs[0], "predictions.csv")
    head, *lines = path.read_text().splitlines()
    for changed in (lines[:-1], lines[::-1]):
        path.write_text("\n".join([head, *changed]) + "\n")
        assert "has other rows than the file it predicts" in refused(two_runs[0])
    write_csv(Path(files[5]), ROWS[:4])
    assert "has changed since" in refused(two_runs[0])
    assert ensemble.main([*two_runs, "--seed", "1", "--output_dir", "no"]) == 2
    assert "--seed has no effect on an ensemble" in capsys.readouterr().err
