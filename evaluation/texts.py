"""Texts from the command line: their labels, and the words that these depend on."""

import sys
from itertools import zip_longest

from evaluation.importance import word_importance
from evaluation.scoring import show
from model.classifier import Classifier, as_texts
from runtime.files import UserError

SHOWN_WORDS = 3


def label_texts(
    classify: Classifier, texts: list[str], drop_empty: bool, reject_below: float
) -> None:
    """Print each text's labels, the most probable first, and why; `["-"]`: of standard input."""
    many = texts == ["-"]
    try:
        texts = [line.rstrip("\r\n") for line in sys.stdin] if many else texts
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding}: convert it") from None
    texts = as_texts(texts, drop_empty, "fill it in, or drop blank texts with --drop_empty")
    if not texts:
        raise UserError("there is no text to label: pass one after --text, or lines with --text -")
    importance = word_importance(classify.logits, [] if many else texts, classify.multi_label)
    for text, label, words in zip_longest(texts, classify(texts), importance, fillvalue=()):
        order = sorted(label["probabilities"].items(), key=lambda pair: -pair[1])
        lines = [text, *(f"{share:8.4f}  {name}" for name, share in order)]
        if label["confidence"] < reject_below:
            lines.append(f"          rejected: its confidence is below {reject_below:g}")
        if most := sorted(words, key=lambda pair: -pair[1])[:SHOWN_WORDS]:
            falls = (f"{word} {-fall:+.4f}" for word, fall in most)
            lines.append(f"          without the word: {', '.join(falls)}")
        show("\n".join(lines))
