"""What a model predicts for rows: probabilities, labels and confidence, computed once from logits.

K models, N rows, C classes.
"""

import math
from dataclasses import dataclass
from itertools import compress
from typing import Self

import numpy as np
import torch

from runtime.file_format import LABEL_SEPARATOR


def average(logits: torch.Tensor, multi_label: bool) -> torch.Tensor:
    """Average the probabilities of K models: logits [K, N, C] -> logits [N, C]."""
    if len(logits) == 1:
        return logits[0]
    if multi_label:
        return logits.sigmoid().mean(dim=0).logit(eps=1e-7)
    return logits.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(logits))


def to_logits(probability: np.ndarray, multi_label: bool) -> torch.Tensor:
    """Return the logits, float32 of the same shape, whose softmax or sigmoid is `probability`."""
    probability = torch.from_numpy(probability).double().clamp(1e-9, 1 - 1e-9)
    return (probability.logit() if multi_label else probability.log()).float()


@dataclass(frozen=True)
class Predictions:
    """Predictions of N rows, derived from their logits."""

    logits: torch.Tensor  # float32 [N, C]
    probability: np.ndarray  # softmax over the classes, or a sigmoid for each: float32 [N, C]
    label: np.ndarray  # class numbers [N]; several labels a row: [N, C] of 0 and 1
    confidence: np.ndarray  # probability of the prediction [N]; of several labels: their product

    @classmethod
    def from_logits(cls, logits: torch.Tensor, multi_label: bool) -> Self:
        """Derive predictions from logits; multi-label: every label of probability 0.5 or more."""
        if multi_label:
            probability = logits.sigmoid().numpy()
            label = (probability >= 0.5).astype(int)
            confidence = np.maximum(probability, 1 - probability).prod(axis=1)
        else:
            probability = logits.softmax(dim=1).numpy()
            label, confidence = probability.argmax(axis=1), probability.max(axis=1)
        return cls(logits, probability, label, confidence)

    def take(self, rows: np.ndarray) -> Self:
        """Return the predictions of the selected rows, bool [N]."""
        return type(self)(*(part[rows] for part in vars(self).values()))

    def is_right(self, label_ids: np.ndarray) -> np.ndarray:
        """Return whether each row is right, bool [N]; multi-label: all of its labels."""
        right = self.label == label_ids
        return right.all(axis=1) if label_ids.ndim == 2 else right

    def named(self, names: list[str]) -> list[str]:
        """Return the predicted label of each row by name; several are joined as in the input."""
        if self.label.ndim == 2:
            return [LABEL_SEPARATOR.join(compress(names, row)) for row in self.label]
        return [names[number] for number in self.label]
