"""Baselines that take seconds, beside the tuned models: same splits, same metrics, same files.

    .venv/bin/python -m script.baseline METHOD [flags of main.py about data] --output_dir DIR

majority: how often each label occurs; if the training file is balanced, the validation file says
which label is the most frequent. lookup: a dictionary of the training texts, otherwise as majority.
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
from evaluation.predictions import Predictions, check_columns
from evaluation.scoring import publish, score
from runtime.files import UserError
from runtime.output_folder import opened
from runtime.record import describe_run

METHODS = ("majority", "lookup", "tfidf")
SETTINGS = (  # of main.py that mean something here
    "train_file validation_file test_file text_column_names text_column_delimiter "
    "label_column_name problem_type csv_encoding drop_empty output_dir"
).split()
STRENGTHS = (0.3, 1, 3, 10, 30, 100)  # C, the inverse of regularisation
SMOOTHING = 0.01  # rows of the majority's that a look-up adds, so that nothing is impossible
TIE = 1e-6  # weight of the validation file's shares, for a balanced training file

Probabilities = Callable[[list[str]], np.ndarray]  # of N texts: [N, C]


def majority(share: np.ndarray) -> Probabilities:
    """The share of each label, [C], whatever the text."""
    return lambda texts: np.tile(share, (len(texts), 1))


def lookup(texts: list[str], one_hot: np.ndarray, share: np.ndarray) -> Probabilities:
    """The labels, [N, C] of 0 and 1, that the same text has in training, otherwise `share`."""
    found: dict[str, list[np.ndarray]] = {}
    for text, labels in zip(texts, one_hot, strict=True):
        found.setdefault(dataset.text_key(text), []).append(labels)
    table = {
        key: (np.sum(rows, axis=0) + SMOOTHING * share) / (len(rows) + SMOOTHING)
        for key, rows in found.items()
    }
    return lambda texts: np.stack([table.get(dataset.text_key(text), share) for text in texts])


def tfidf(texts: list[str], label_ids: np.ndarray, strength: float) -> Probabilities:
    """TF-IDF with logistic regression. Raises: UserError if no text holds a word."""
    linear = LogisticRegression(C=strength, max_iter=2000)
    if label_ids.ndim == 2:
        linear = OneVsRestClassifier(linear)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    if not any(map(words.build_analyzer(), texts)):
        raise UserError("no text of the training file holds a word: TF-IDF is impossible")
    return make_pipeline(words, linear).fit(texts, label_ids).predict_proba


def to_logits(probability: np.ndarray, multi_label: bool) -> torch.Tensor:
    """The logits whose softmax, or sigmoid, these probabilities are: float32 [N, C]."""
    probability = torch.from_numpy(probability).double().clamp(1e-9, 1 - 1e-9)
    return (probability.logit() if multi_label else probability.log()).float()


def fit(method: str, data: dataset.Data, multi_label: bool) -> tuple[Probabilities, dict]:
    """A fitted baseline, and what was chosen."""
    texts, label_ids = data.train.texts, data.train.label_ids
    one_hot, validation = (
        split.label_ids if multi_label else np.eye(len(data.names))[split.label_ids]
        for split in (data.train, data.eval)
    )
    share = (one_hot.mean(axis=0) + TIE * validation.mean(axis=0)) / (1 + TIE)
    if method == "majority":
        return majority(share), {}
    if method == "lookup":
        return lookup(texts, one_hot, share), {}

    def accuracy(classify: Probabilities) -> float:
        logits = to_logits(classify(data.eval.texts), multi_label)
        found = Predictions.of(logits, multi_label)
        return compute_metrics(found, data.eval.label_ids)["accuracy"]

    fitted = {strength: tfidf(texts, label_ids, strength) for strength in STRENGTHS}
    best = max(fitted, key=lambda strength: accuracy(fitted[strength]))
    return fitted[best], {"C": best}


def run(method: str, args: Namespace) -> None:
    """Fit, score and publish, as `main.run` does."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    multi_label = args.problem_type == "multi_label_classification"
    with opened(args) as output:
        splits = dataset.read_splits(args, settings)
        data = dataset.prepare(args, settings, splits, dataset.label_names(splits["train"]))
        check_columns(data)
        model = {"backbone": method, "weights_sha256": None, "method": f"baseline {method}"}
        record = describe_run(settings, model, data.names, data.describe())
        output.start(record)
        classify, chosen = fit(method, data, multi_label)
        results = data.count_rows() | chosen
        results |= score(
            lambda split: to_logits(classify(split.texts), multi_label), data, multi_label, output
        )
        publish(output, record, results)


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, or 2 after a one-line error that the user can fix."""
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    if not argv or argv[0] not in METHODS:
        print(__doc__, file=sys.stderr)
        return 2
    given = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    if unused := sorted(given - {*SETTINGS, "overwrite_output_dir"}):
        print(f"error: --{unused[0]} does nothing to a baseline", file=sys.stderr)
        return 2
    args = parse_args(["--do_train", "--do_eval", "--do_predict", *argv[1:]])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        run(argv[0], args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
