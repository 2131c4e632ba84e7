"""Predictions from logits. N rows, C classes."""

import numpy as np
import torch


def probabilities(logits: torch.Tensor, multi_label: bool) -> np.ndarray:
    """Softmax over the classes, or a sigmoid for each: float32 [N, C]."""
    return (logits.sigmoid() if multi_label else logits.softmax(dim=1)).numpy()


def predictions(probability: np.ndarray, multi_label: bool) -> np.ndarray:
    """Class numbers [N], or [N, C] of 0 and 1: a label applies from a probability of one half."""
    return (probability >= 0.5).astype(int) if multi_label else probability.argmax(axis=1)


def confidence(probability: np.ndarray, multi_label: bool) -> np.ndarray:
    """Probability of the prediction [N]; several labels a row count as independent."""
    if multi_label:
        return np.maximum(probability, 1 - probability).prod(axis=1)
    return probability.max(axis=1)
