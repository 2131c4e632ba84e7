"""Calibration: confidence that matches accuracy, by one temperature for all logits.

Guo et al. 2017, https://arxiv.org/abs/1706.04599. K members of an ensemble, N rows, C classes.
"""

import logging

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from dataset import Data, seen_texts
from evaluation.metrics import Counts
from model.predictions import Predictions, average

logger = logging.getLogger(__name__)

ENOUGH_ROWS = 20  # unseen validation rows; with fewer, all rows are used
LOWEST, HIGHEST = 0.1, 10.0  # temperature


def calibration_rows(data: Data) -> np.ndarray:
    """Return which validation rows to calibrate on, bool [N]: those with an unseen text."""
    every = np.ones(len(data.eval), dtype=bool)
    if data.training_keys is None:
        return every
    unseen = ~seen_texts(data.training_keys, data.eval.keys)
    return unseen if unseen.sum() >= ENOUGH_ROWS else every


def fit_temperature(logits: torch.Tensor, label_ids: np.ndarray, lowest: float) -> float:
    """Return the temperature that minimises the log loss of `logits` / temperature.

    A weak prior, normal for the logarithm with a standard deviation of 1, keeps it near 1 if there
    are only a few rows.

    logits: float32 [K, N, C], of the members of an ensemble, whose probabilities are averaged; K is
    1 for a single model. label_ids: as in `Counts.add`. lowest: limit of the temperature.
    """
    limits = np.log([lowest, HIGHEST])

    def loss(log_temperature: float) -> float:
        each = figures(logits / float(np.exp(log_temperature)), label_ids)["loss"]
        return len(label_ids) * each + log_temperature**2 / 2

    return float(np.exp(minimize_scalar(loss, bounds=limits, method="bounded").x))


def figures(logits: torch.Tensor, label_ids: np.ndarray) -> dict[str, float]:
    """Return the log loss and the calibration error (ECE) of logits, [K, N, C]."""
    counts = Counts(label_ids.ndim == 2)
    counts.add(Predictions.of(average(logits, counts.multi_label), counts.multi_label), label_ids)
    return {"loss": counts.metrics()["loss"], "ece": counts.more_metrics()["ece"]}


def calibrate(logits: torch.Tensor, data: Data) -> dict:
    """Fit the temperature to the validation file; returns it and its effect, for all_results.json.

    logits: float32 [K, N, C], of the validation file.
    """
    rows = calibration_rows(data)
    unseen_only = rows.sum() < len(rows)
    # seen texts are easy: the confidence in them must not become the confidence in new ones
    is_mixed = not unseen_only and data.training_keys is not None and data.seen_share > 0
    logits, label_ids = logits[:, rows], data.eval.label_ids[rows]
    temperature = fit_temperature(logits, label_ids, 1.0 if is_mixed else LOWEST)
    before, after = figures(logits, label_ids), figures(logits / temperature, label_ids)
    logger.info(
        "calibrated on %d validation rows: temperature %.2f, log loss %.3f -> %.3f, calibration "
        "error %.3f -> %.3f",
        *(rows.sum(), temperature, before["loss"], after["loss"], before["ece"], after["ece"]),
    )
    return {
        "temperature": temperature,
        "calibration_rows": int(rows.sum()),
        "calibration_unseen_only": bool(unseen_only),
        **{f"calibration_{name}_before": value for name, value in before.items()},
        **{f"calibration_{name}_after": value for name, value in after.items()},
    }
