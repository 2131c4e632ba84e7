"""Baselines that cost seconds, beside the tuned models: same splits, same metrics, same files.

    .venv/bin/python -m script.baseline METHOD [flags of main.py about data] --output_dir DIR

majority: how often each label occurs; where the training file is balanced, the validation file
says which is the most frequent. lookup: a dictionary of the training texts, else as majority.
tfidf: words and pairs of words, weighted, and logistic regression; its strength of regularisation
is chosen by the validation file.
"""

import logging
import sys
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline

import dataset
from arguments import parse_args
from evaluation.metrics import compute_metrics
from main import publish, score
from runtime import record
from runtime.csv_reader import DataError
from runtime.output_folder import OutputFolder
from runtime.record import OutputError

USED = (  # settings of main.py that have a meaning here
    "train_file", "validation_file", "test_file", "text_column_names", "text_column_delimiter",
    "label_column_name", "problem_type", "csv_encoding", "drop_empty", "output_dir",
)  # fmt: skip
STRENGTHS = (0.3, 1, 3, 10, 30, 100)  # C, the inverse of regularisation
SMOOTHING = 0.01  # rows of the majority's that a look-up adds, so that nothing is impossible
TIE = 1e-6  # weight of the validation file's shares, where the training file is balanced

Probabilities = Callable[[list[str]], np.ndarray]  # of N texts: [N, C]


def majority(share: np.ndarray) -> Probabilities:
    """The share of each label, [C], whatever the text."""
    return lambda texts: np.tile(share, (len(texts), 1))


def lookup(texts: list[str], hot: np.ndarray, share: np.ndarray) -> Probabilities:
    """The labels, [N, C] of 0 and 1, that the same text has in training, else `share`."""
    found: dict[str, list[np.ndarray]] = {}
    for text, labels in zip(texts, hot, strict=True):
        found.setdefault(dataset.text_key(text), []).append(labels)
    table = {
        key: (np.sum(rows, axis=0) + SMOOTHING * share) / (len(rows) + SMOOTHING)
        for key, rows in found.items()
    }
    return lambda texts: np.stack([table.get(dataset.text_key(text), share) for text in texts])


def tfidf(texts: list[str], labels: np.ndarray, strength: float) -> Probabilities:
    """TF-IDF with logistic regression. labels: see `dataset.label_ids`.

    Raises: DataError where no text holds a word.
    """
    linear = LogisticRegression(C=strength, max_iter=2000)
    if labels.ndim == 2:
        linear = OneVsRestClassifier(linear)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    if not any(map(words.build_analyzer(), texts)):
        raise DataError("no text of the training file holds a word: there is no TF-IDF")
    return make_pipeline(words, linear).fit(texts, labels).predict_proba


def to_logits(probability: np.ndarray, multi_label: bool) -> torch.Tensor:
    """The logits whose softmax, or sigmoid, they are: float32 [N, C]."""
    probability = torch.from_numpy(probability).double().clamp(1e-9, 1 - 1e-9)
    return (probability.logit() if multi_label else probability.log()).float()


def fit(
    method: str, splits: dict, labels: dict, classes: int, multi_label: bool
) -> tuple[Probabilities, dict]:
    """A fitted baseline, and what was chosen."""
    train = splits["train"].texts
    hot = {k: one if multi_label else np.eye(classes)[one] for k, one in labels.items()}
    share = (hot["train"].mean(axis=0) + TIE * hot["eval"].mean(axis=0)) / (1 + TIE)
    if method == "majority":
        return majority(share), {}
    if method == "lookup":
        return lookup(train, hot["train"], share), {}

    def accuracy(classify: Probabilities) -> float:
        logits = to_logits(classify(splits["eval"].texts), multi_label)
        return compute_metrics(logits, labels["eval"])["accuracy"]

    fitted = {c: tfidf(train, labels["train"], c) for c in STRENGTHS}
    best = max(fitted, key=lambda c: accuracy(fitted[c]))
    return fitted[best], {"C": best}


def run(method: str, args: Namespace) -> None:
    """Fit, score, publish, as `main.run_into` does."""
    multi_label = args.problem_type == "multi_label_classification"
    with OutputFolder(args.output_dir, args.overwrite_output_dir) as output:
        splits = dataset.read_splits(args)
        names = dataset.label_names(splits["train"])
        labels = {k: dataset.label_ids(split, names, multi_label) for k, split in splits.items()}
        known = dataset.audit(splits["train"])
        stream = dataset.open_stream(args, names, known)
        output.check_columns(args.test_file, stream.columns, names)
        files = {**splits, "test": stream}
        described = {name: file.describe() for name, file in files.items()}
        used = Namespace(**{name: getattr(args, name) for name in USED})
        about = record.about(used, method, None, names, described)
        output.start(about)
        classify, chosen = fit(method, splits, labels, len(names), multi_label)
        results = {f"{name}_rows": len(file) for name, file in files.items()} | chosen
        results |= score(
            lambda split: to_logits(classify(split.texts), multi_label),
            splits["eval"], stream, known, names, args, output,
        )  # fmt: skip
        publish(output, args, about, results)


def main(argv: list[str]) -> int:
    """Returns the exit status; 2 after one line about what the user can mend."""
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    if not argv or argv[0] not in ("majority", "lookup", "tfidf"):
        print(__doc__, file=sys.stderr)
        return 2
    given = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    if strange := sorted(given - {*USED, "overwrite_output_dir"}):
        print(f"error: --{strange[0]} does nothing to a baseline", file=sys.stderr)
        return 2
    args = parse_args(["--do_train", "--do_eval", "--do_predict", *argv[1:]])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        run(argv[0], args)
    except (DataError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
