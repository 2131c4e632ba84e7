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
from evaluation.metrics import Tally, calibration_error
from model.predictions import Predictions, average
from model.schedule import coming_texts

logger = logging.getLogger(__name__)

ENOUGH_ROWS = 20  # with fewer validation rows, the logits stay as they are
# Priors around no change, so that few rows change little: Student's t with 3 degrees of freedom,
# whose heavy tails give way to clear evidence. Scales of the temperature's logarithm and of the
# biases, chosen on validation files (results/LOG.md).
SCALES = (0.2, 0.5)


@dataclass(frozen=True)
class Calibration:
    """What turns a model's logits into calibrated ones."""

    temperature: float = 1.0
    biases: torch.Tensor | float = 0.0  # float32 [C]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrate logits, [..., C]."""
        return logits / self.temperature + self.biases


def calibration_rows(data: Data) -> np.ndarray:
    """Return the validation rows that are like the rows to come, bool [N].

    By the rule of the schedule: if at least half of them have a seen text, all rows; else those
    with an unseen one, since new texts are expected, and seen ones are easy.
    """
    if data.training_keys is None or coming_texts(data.seen_share) == "repeated":
        return np.ones(len(data.eval), dtype=bool)
    return ~seen_texts(data.training_keys, data.eval.keys)


def fit(logits: torch.Tensor, label_ids: np.ndarray) -> Calibration:
    """Return the calibration with the lowest log loss of logits, given the priors, see `SCALES`.

    All in double precision, to the last digits: a loss is flat around its minimum, where rounding
    would decide.

    logits: float32 [K, N, C], of the members of an ensemble, whose probabilities are averaged; K is
    1 for a single model. label_ids: as in `Tally.add`.
    """
    multi_label, labels = label_ids.ndim == 2, torch.from_numpy(label_ids)
    criterion = binary_cross_entropy_with_logits if multi_label else cross_entropy
    labels, logits = labels.double() if multi_label else labels.long(), logits.double()
    classes = logits.shape[2]
    scales = torch.tensor([SCALES[0]] + [SCALES[1]] * classes)

    def loss(numbers: np.ndarray) -> tuple[float, np.ndarray]:
        numbers = torch.tensor(numbers, requires_grad=True)  # log temperature, then biases
        changed = Calibration(numbers[0].exp(), numbers[1:])(logits)
        total = criterion(average(changed, multi_label), labels, reduction="sum")
        total = total + 2 * torch.log1p((numbers / scales) ** 2 / 3).sum()
        total.backward()
        return total.item(), numbers.grad.numpy()

    options = {"jac": True, "options": {"ftol": 0, "gtol": 1e-9}}
    best = minimize(loss, np.zeros(1 + classes), method="L-BFGS-B", **options).x
    return Calibration(float(np.exp(best[0])), torch.from_numpy(best[1:]).float())


def figures(logits: torch.Tensor, label_ids: np.ndarray) -> dict[str, float]:
    """Return the log loss and the calibration error (ECE) of logits, [K, N, C]."""
    tally, multi_label = Tally(), label_ids.ndim == 2
    tally.add(Predictions.from_logits(average(logits, multi_label), multi_label), label_ids)
    return {"loss": tally.loss / tally.rows, "ece": calibration_error(tally.bins)}


def calibrate(logits: torch.Tensor, data: Data) -> tuple[Calibration, dict]:
    """Fit the calibration to the validation file; also returns its figures, for all_results.json.

    logits: float32 [K, N, C], of the validation file. With fewer than `ENOUGH_ROWS` rows nothing
    changes, and there are no figures.
    """
    rows, label_ids = calibration_rows(data), data.eval.label_ids
    if rows.sum() < ENOUGH_ROWS:
        message = "not calibrated: %d validation rows are like the rows to come, %d are needed"
        logger.info(message, rows.sum(), ENOUGH_ROWS)
        return Calibration(), {}
    logits, unseen_only, label_ids = logits[:, rows], not rows.all(), label_ids[rows]
    calibration = fit(logits, label_ids)
    before, after = figures(logits, label_ids), figures(calibration(logits), label_ids)
    logger.info(
        "calibrated on %d validation rows: temperature %.2f, log loss %.3f -> %.3f, calibration "
        "error %.3f -> %.3f",
        *(len(label_ids), calibration.temperature),
        *(before["loss"], after["loss"], before["ece"], after["ece"]),
    )
    return calibration, {
        "temperature": calibration.temperature,
        "calibration_biases": calibration.biases.tolist(),
        "calibration_rows": len(label_ids),
        "calibration_unseen_only": unseen_only,
        **{f"calibration_{name}_before": value for name, value in before.items()},
        **{f"calibration_{name}_after": value for name, value in after.items()},
    }
