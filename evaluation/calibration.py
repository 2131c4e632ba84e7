"""Calibration: confidence that matches accuracy, by a temperature and a bias for each label.

Guo et al. 2017, https://arxiv.org/abs/1706.04599; the biases are those of Alexandari et al. 2020,
https://arxiv.org/abs/1901.06852. K members of an ensemble, N rows, C classes.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from dataset import Data, seen_texts
from evaluation.metrics import Counts
from model.predictions import Predictions, average

logger = logging.getLogger(__name__)

ENOUGH_ROWS = 20  # unseen validation rows; with fewer, all rows are used
LOWEST, HIGHEST = 0.1, 10.0  # temperature
SPREAD = 0.25  # standard deviation of the biases' prior; chosen on validation files, see the log


@dataclass(frozen=True)
class Calibration:
    """What turns a model's logits into calibrated ones."""

    temperature: float = 1.0
    biases: torch.Tensor | float = 0.0  # float32 [C]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrate logits, [..., C]."""
        return logits / self.temperature + self.biases


def calibration_rows(data: Data) -> np.ndarray:
    """Return which validation rows to calibrate on, bool [N]: those with an unseen text."""
    every = np.ones(len(data.eval), dtype=bool)
    if data.training_keys is None:
        return every
    unseen = ~seen_texts(data.training_keys, data.eval.keys)
    return unseen if unseen.sum() >= ENOUGH_ROWS else every


def fit(logits: torch.Tensor, label_ids: np.ndarray, only_lower: bool) -> Calibration:
    """Return the calibration that minimises the log loss.

    Normal priors keep it near none if there are only a few rows: with a standard deviation of 1 for
    the logarithm of the temperature, and of `SPREAD` for the biases.

    logits: float32 [K, N, C], of the members of an ensemble, whose probabilities are averaged; K is
    1 for a single model. label_ids: as in `Counts.add`. only_lower: allow no change that can raise
    the confidence: a temperature of at least 1, and no biases.
    """
    multi_label, classes = label_ids.ndim == 2, logits.shape[2]
    labels, logits = torch.from_numpy(label_ids), logits.double()
    criterion = binary_cross_entropy_with_logits if multi_label else cross_entropy
    labels = labels.double() if multi_label else labels.long()

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.tensor(parameters, requires_grad=True)
        found = average(logits / x[0].exp() + x[1:], multi_label)
        total = criterion(found, labels, reduction="sum")
        total = total + x[0] ** 2 / 2 + (x[1:] ** 2).sum() / (2 * SPREAD**2)
        total.backward()
        return total.item(), x.grad.numpy()

    limits = [(np.log(1.0 if only_lower else LOWEST), np.log(HIGHEST))]
    limits += [(0, 0) if only_lower else (None, None)] * classes
    best = minimize(loss, np.zeros(1 + classes), jac=True, bounds=limits, method="L-BFGS-B").x
    return Calibration(float(np.exp(best[0])), torch.from_numpy(best[1:]).float())


def figures(logits: torch.Tensor, label_ids: np.ndarray) -> dict[str, float]:
    """Return the log loss and the calibration error (ECE) of logits, [K, N, C]."""
    counts = Counts(label_ids.ndim == 2)
    counts.add(Predictions.of(average(logits, counts.multi_label), counts.multi_label), label_ids)
    return {"loss": counts.metrics()["loss"], "ece": counts.more_metrics()["ece"]}


def calibrate(logits: torch.Tensor, data: Data) -> tuple[Calibration, dict]:
    """Fit the calibration to the validation file; also returns its figures, for all_results.json.

    logits: float32 [K, N, C], of the validation file.
    """
    rows = calibration_rows(data)
    unseen_only = rows.sum() < len(rows)
    # seen texts are easy: the confidence in them must not become the confidence in new ones
    is_mixed = not unseen_only and data.training_keys is not None and data.seen_share > 0
    logits, label_ids = logits[:, rows], data.eval.label_ids[rows]
    calibration = fit(logits, label_ids, only_lower=is_mixed)
    before, after = figures(logits, label_ids), figures(calibration(logits), label_ids)
    logger.info(
        "calibrated on %d validation rows: temperature %.2f, log loss %.3f -> %.3f, calibration "
        "error %.3f -> %.3f",
        *(rows.sum(), calibration.temperature, before["loss"], after["loss"]),
        *(before["ece"], after["ece"]),
    )
    return calibration, {
        "temperature": calibration.temperature,
        "calibration_biases": [round(bias, 6) for bias in calibration.biases.tolist()],
        "calibration_rows": int(rows.sum()),
        "calibration_unseen_only": bool(unseen_only),
        **{f"calibration_{name}_before": value for name, value in before.items()},
        **{f"calibration_{name}_after": value for name, value in after.items()},
    }
