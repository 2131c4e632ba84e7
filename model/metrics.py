"""Metrics of a whole file, from its logits. N rows, C classes."""

import numpy as np
import torch
from sklearn.metrics import multilabel_confusion_matrix

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


class Counts:
    """What the metrics of any number of rows need: it grows with the classes alone."""

    def __init__(self) -> None:
        self.rows, self.hits, self.loss = 0, 0, 0.0
        self.tables: np.ndarray | int = 0  # [C, 2, 2], see `multilabel_confusion_matrix`

    def add(self, logits: torch.Tensor, labels: np.ndarray) -> "Counts":
        """Count rows: logits float32 [N, C]; labels int64 [N], or float32 [N, C] of 0 and 1."""
        self.multi_label = labels.ndim == 2
        predicted = predictions(probabilities(logits, self.multi_label), self.multi_label)
        right = predicted == labels
        self.rows += len(labels)
        self.hits += int((right.all(axis=1) if self.multi_label else right).sum())
        self.loss += classification_loss(logits, torch.from_numpy(labels)).item()
        self.tables += multilabel_confusion_matrix(labels, predicted, labels=range(logits.shape[1]))
        return self

    def metrics(self) -> dict[str, float]:
        """Loss, accuracy and macro F1; with several labels a row also micro F1.

        Accuracy of several labels a row is that of the whole row. Macro F1 averages over the
        classes that occur in the labels or the predictions; where one has no hit its F1 is 0.
        """
        hits, wrong = self.tables[:, 1, 1], self.tables[:, 0, 1] + self.tables[:, 1, 0]
        occurs = hits + wrong > 0
        each = 2 * hits[occurs] / (2 * hits + wrong)[occurs]
        found = {
            "loss": self.loss / self.rows,
            "accuracy": self.hits / self.rows,
            "macro_f1": float(each.mean()) if occurs.any() else 0.0,
        }
        if self.multi_label:
            found["micro_f1"] = float(2 * hits.sum() / max(1, (2 * hits + wrong).sum()))
        return found


def compute_metrics(logits: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Those of `Counts`, of these rows."""
    return Counts().add(logits, labels).metrics()


class Score:
    """Metrics of a file, of its seen and of its unseen texts."""

    def __init__(self) -> None:
        self.all, self.seen, self.unseen = Counts(), Counts(), Counts()

    def add(self, logits: torch.Tensor, labels: np.ndarray, seen: np.ndarray | None) -> "Score":
        """Count rows; `seen`, bool [N]: whether each one's text stands in the training file."""
        self.all.add(logits, labels)
        self.audited = seen is not None
        if self.audited:
            for part, rows in ((self.seen, seen), (self.unseen, ~seen)):
                if rows.any():
                    part.add(logits[rows], labels[rows])
        return self

    def results(self, name: str) -> dict[str, float | None]:
        """Metrics of the file `name`, as `name_accuracy` and so on.

        Where texts were audited also the share of seen ones, and the accuracy on those and on all
        others; None where there are no such rows.
        """
        results: dict[str, float | None] = dict(self.all.metrics())
        if self.audited:
            results["seen_share"] = self.seen.rows / self.all.rows
            for part, counts in (("seen", self.seen), ("unseen", self.unseen)):
                accuracy = counts.metrics()["accuracy"] if counts.rows else None
                results[f"accuracy_{part}"] = accuracy
        return prefixed(name, results)


def prefixed(name: str, metrics: dict[str, float]) -> dict[str, float]:
    """`{"accuracy": x}` as `{"eval_accuracy": x}`."""
    return {f"{name}_{key}": value for key, value in metrics.items()}
