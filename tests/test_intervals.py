"""What chance does to a figure: the calibration error, and intervals of accuracies."""

import numpy as np
import pytest
import torch

from evaluation.metrics import Bootstrap, Score
from model.predictions import Predictions


def scored(confidence: np.ndarray, right: np.ndarray, keys: list[str], seen=None) -> dict:
    """Score rows of two classes in chunks, with these confidences."""
    logits = torch.from_numpy(np.log(np.stack([confidence, 1 - confidence], axis=1))).float()
    score, labels = Score(False), 1 - right.astype(int)
    for part in np.array_split(np.arange(len(keys)), 3):
        names = [keys[row] for row in part]
        flags = None if seen is None else seen[part]
        score.add(Predictions.from_logits(logits[part], False), labels[part], names, names, flags)
    return score.results("test")


def ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """The calibration error of predictions, each of another text."""
    place = (confidence * 10).astype(int)
    gaps = (np.bincount(place, right, 10) - np.bincount(place, confidence, 10)).round(9)
    return float(np.abs(gaps).sum() / len(right))


@pytest.mark.parametrize(("texts", "rows"), [(100, 10), (2000, 1)])
def test_chance_makes_the_calibration_error_that_simulated_files_have(texts, rows):
    """Rows of one text are right or wrong together, so ten times the rows are no more evidence."""
    random = np.random.default_rng(0)
    confidence = random.uniform(0.5, 1, texts)
    keys = [f"text {number}" for number in range(texts)]
    files = [ece(confidence, random.random(texts) < confidence) for _ in range(2000)]
    right = random.random(texts) < confidence
    found = scored(np.tile(confidence, rows), np.tile(right, rows), keys * rows)
    assert found["test_ece_by_chance"] == pytest.approx(np.mean(files), rel=0.06)
    assert found["test_ece_by_chance_bound"] == pytest.approx(np.quantile(files, 0.95), rel=0.06)
    assert np.mean(np.array(files) < found["test_ece_by_chance_bound"]) == pytest.approx(0.95, 0.02)


def test_seen_and_unseen_texts_have_their_own_calibration_error():
    confidence, right = np.tile([0.95, 0.75], 100), np.tile([1, 0, 1, 1], 50).astype(bool)
    seen = np.tile([True, False], 100)
    keys = [f"text {number}" for number in range(200)]
    found = scored(confidence, right, keys, seen)
    assert found["test_ece_seen"] == pytest.approx(0.05)
    assert found["test_ece_unseen"] == pytest.approx(0.25)
    assert found["test_ece"] == pytest.approx(0.15)
    assert found["test_ece_unseen_by_chance_bound"] > found["test_ece_by_chance_bound"] > 0
    nothing = scored(confidence, right, keys, np.ones(200, dtype=bool))
    assert nothing["test_ece_unseen"] is nothing["test_ece_unseen_by_chance"] is None


def test_labels_of_a_row_are_calibrated_one_by_one():
    """Each label has 0.6 and is right in 6 of 10 rows: calibrated, though few rows are right."""
    random = np.random.default_rng(0)
    labels = np.stack([random.permutation(np.arange(1000) < 600) for _ in range(2)], axis=1)
    logits = torch.full((1000, 2), float(np.log(0.6 / 0.4)))
    keys = [f"text {number}" for number in range(1000)]
    score = Score(True).add(
        Predictions.from_logits(logits, True), labels.astype("f4"), keys, keys, None
    )
    found = score.results("test")
    assert found["test_ece"] < 1e-6 < found["test_ece_by_chance"] < 0.03
    reliability = score.details()["reliability"]
    assert (sum(reliability["rows"]), sum(reliability["hits"])) == (2000, 1200)


def interval(keys: list[str], right: np.ndarray, size: int = 10_000) -> np.ndarray:
    bootstrap = Bootstrap()
    for start in range(0, len(keys), size):
        bootstrap.add(keys[start : start + size], right[start : start + size])
    return np.array(bootstrap.interval())


def test_intervals_use_distinct_texts_and_do_not_depend_on_chunks():
    right = np.random.default_rng(0).random(400) < 0.7
    keys = [f"text {number}" for number in range(400)]
    once = interval(keys, right)
    np.testing.assert_allclose(once, interval(keys, right, 7))
    spread = 1.96 * (right.mean() * (1 - right.mean()) / 400) ** 0.5
    np.testing.assert_allclose(once, [right.mean() - spread, right.mean() + spread], atol=0.01)
    np.testing.assert_allclose(once, interval(keys * 9, np.tile(right, 9)))  # no new evidence


def test_intervals_of_few_texts_contain_the_true_accuracy():
    """Of 15 texts with 0.9, and of 10 that are all right, each with three rows."""
    keys = [f"text {number}" for number in range(15)]
    random, covered = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = interval(keys, random.random(15) < 0.9)
        covered += low <= 0.9 <= high
    assert covered / 200 >= 0.92
    low, high = interval(keys[:10] * 3, np.ones(30, dtype=bool))
    assert 0.65 < low < 0.75 and high == 1  # Wilson's for 10 of 10 is 0.72
    low, high = interval(keys[:10] * 3, np.zeros(30, dtype=bool))
    assert low == 0 and 0.25 < high < 0.35
