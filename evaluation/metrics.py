"""Metrics of a whole file, from the predictions of its rows. N rows, C classes.

To add a metric, add it to `Tally.metrics`, or to `Tally.report_metrics` if choosing an epoch does
not need it, and give it a title in `TITLES`: all_results.json, the closing table, report.html and
the model card then show it. A metric comes from the sums of `Tally`, never from rows; a new sum is
an attribute, which `Sums` adds up (in float, since counts of whole numbers may overflow in
products). Others choose metrics of their own: `pages.CARDS`, `--metric_for_best_model`, the study.

With several labels per row, calibration is measured by label: each label of each row is one
decision, right or wrong, with the confidence max(p, 1 - p). Everything else is by row: a row is
right only if all of its labels are, and its confidence is their product.
"""

from itertools import compress

import numpy as np
import torch

from evaluation.intervals import BINS, Bootstrap, Chance, Sums, bin_of
from model.predictions import Predictions
from model.sequence_classification import classification_loss

HISTOGRAM_BINS = 1000  # of confidence, in the curve of accuracy against coverage
COVERAGES = (1, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
IN_MATRIX = 50  # classes at most in a confusion matrix
MISTAKES = 20  # most confident mistakes shown in a report

# Rows of the summary table, by their keys in all_results.json without `eval_` and `test_`; of at
# most 24 characters.
TITLES = {
    "rows": "rows",
    "accuracy": "accuracy",
    "accuracy_interval": "accuracy, 95 % interval",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "micro_f1": "micro F1",
    "loss": "log loss",
    "ece": "calibration error (ECE)",
    "ece_by_chance": "if perfectly calibrated",
    "ece_by_chance_bound": "if so, 95 % are below",
    "rejected_share": "share of rejected rows",
    "accuracy_kept": "accuracy on kept rows",
    "seen_share": "share of seen texts",
    "accuracy_seen": "accuracy on seen texts",
    "accuracy_unseen": "accuracy on unseen texts",
    "accuracy_unseen_interval": "unseen, 95 % interval",
    "ece_seen": "ECE on seen texts",
    "ece_unseen": "ECE on unseen texts",
    "ece_unseen_by_chance_bound": "unseen by chance, 95 %",
}


def confidence_counts(confidence: np.ndarray, right: np.ndarray, bins: int) -> np.ndarray:
    """Count predictions and hits, and sum confidence, by confidence: float64 [3, bins]."""
    weights = (np.ones(len(right)), right, confidence)
    return np.stack([np.bincount(bin_of(confidence, bins), weight, bins) for weight in weights])


def calibration_error(counts: np.ndarray) -> float:
    """Return the expected calibration error (ECE) of `confidence_counts`.

    The error is the mean gap between confidence and accuracy over bins of equal width (Guo et al.
    2017, https://arxiv.org/abs/1706.04599, with 15 bins). `Chance` says how much is chance.
    """
    rows, hits, confidence = counts
    return float(np.abs(hits - confidence).sum() / rows.sum())


def decisions(predictions: Predictions, label_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return confidence, float [N, L], and whether it is right, bool [N, L], of each decision.

    L is 1, or C if a row may have several labels: each is a decision.
    """
    right = predictions.label == label_ids
    if label_ids.ndim == 1:
        return predictions.confidence[:, None], right[:, None]
    return np.maximum(predictions.probability, 1 - predictions.probability), right


class Tally(Sums):
    """Running sums behind the metrics; their size depends on the number of classes only."""

    def __init__(self) -> None:
        self.rows, self.hits, self.loss = 0, 0, 0.0
        self.classes: np.ndarray | int = 0  # [3, C]: hits, predicted and true rows of each class
        self.confusion: np.ndarray | int = 0  # [C, C]: true and predicted; 0 with many classes
        # `confidence_counts` of the decisions, and finer ones of the rows
        self.bins, self.histogram = np.zeros((3, BINS)), np.zeros((3, HISTOGRAM_BINS))

    def add(self, predictions: Predictions, label_ids: np.ndarray) -> np.ndarray:
        """Add rows; label_ids: int64 [N], or float32 [N, C] of 0 and 1.

        Returns whether each row is right: bool [N].
        """
        right = predictions.is_right(label_ids)
        self.rows += len(label_ids)
        self.hits += int(right.sum())
        self.loss += classification_loss(predictions.logits, torch.from_numpy(label_ids)).item()
        if label_ids.ndim == 2:
            true, predicted = label_ids.astype(bool), predictions.label.astype(bool)
            counts = [part.sum(axis=0) for part in (true & predicted, predicted, true)]
        else:
            classes = predictions.logits.shape[1]
            parts = label_ids[right], predictions.label, label_ids
            counts = [np.bincount(part, minlength=classes) for part in parts]
            if classes <= IN_MATRIX:
                matrix = np.zeros((classes, classes), dtype=int)
                np.add.at(matrix, (label_ids, predictions.label), 1)
                self.confusion = self.confusion + matrix
        self.classes = self.classes + np.stack(counts)
        confidence, decided_right = decisions(predictions, label_ids)
        self.bins += confidence_counts(confidence.ravel(), decided_right.ravel(), BINS)
        self.histogram += confidence_counts(predictions.confidence, right, HISTOGRAM_BINS)
        return right

    def metrics(self, multi_label: bool) -> dict[str, float]:
        """Compute loss, accuracy and macro F1, for multi-label data also micro F1.

        A multi-label row counts as right only if all of its labels are. Macro F1 averages over the
        classes that occur in the labels or the predictions; a class without a hit has F1 0.
        """
        hits, predicted, support = self.classes
        total = predicted + support
        occurs = total > 0
        metrics = {
            "loss": self.loss / self.rows,
            "accuracy": self.hits / self.rows,
            "macro_f1": float((2 * hits[occurs] / total[occurs]).mean()) if occurs.any() else 0.0,
        }
        if multi_label:
            metrics["micro_f1"] = float(2 * hits.sum() / max(1, total.sum()))
        return metrics

    def per_class(self) -> dict[str, list[float]]:
        """Compute precision, recall, F1 and support of each class; 0 / 0 counts as 0."""
        hits, predicted, support = self.classes
        return {
            "precision": (hits / np.maximum(predicted, 1)).tolist(),
            "recall": (hits / np.maximum(support, 1)).tolist(),
            "f1": (2 * hits / np.maximum(predicted + support, 1)).tolist(),
            "support": support.tolist(),
        }

    def report_metrics(self, multi_label: bool) -> dict[str, float]:
        """Compute F1 weighted by class support, and the `calibration_error`."""
        classes = self.per_class()
        weights = np.maximum(classes["support"], 1e-9)
        weighted = float(np.average(classes["f1"], weights=weights))
        return {"weighted_f1": weighted, "ece": calibration_error(self.bins)}

    def coverage(self) -> list[list[float]]:
        """Return what rejecting the least confident rows brings: threshold, coverage and accuracy.

        The thresholds are those whose coverage, the share of rows kept, is nearest to `COVERAGES`.
        """
        rows, hits, _ = self.histogram[:, ::-1].cumsum(axis=1)[:, ::-1]  # at least as confident
        nearest = (int(np.abs(rows / rows[0] - share).argmin()) for share in COVERAGES)
        bins = [number for number in dict.fromkeys(nearest) if rows[number]]
        return [[at / HISTOGRAM_BINS, rows[at] / rows[0], hits[at] / rows[at]] for at in bins]


def compute_metrics(predictions: Predictions, label_ids: np.ndarray) -> dict[str, float]:
    """Return the `Tally.metrics` of these rows."""
    tally = Tally()
    tally.add(predictions, label_ids)
    return tally.metrics(label_ids.ndim == 2)


class Part(Sums):
    """Figures of the rows of a file, or of those with a seen or an unseen text."""

    def __init__(self) -> None:
        self.tally, self.bootstrap, self.chance = Tally(), Bootstrap(), Chance()

    def add(self, predictions: Predictions, label_ids: np.ndarray, keys: list[str]) -> None:
        """Add rows, with the keys of their texts."""
        if keys:
            self.bootstrap.add(keys, self.tally.add(predictions, label_ids))
            self.chance.add(keys, decisions(predictions, label_ids)[0])

    def results(self) -> dict[str, float | list[float] | None]:
        """Return accuracy and calibration error, and what chance does to them; None if no rows."""
        names = ("accuracy", "accuracy_interval", "ece", "ece_by_chance", "ece_by_chance_bound")
        tally = self.tally
        if not tally.rows:
            return dict.fromkeys(names)
        accuracy, error = tally.hits / tally.rows, calibration_error(tally.bins)
        figures = (accuracy, self.bootstrap.interval(), error, *self.chance.errors())
        return dict(zip(names, figures, strict=True))


class Score:
    """Metrics of a file and of its seen and unseen texts, with the details for a report."""

    def __init__(self, multi_label: bool, reject_below: float = 0.0) -> None:
        """reject_below: rows with less confidence count as rejected."""
        self.multi_label, self.audited, self.reject_below = multi_label, False, reject_below
        self.kept, self.kept_hits = 0, 0
        self.parts = {"seen": Part(), "unseen": Part()}
        self.mistakes: dict[str, dict] = {}  # the most confident ones, by text

    def add(
        self,
        predictions: Predictions,
        label_ids: np.ndarray,
        texts: list[str],
        keys: list[str],
        seen: np.ndarray | None,
    ) -> "Score":
        """Add rows, with their texts and the keys of the texts.

        seen, bool [N]: see `Data.seen`; None if unknown.
        """
        self.audited = seen is not None
        if seen is None:  # only the sum of both parts is used then
            seen = np.zeros(len(label_ids), dtype=bool)
        for part, rows in (("seen", seen), ("unseen", ~seen)):
            part_keys = list(compress(keys, rows))
            self.parts[part].add(predictions.take(rows), label_ids[rows], part_keys)
        right = predictions.is_right(label_ids)
        kept = predictions.confidence >= self.reject_below
        self.kept += int(kept.sum())
        self.kept_hits += int(right[kept].sum())
        for row in np.flatnonzero(~right):
            self.add_mistake(
                {
                    "text": texts[row],
                    "label": label_ids[row].tolist(),
                    "predicted": predictions.label[row].tolist(),
                    "confidence": round(float(predictions.confidence[row]), 6),
                }
            )
        ranked = sorted(self.mistakes.items(), key=lambda item: -item[1]["confidence"])
        self.mistakes = dict(ranked[:MISTAKES])
        return self

    def add_mistake(self, mistake: dict) -> None:
        """Add a mistake, unless one with the same text is as confident."""
        known = self.mistakes.setdefault(mistake["text"], mistake)
        if known["confidence"] < mistake["confidence"]:
            self.mistakes[mistake["text"]] = mistake

    @property
    def rows(self) -> int:
        """The number of scored rows."""
        return sum(part.tally.rows for part in self.parts.values())

    def whole(self) -> Part:
        """Return the figures of all rows."""
        return self.parts["seen"] + self.parts["unseen"]

    def results(self, name: str) -> dict[str, float | list[float] | None]:
        """Return the metrics of the file `name`, as `name_accuracy` and so on.

        If it is known which texts were seen, they include the share of rows with a seen text, and
        the `Part.results` of seen and of unseen texts, as `name_accuracy_seen` and so on.
        """
        whole = self.whole()
        tally = whole.tally
        results = (
            tally.metrics(self.multi_label)
            | tally.report_metrics(self.multi_label)
            | whole.results()
        )
        if self.reject_below:
            results["rejected_share"] = 1 - self.kept / tally.rows
            results["accuracy_kept"] = self.kept_hits / self.kept if self.kept else None
        if self.audited:
            results["seen_share"] = self.parts["seen"].tally.rows / tally.rows
            for part, figures in self.parts.items():
                for key, value in figures.results().items():
                    metric, *rest = key.split("_", 1)
                    results["_".join([metric, part, *rest])] = value
        return prefixed(name, results)

    def details(self) -> dict:
        """Return class figures, confusion matrix, reliability curve and worst mistakes, as JSON."""
        whole, unseen = self.whole().tally, self.parts["unseen"].tally
        matrix = whole.confusion.tolist() if np.ndim(whole.confusion) else None
        details: dict = whole.per_class() | {"confusion": matrix}
        names = ("rows", "hits", "confidence")
        details["reliability"] = dict(zip(names, whole.bins.tolist(), strict=True))
        details["coverage"] = {"all texts": whole.coverage()}
        if 0 < unseen.rows < whole.rows:
            details["coverage"]["unseen texts"] = unseen.coverage()
        return details | {"mistakes": [*self.mistakes.values()]}


def prefixed(name: str, metrics: dict[str, float]) -> dict[str, float]:
    """Prefix the keys: `{"accuracy": x}` becomes `{"eval_accuracy": x}`."""
    return {f"{name}_{key}": value for key, value in metrics.items()}
