"""What chance does to a figure: intervals of accuracies, and the calibration error of chance alone.

The unit is the distinct text, since the rows of one text are right or wrong together. In a file,
what is drawn for a text is a function of the text: memory is constant however long the file is, and
a text that occurs again counts as the same one. In a study, seeds vary too, see
script/study/significance.py.
N rows, L predictions per row, T distinct texts.
"""

import math
import zlib
from typing import Self

import numpy as np
import pandas as pd

RESAMPLES = 1000  # resampled files of a bootstrap
SIMULATED = 400  # files of a perfectly calibrated model
BINS = 10  # bins of confidence in a reliability curve
LEVEL = 0.95  # of intervals and bounds
NORMAL = 1.96  # standard deviations of a normal distribution, on each side


def random_of(text: str) -> np.random.Generator:
    """Return the random numbers of a text, always the same."""
    return np.random.default_rng(zlib.crc32(text.encode("utf-8", "surrogatepass")))


def bin_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin, of `bins` bins of equal width, in which each confidence lies."""
    return np.minimum((confidence * bins).astype(int), bins - 1)


def wilson(share: float, size: float) -> list[float]:
    """Return the two ends of Wilson's 95 % interval of a share of `size` independent cases.

    It is right for few cases too, and when all are right (Wilson 1927; Brown, Cai & DasGupta 2001,
    "Interval estimation for a binomial proportion"). A size by variance is no whole number.
    """
    square = NORMAL**2 / max(1.0, size)
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return [max(0.0, middle - half), min(1.0, middle + half)]


class Sums:
    """Sums over rows, the attributes: those of two sets of rows without a common text are added."""

    def __add__(self, other: Self) -> Self:
        total = type(self)()
        for name, value in vars(self).items():
            setattr(total, name, value + getattr(other, name))
        return total


class Bootstrap(Sums):
    """95 % interval of an accuracy, over the random choice of texts.

    A bootstrap over distinct texts gives the variance of the accuracy: the number of times a text
    is drawn follows a Poisson distribution (Chamandy et al. 2012, "Estimating uncertainty for
    massive data streams"). The interval is Wilson's with as many independent rows as would have
    this variance. Percentiles of the bootstrap would be too narrow for few texts: [1, 1] if all are
    right.
    """

    def __init__(self) -> None:
        self.sums = np.zeros((2, RESAMPLES))  # rows and hits of each resampled file
        self.rows, self.hits = 0, 0

    def add(self, keys: list[str], right: np.ndarray) -> None:
        """Add rows: the keys of their texts, and whether each row is right, bool [N]."""
        self.rows, self.hits = self.rows + len(right), self.hits + int(right.sum())
        text_index, texts = pd.factorize(np.array(keys, dtype=object))
        counts = np.stack([np.bincount(text_index), np.bincount(text_index, right)])  # [2, T]
        for start in range(0, len(texts), 1000):
            part = slice(start, start + 1000)
            drawn = [random_of(text).poisson(1.0, RESAMPLES) for text in texts[part]]
            self.sums += counts[:, part] @ np.array(drawn)

    def interval(self) -> list[float]:
        """Return the two ends of the interval."""
        share, rows = self.hits / self.rows, self.sums[0]
        drawn = self.sums[:, rows > 0]
        variance = (drawn[1] / drawn[0]).var()
        texts = self.rows**2 / rows.var()  # Kish's effective number, if all are right or wrong
        size = share * (1 - share) / variance if variance > 0 else texts
        return wilson(share, min(size, self.rows))


class Chance(Sums):
    """The calibration error that a perfectly calibrated model has by chance.

    Files are simulated in which each prediction is right with the probability that its confidence
    says: all rows of a text together, the L labels of a row independently.
    """

    def __init__(self) -> None:
        self.hits = np.zeros((BINS, SIMULATED))  # in each bin of each simulated file
        self.confidence, self.count = np.zeros(BINS), 0  # summed; of predictions

    def add(self, keys: list[str], confidence: np.ndarray) -> None:
        """Add rows: the keys of their texts, and the confidence of their predictions, [N, L]."""
        self.count += confidence.size
        self.confidence += np.bincount(bin_of(confidence, BINS).ravel(), confidence.ravel(), BINS)
        text_index, texts = pd.factorize(np.array(keys, dtype=object))
        # the predictions of a text: one, unless several prefixes predicted it
        distinct, rows = np.unique(np.c_[text_index, confidence], axis=0, return_counts=True)
        labels, size = confidence.shape[1], max(1, 1000 // confidence.shape[1])
        for start in range(0, len(distinct), size):
            part = slice(start, start + size)
            shares = distinct[part, 1:]
            drawn = [
                random_of(text).random((labels, SIMULATED), dtype=np.float32)
                for text in texts[distinct[part, 0].astype(int)]
            ]
            hit = (np.array(drawn) < shares[:, :, None]).astype(np.float32)
            weight = np.eye(BINS, dtype=np.float32)[bin_of(shares, BINS)] * rows[part, None, None]
            self.hits += np.tensordot(weight.astype(np.float32), hit, ((0, 1), (0, 1)))

    def errors(self) -> tuple[float, float]:
        """Return the mean calibration error, and the one that 95 % of the files stay below."""
        errors = np.abs(self.hits - self.confidence[:, None]).sum(axis=0) / self.count
        return float(errors.mean()), float(np.quantile(errors, LEVEL))
