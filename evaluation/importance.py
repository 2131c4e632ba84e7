"""Which words a prediction depends on: each word is left out once, and the text is scored again.

Exact, and for any model, unlike attention or gradients (Li et al. 2016, "Understanding neural
networks through representation erasure", https://arxiv.org/abs/1612.08220).
"""

from collections.abc import Callable

import numpy as np
import torch

from model.predictions import Predictions
from runtime.batches import TextRows, rows_of

MOST_WORDS = 64  # texts with more words take too long

Words = list[tuple[str, float]]  # each word, with the fall of the confidence without it


def word_importance(
    classify: Callable[[TextRows], torch.Tensor], texts: list[str], multi_label: bool
) -> list[Words]:
    """Return the importance of each word of each text; empty for a text of many words.

    The importance is the fall of the predicted label's probability without the word; for several
    labels, the fall of the probability of exactly these. classify: texts -> logits [N, C].
    """
    lists = [words if 1 < len(words) <= MOST_WORDS else [] for words in map(str.split, texts)]
    shorter = [" ".join(words[:n] + words[n + 1 :]) for words in lists for n in range(len(words))]
    if not shorter:
        return lists
    logits = classify(rows_of([*texts, *shorter], path=""))
    probability = Predictions.from_logits(logits, multi_label).probability
    whole, rest = probability[: len(texts)], iter(probability[len(texts) :])

    def confidence(row: np.ndarray, full: np.ndarray) -> float:
        if multi_label:
            return float(np.where(full >= 0.5, row, 1 - row).prod())
        return float(row[full.argmax()])

    return [
        [(word, confidence(full, full) - confidence(next(rest), full)) for word in words]
        for full, words in zip(whole, lists, strict=True)
    ]
