"""Metrics of a whole file, from the predictions of its rows. N rows, C classes.

To add a metric, add it to `Counts.metrics`, or to `Counts.more_metrics` if choosing an epoch does
not need it, and give it a title in `TITLES`: tables, reports and all_results.json then show it.

With several labels per row, calibration is measured by label: each label of each row is one
decision, right or wrong, with the confidence max(p, 1 - p). Everything else is by row: a row is
right only if all of its labels are, and its confidence is their product.
"""

from collections import Counter
from itertools import compress

import numpy as np
import torch

from evaluation.intervals import BINS, Bootstrap, Chance, bin_of
from model.predictions import Predictions
from model.sequence_classification import classification_loss

FINE_BINS = 1000  # in the curve of accuracy against coverage
COVERAGES = (1, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
IN_MATRIX = 50  # classes at most in a confusion matrix; with more, pairs are listed
LISTED_PAIRS = 1000
MISTAKES = 20  # most confident mistakes shown in a report

# Rows of the summary table, by their keys in all_results.json without `eval_` and `test_`.
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
    return np.stack([np.bincount(bin_of(confidence, bins), one, bins) for one in weights])


def calibration_error(counts: np.ndarray) -> float:
    """Return the expected calibration error (ECE) of `confidence_counts`.

    The error is the mean gap between confidence and accuracy over bins of equal width (Guo et al.
    2017, https://arxiv.org/abs/1706.04599, with 15 bins). `Chance` says how much is chance.
    """
    rows, hits, confidence = counts
    return float(np.abs(hits - confidence).sum() / rows.sum())


def decisions(found: Predictions, label_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return confidence, float [N, L], and whether it is right, bool [N, L], of each decision.

    L is 1, or C if a row may have several labels: each is a decision.
    """
    if label_ids.ndim == 1:
        return found.confidence[:, None], (found.label == label_ids)[:, None]
    return np.maximum(found.probability, 1 - found.probability), found.label == label_ids


class Counts:
    """Running sums behind the metrics; their size depends on the number of classes only."""

    def __init__(self, multi_label: bool) -> None:
        self.multi_label = multi_label
        self.rows, self.hits, self.loss = 0, 0, 0.0
        self.classes: np.ndarray | int = 0  # [3, C]: hits, predicted and true rows of each class
        # decisions, or rows; hits and summed confidence, by confidence
        self.bins, self.fine = np.zeros((3, BINS)), np.zeros((3, FINE_BINS))

    def add(self, found: Predictions, label_ids: np.ndarray) -> np.ndarray:
        """Add rows; label_ids: int64 [N], or float32 [N, C] of 0 and 1.

        Returns whether each row is right: bool [N].
        """
        right = found.is_right(label_ids)
        self.rows += len(label_ids)
        self.hits += int(right.sum())
        self.loss += classification_loss(found.logits, torch.from_numpy(label_ids)).item()
        classes = found.logits.shape[1]
        if label_ids.ndim == 2:
            true, predicted = label_ids.astype(bool), found.label.astype(bool)
            counted = [part.sum(axis=0) for part in (true & predicted, predicted, true)]
        else:
            parts = (label_ids[right], found.label, label_ids)
            counted = [np.bincount(part, minlength=classes) for part in parts]
        self.classes += np.stack(counted)
        decided = (one.ravel() for one in decisions(found, label_ids))
        self.bins += confidence_counts(*decided, BINS)
        self.fine += confidence_counts(found.confidence, right, FINE_BINS)
        return right

    def merge(self, other: "Counts") -> None:
        """Add the rows of another `Counts`."""
        for name in ("rows", "hits", "loss", "classes", "bins", "fine"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def metrics(self) -> dict[str, float]:
        """Compute loss, accuracy and macro F1, for multi-label data also micro F1.

        A multi-label row counts as right only if all of its labels are. Macro F1 averages over the
        classes that occur in the labels or the predictions; a class without a hit has F1 0.
        """
        hits, predicted, support = self.classes
        total = predicted + support
        occurs = total > 0
        each = 2 * hits[occurs] / total[occurs]
        found = {
            "loss": self.loss / self.rows,
            "accuracy": self.hits / self.rows,
            "macro_f1": float(each.mean()) if occurs.any() else 0.0,
        }
        if self.multi_label:
            found["micro_f1"] = float(2 * hits.sum() / max(1, total.sum()))
        return found

    def per_class(self) -> dict[str, list[float]]:
        """Compute precision, recall, F1 and support of each class; 0 / 0 counts as 0."""
        hits, predicted, support = self.classes
        return {
            "precision": (hits / np.maximum(predicted, 1)).tolist(),
            "recall": (hits / np.maximum(support, 1)).tolist(),
            "f1": (2 * hits / np.maximum(predicted + support, 1)).tolist(),
            "support": support.tolist(),
        }

    def coverage(self) -> list[list[float]]:
        """Return what rejecting the least confident rows brings: threshold, coverage and accuracy.

        The thresholds are those whose coverage, the share of rows kept, is nearest to `COVERAGES`.
        """
        rows, hits, _ = self.fine[:, ::-1].cumsum(axis=1)[:, ::-1]  # at least as confident
        nearest = (int(np.abs(rows / rows[0] - share).argmin()) for share in COVERAGES)
        places = [place for place in dict.fromkeys(nearest) if rows[place]]
        return [[at / FINE_BINS, rows[at] / rows[0], hits[at] / rows[at]] for at in places]

    def more_metrics(self) -> dict[str, float]:
        """Compute F1 weighted by class support, and the `calibration_error`."""
        each = self.per_class()
        weights = np.maximum(each["support"], 1e-9)
        weighted = float(np.average(each["f1"], weights=weights))
        return {"weighted_f1": weighted, "ece": calibration_error(self.bins)}


def compute_metrics(found: Predictions, label_ids: np.ndarray) -> dict[str, float]:
    """Return the `Counts.metrics` of these rows."""
    counts = Counts(label_ids.ndim == 2)
    counts.add(found, label_ids)
    return counts.metrics()


class Part:
    """Figures of the rows of a file, or of those with a seen or an unseen text."""

    def __init__(self, multi_label: bool) -> None:
        self.counts, self.bootstrap, self.chance = Counts(multi_label), Bootstrap(), Chance()

    def add(self, found: Predictions, label_ids: np.ndarray, keys: list[str]) -> None:
        """Add rows, with the keys of their texts."""
        if keys:
            self.bootstrap.add(keys, self.counts.add(found, label_ids))
            self.chance.add(keys, decisions(found, label_ids)[0])

    def merge(self, other: "Part") -> "Part":
        """Add the rows of another part."""
        if other.counts.rows:
            for name in ("counts", "bootstrap", "chance"):
                getattr(self, name).merge(getattr(other, name))
        return self

    def results(self) -> dict[str, float | list[float] | None]:
        """Return accuracy and calibration error, and what chance does to them; None if no rows."""
        if not self.counts.rows:
            return dict.fromkeys(
                ("accuracy", "accuracy_interval", "ece", "ece_by_chance", "ece_by_chance_bound")
            )
        mean, bound = self.chance.errors()
        return {
            "accuracy": self.counts.metrics()["accuracy"],
            "accuracy_interval": self.bootstrap.interval(),
            "ece": calibration_error(self.counts.bins),
            "ece_by_chance": mean,
            "ece_by_chance_bound": bound,
        }


class Score:
    """Metrics of a file and of its seen and unseen texts, with the details for a report."""

    def __init__(self, multi_label: bool, reject_below: float = 0.0) -> None:
        """reject_below: rows with less confidence count as rejected."""
        self.multi_label, self.audited, self.reject_below = multi_label, False, reject_below
        self.kept, self.kept_hits = 0, 0
        self.parts = {name: Part(multi_label) for name in ("seen", "unseen")}
        self.pairs: Counter = Counter()  # rows by (true, predicted) class; one label a row
        self.mistakes: list[dict] = []

    def add(
        self,
        found: Predictions,
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
            self.parts[part].add(found.take(rows), label_ids[rows], list(compress(keys, rows)))
        right = found.is_right(label_ids)
        kept = found.confidence >= self.reject_below
        self.kept += int(kept.sum())
        self.kept_hits += int(right[kept].sum())
        if not self.multi_label:
            self.pairs.update(zip(label_ids.tolist(), found.label.tolist(), strict=True))
        self.add_mistakes(found, label_ids, texts, right)
        return self

    def add_mistakes(
        self, found: Predictions, label_ids: np.ndarray, texts: list[str], right: np.ndarray
    ) -> None:
        """Keep the most confident wrong predictions, each text once."""
        wrong = np.flatnonzero(~right)
        rows: dict[str, int] = {}  # by text
        for row in wrong[np.argsort(-found.confidence[wrong], kind="stable")]:
            rows.setdefault(texts[row], row)
            if len(rows) == MISTAKES:
                break
        self.mistakes += [
            {
                "text": text,
                "label": label_ids[row].tolist(),
                "predicted": found.label[row].tolist(),
                "confidence": round(float(found.confidence[row]), 6),
            }
            for text, row in rows.items()
        ]
        unique = {one["text"]: one for one in reversed(self.mistakes)}.values()
        self.mistakes = sorted(unique, key=lambda one: -one["confidence"])[:MISTAKES]

    def whole(self) -> Part:
        """Return the figures of all rows."""
        return Part(self.multi_label).merge(self.parts["seen"]).merge(self.parts["unseen"])

    def results(self, name: str) -> dict[str, float | list[float] | None]:
        """Return the metrics of the file `name`, as `name_accuracy` and so on.

        If it is known which texts were seen, they include the share of rows with a seen text, and
        the `Part.results` of seen and of unseen texts, as `name_accuracy_seen` and so on.
        """
        whole = self.whole()
        counts = whole.counts
        results = {**counts.metrics(), **counts.more_metrics(), **whole.results()}
        if self.reject_below:
            results["rejected_share"] = 1 - self.kept / counts.rows
            results["accuracy_kept"] = self.kept_hits / self.kept if self.kept else None
        if self.audited:
            results["seen_share"] = self.parts["seen"].counts.rows / counts.rows
            for part, figures in self.parts.items():
                for key, value in figures.results().items():
                    metric, *rest = key.split("_", 1)
                    results["_".join([metric, part, *rest])] = value
        return prefixed(name, results)

    def details(self) -> dict:
        """Return class figures, confusion matrix, reliability curve and worst mistakes, as JSON.

        With more than `IN_MATRIX` classes there is no matrix, but a list of the most frequent pairs
        of a true and a predicted class, with their rows.
        """
        counts, unseen = self.whole().counts, self.parts["unseen"].counts
        classes, matrix, listed = counts.classes.shape[1], None, {}
        if not self.multi_label and classes <= IN_MATRIX:
            matrix = np.zeros((classes, classes), dtype=int)
            for pair, rows in self.pairs.items():
                matrix[pair] = rows
            matrix = matrix.tolist()
        elif not self.multi_label:
            found = self.pairs.most_common(LISTED_PAIRS)
            listed = {"confusion_pairs": [[*pair, rows] for pair, rows in found]}
        return {
            **counts.per_class(),
            "confusion": matrix,
            **listed,
            "reliability": dict(
                zip(("rows", "hits", "confidence"), counts.bins.tolist(), strict=True)
            ),
            "coverage": {
                name: part.coverage()
                for name, part in (("all texts", counts), ("unseen texts", unseen))
                if part.rows and (name == "all texts" or unseen.rows < counts.rows)
            },
            "mistakes": self.mistakes,
        }


def prefixed(name: str, metrics: dict[str, float]) -> dict[str, float]:
    """Prefix the keys: `{"accuracy": x}` becomes `{"eval_accuracy": x}`."""
    return {f"{name}_{key}": value for key, value in metrics.items()}
