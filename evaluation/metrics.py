"""Metrics of a whole file, from its logits. N rows, C classes."""

import zlib
from itertools import compress

import numpy as np
import pandas as pd
import torch

from evaluation.predictions import confidence, predictions, probabilities
from model.sequence_classification import classification_loss

BINS = 10  # of confidence, in the reliability curve
RESAMPLES = 1000  # of a bootstrap
MISTAKES = 20  # the surest, for a report


class Counts:
    """What the metrics of any number of rows need: it grows with the classes alone."""

    def __init__(self) -> None:
        self.rows, self.hits, self.loss = 0, 0, 0.0
        self.tables: np.ndarray | int = 0  # [C, 2, 2], see `multilabel_confusion_matrix`
        self.bins = np.zeros((3, BINS))  # rows, hits and summed confidence, by confidence

    def add(self, logits: torch.Tensor, labels: np.ndarray) -> np.ndarray:
        """Count rows: logits float32 [N, C]; labels int64 [N], or float32 [N, C] of 0 and 1.

        Returns which rows are right: bool [N].
        """
        from sklearn.metrics import multilabel_confusion_matrix  # what has no labels needs it not

        self.multi_label = labels.ndim == 2
        probability = probabilities(logits, self.multi_label)
        predicted = predictions(probability, self.multi_label)
        right = predicted == labels
        if self.multi_label:
            right = right.all(axis=1)
        sure = confidence(probability, self.multi_label)
        self.rows += len(labels)
        self.hits += int(right.sum())
        self.loss += classification_loss(logits, torch.from_numpy(labels)).item()
        tables = multilabel_confusion_matrix(labels, predicted, labels=range(logits.shape[1]))
        self.tables += tables.astype(np.int64)  # which it is not where there is no hit
        place = np.minimum((sure * BINS).astype(int), BINS - 1)
        self.bins += [np.bincount(place, what, BINS) for what in (np.ones(len(sure)), right, sure)]
        return right

    def merge(self, other: "Counts") -> None:
        """Count the other's rows too."""
        for name, value in vars(other).items():
            same = name == "multi_label"
            setattr(self, name, value if same else getattr(self, name) + value)

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

    def per_class(self) -> dict[str, list[float]]:
        """Precision, recall, F1 and support of each class; 0 where nothing is to be divided."""
        hits, predicted, support = (
            self.tables[:, 1, 1], self.tables[:, :, 1].sum(axis=1), self.tables[:, 1].sum(axis=1)
        )  # fmt: skip
        return {
            "precision": (hits / np.maximum(predicted, 1)).tolist(),
            "recall": (hits / np.maximum(support, 1)).tolist(),
            "f1": (2 * hits / np.maximum(predicted + support, 1)).tolist(),
            "support": support.tolist(),
        }

    def calibration(self) -> dict[str, float]:
        """F1 weighted by the classes' support, and the expected calibration error.

        That is the mean distance of confidence and accuracy over bins of equal width (Guo et al.
        2017, https://arxiv.org/abs/1706.04599).
        """
        each = self.per_class()
        rows, hits, sure = self.bins
        return {
            "weighted_f1": float(np.average(each["f1"], weights=np.maximum(each["support"], 1e-9))),
            "ece": float(np.abs(hits - sure).sum() / rows.sum()),
        }


