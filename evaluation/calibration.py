"""Calibration: confidence that matches accuracy, by a temperature and a bias for each label.

Guo et al. 2017, https://arxiv.org/abs/1706.04599; the biases are those of Alexandari et al. 2020,
https://arxiv.org/abs/1901.06852. K members of an ensemble, N rows, C classes.
"""

import logging
from collections.abc import Callable
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
    """Return the validation rows that choose the temperature, bool [N]: with an unseen text."""
    every = np.ones(len(data.eval), dtype=bool)
    if data.training_keys is None:
        return every
    unseen = ~seen_texts(data.training_keys, data.eval.keys)
    return unseen if unseen.sum() >= ENOUGH_ROWS else every


def fit(
    change: Callable[[torch.Tensor], torch.Tensor],
    label_ids: np.ndarray,
    size: int,
    spread: float,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> np.ndarray:
    """Return the numbers, float64 [size], for which `change` makes logits of the lowest log loss.

    All in double precision, to the last digits: a loss is flat around its minimum, where rounding
    would decide.

    change: from numbers to logits, float64 [K, N, C], of the members of an ensemble, whose
    probabilities are averaged; K is 1 for a single model. label_ids: as in `Counts.add`. spread:
    standard deviation of a normal prior that keeps the numbers near 0 if there are only a few rows.
    limits: of every number.
    """
    multi_label, labels = label_ids.ndim == 2, torch.from_numpy(label_ids)
    criterion = binary_cross_entropy_with_logits if multi_label else cross_entropy
    labels = labels.double() if multi_label else labels.long()

    def loss(numbers: np.ndarray) -> tuple[float, np.ndarray]:
        numbers = torch.tensor(numbers, requires_grad=True)
        total = criterion(average(change(numbers), multi_label), labels, reduction="sum")
        total = total + (numbers**2).sum() / (2 * spread**2)
        total.backward()
        return total.item(), numbers.grad.numpy()

    options = {"jac": True, "bounds": [limits] * size, "options": {"ftol": 0, "gtol": 1e-9}}
    return minimize(loss, np.zeros(size), method="L-BFGS-B", **options).x


def fit_temperature(logits: torch.Tensor, label_ids: np.ndarray, lowest: float) -> float:
    """Return the temperature, from `lowest` on, whose log loss of `logits` / temperature is lowest.

    logits: float32 [K, N, C]. label_ids: see `fit`; its number is the temperature's logarithm.
    """
    logits, limits = logits.double(), (np.log(lowest), np.log(HIGHEST))
    return float(np.exp(fit(lambda log: logits / log.exp(), label_ids, 1, 1.0, limits)[0]))


def fit_biases(logits: torch.Tensor, label_ids: np.ndarray) -> torch.Tensor:
    """Return the biases, float32 [C], whose log loss of `logits` + biases is lowest; see `fit`."""
    logits = logits.double()
    found = fit(lambda biases: logits + biases, label_ids, logits.shape[2], SPREAD)
    return torch.from_numpy(found).float()


def figures(logits: torch.Tensor, label_ids: np.ndarray) -> dict[str, float]:
    """Return the log loss and the calibration error (ECE) of logits, [K, N, C]."""
    counts = Counts(label_ids.ndim == 2)
    counts.add(Predictions.of(average(logits, counts.multi_label), counts.multi_label), label_ids)
    return {"loss": counts.metrics()["loss"], "ece": counts.more_metrics()["ece"]}


def calibrate(logits: torch.Tensor, data: Data) -> tuple[Calibration, dict]:
    """Fit the calibration to the validation file; also returns its figures, for all_results.json.

    logits: float32 [K, N, C], of the validation file.
    """
    rows, label_ids = calibration_rows(data), data.eval.label_ids
    unseen_only = rows.sum() < len(rows)
    # seen texts are easy: the confidence in them must not become the confidence in new ones
    is_mixed = not unseen_only and data.training_keys is not None and data.seen_share > 0
    lowest = 1.0 if is_mixed else LOWEST
    temperature = fit_temperature(logits[:, rows], label_ids[rows], lowest)
    if is_mixed:
        biases = torch.zeros(logits.shape[2])
    else:  # all rows choose them, since they also change the labels of seen texts
        biases = fit_biases(logits / temperature, label_ids)
    calibration = Calibration(temperature, biases)
    before, after = (
        figures(one[:, rows], label_ids[rows]) for one in (logits, calibration(logits))
    )
    logger.info(
        "calibrated on %d validation rows: temperature %.2f, log loss %.3f -> %.3f, calibration "
        "error %.3f -> %.3f",
        *(rows.sum(), temperature, before["loss"], after["loss"], before["ece"], after["ece"]),
    )
    return calibration, {
        "temperature": temperature,
        "calibration_biases": biases.tolist(),
        "calibration_rows": int(rows.sum()),
        "calibration_unseen_only": bool(unseen_only),
        **{f"calibration_{name}_before": value for name, value in before.items()},
        **{f"calibration_{name}_after": value for name, value in after.items()},
    }
