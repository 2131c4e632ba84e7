"""Metrics of a whole file at once, from its logits. N rows, C classes."""

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score

from model.sequence_classification import classification_loss


def probabilities(logits: torch.Tensor, multi_label: bool) -> np.ndarray:
    """Softmax over the classes, or a sigmoid for each: float32 [N, C]."""
    return (logits.sigmoid() if multi_label else logits.softmax(dim=1)).numpy()


def predictions(probability: np.ndarray, multi_label: bool) -> np.ndarray:
    """Class numbers [N], or [N, C] of 0 and 1: a label applies from a probability of one half."""
    return (probability >= 0.5).astype(int) if multi_label else probability.argmax(axis=1)


def confidence(probability: np.ndarray, multi_label: bool) -> np.ndarray:
    """Probability of the prediction [N]; with several labels a row, of its least sure decision."""
    if multi_label:
        return np.maximum(probability, 1 - probability).min(axis=1)
    return probability.max(axis=1)


def compute_metrics(logits: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Loss, accuracy and macro F1; with several labels a row also micro F1.

    Args: logits float32 [N, C]; labels int64 [N], or float32 [N, C] of 0 and 1.
    Accuracy of several labels a row is that of the whole row. Macro F1 averages over the classes
    that occur in the labels or the predictions; where one has no hit its F1 is 0.
    """
    multi_label = labels.ndim == 2
    predicted = predictions(probabilities(logits, multi_label), multi_label)
    metrics = {
        "loss": classification_loss(logits, torch.from_numpy(labels)).item() / len(labels),
        "accuracy": accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro", zero_division=0),
    }
    if multi_label:
        metrics["micro_f1"] = f1_score(labels, predicted, average="micro", zero_division=0)
    return {name: float(value) for name, value in metrics.items()}


def score(
    name: str, logits: torch.Tensor, labels: np.ndarray, seen: np.ndarray | None
) -> dict[str, float | None]:
    """Metrics of the file `name`, as `name_accuracy` and so on.

    With `seen`, bool [N], also the share of rows whose text stands in the training file, and the
    accuracy on those and on all others; None where there are no such rows.
    """
    results = compute_metrics(logits, labels)
    if seen is not None:
        results["seen_share"] = float(seen.mean())
        for part, rows in (("seen", seen), ("unseen", ~seen)):
            some = compute_metrics(logits[rows], labels[rows]) if rows.any() else {}
            results[f"accuracy_{part}"] = some.get("accuracy")
    return prefixed(name, results)


def prefixed(name: str, metrics: dict[str, float]) -> dict[str, float]:
    """`{"accuracy": x}` as `{"eval_accuracy": x}`."""
    return {f"{name}_{key}": value for key, value in metrics.items()}