def compute_metrics(logits: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Those of `Counts`, of these rows."""
    counts = Counts()
    counts.add(logits, labels)
    return counts.metrics()


class Bootstrap:
    """The 95 % interval of an accuracy, had other texts been drawn.

    Distinct texts are drawn, not rows, since rows of one text are right or wrong together. Each
    text is drawn as often as a Poisson variable says (Chamandy et al. 2012, "Estimating
    uncertainty for massive data streams"), a function of the text: so memory is constant, and a
    text that comes again counts as the same.
    """

    def __init__(self) -> None:
        self.sums = np.zeros((2, RESAMPLES))  # rows and hits of each resampled file

    def add(self, keys: list[str], right: np.ndarray) -> None:
        """Count rows: their texts' `dataset.text_key`, and whether each is right, bool [N]."""
        text_of_row, texts = pd.factorize(np.array(keys, dtype=object))
        counts = np.stack([np.bincount(text_of_row), np.bincount(text_of_row, right)])  # [2, U]
        for start in range(0, len(texts), 1000):
            part = slice(start, start + 1000)
            seeds = [zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in texts[part]]
            drawn = [np.random.default_rng(seed).poisson(1.0, RESAMPLES) for seed in seeds]
            self.sums += counts[:, part] @ np.array(drawn)

    def interval(self) -> list[float]:
        """Its two ends."""
        rows, hits = self.sums[:, self.sums[0] > 0]
        return np.percentile(hits / rows, [2.5, 97.5]).tolist()


class Score:
    """Metrics of a file, of its seen and of its unseen texts, with what a report shows of them."""

    def __init__(self) -> None:
        self.parts = {name: (Counts(), Bootstrap()) for name in ("seen", "unseen")}
        self.confusion: np.ndarray | int = 0  # [C, C], rows are the true classes; one label a row
        self.mistakes: list[dict] = []

    def add(
        self,
        logits: torch.Tensor,
        labels: np.ndarray,
        texts: list[str],
        keys: list[str],
        seen: np.ndarray | None,
    ) -> "Score":
        """Count rows, their texts and `dataset.text_key` of these.

        seen, bool [N]: whether each one's text stands in the training file.
        """
        self.audited = seen is not None
        if seen is None:  # then the parts mean nothing, but their sum does
            seen = np.zeros(len(labels), dtype=bool)
        for name, rows in (("seen", seen), ("unseen", ~seen)):
            if rows.any():
                counts, bootstrap = self.parts[name]
                right = counts.add(logits[rows], labels[rows])
                bootstrap.add(list(compress(keys, rows)), right)
        self.note_mistakes(logits, labels, texts)
        return self

    def note_mistakes(self, logits: torch.Tensor, labels: np.ndarray, texts: list[str]) -> None:
        """Count what is taken for what; keep the surest of what is wrong, each text once."""
        from sklearn.metrics import confusion_matrix

        multi_label = labels.ndim == 2
        probability = probabilities(logits, multi_label)
        predicted, sure = (
            predictions(probability, multi_label),
            confidence(probability, multi_label),
        )
        wrong = predicted != labels
        if multi_label:
            wrong = wrong.any(axis=1)
        else:
            self.confusion += confusion_matrix(labels, predicted, labels=range(logits.shape[1]))
        wrong = np.flatnonzero(wrong)
        surest: dict[str, int] = {}  # rows, by their texts
        for row in wrong[np.argsort(-sure[wrong], kind="stable")]:
            surest.setdefault(texts[row], row)
            if len(surest) == MISTAKES:
                break
        self.mistakes += [
            {"text": text, "label": labels[row].tolist(), "predicted": predicted[row].tolist(),
             "confidence": round(float(sure[row]), 6)}
            for text, row in surest.items()
        ]  # fmt: skip
        unique = {one["text"]: one for one in reversed(self.mistakes)}.values()
        self.mistakes = sorted(unique, key=lambda one: -one["confidence"])[:MISTAKES]

    def whole(self) -> tuple[Counts, Bootstrap]:
        """Of all rows."""
        counts, bootstrap = Counts(), Bootstrap()
        for part, of_texts in self.parts.values():
            if part.rows:
                counts.merge(part)
                bootstrap.sums += of_texts.sums
        return counts, bootstrap

    def results(self, name: str) -> dict[str, float | list[float] | None]:
        """Metrics of the file `name`, as `name_accuracy` and so on.

        Where texts were audited also the share of seen ones, and the accuracy on those and on all
        others; None where there are no such rows.
        """
        counts, bootstrap = self.whole()
        results = {**counts.metrics(), **counts.calibration()}
        results["accuracy_interval"] = bootstrap.interval()
        if self.audited:
            results["seen_share"] = self.parts["seen"][0].rows / counts.rows
            for part in ("seen", "unseen"):
                counts, bootstrap = self.parts[part]
                there = counts.rows > 0
                results[f"accuracy_{part}"] = counts.metrics()["accuracy"] if there else None
                results[f"accuracy_{part}_interval"] = bootstrap.interval() if there else None
        return prefixed(name, results)

    def details(self) -> dict:
        """What is no single figure, as JSON takes it; classes are in the order of the labels."""
        counts, _ = self.whole()
        return {
            **counts.per_class(),
            "confusion": None if counts.multi_label else self.confusion.tolist(),
            "reliability": dict(
                zip(("rows", "hits", "confidence"), counts.bins.tolist(), strict=True)
            ),
            "mistakes": self.mistakes,
        }


def prefixed(name: str, metrics: dict[str, float]) -> dict[str, float]:
    """`{"accuracy": x}` as `{"eval_accuracy": x}`."""
    return {f"{name}_{key}": value for key, value in metrics.items()}
