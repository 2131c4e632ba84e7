"""Baselines that run in seconds, scored like the tuned models: same splits, metrics and files.

    .venv/bin/python -m script.baseline METHOD [data flags of main.py] --output_dir DIR

majority: the label frequencies of the training file; if they are balanced, the validation file
decides which label is the most frequent. lookup: the labels of the same text in the training file;
for unseen texts as majority. The others are logistic regression on these features; the validation
file chooses its regularisation strength. tfidf: TF-IDF of words and pairs of words; characters: the
same, and TF-IDF of 2 to 5 characters within words; embeddings: the mean of the frozen backbone's
last states (--model_name_or_path); combined: all of these.
"""

import sys
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion
from sklearn.preprocessing import FunctionTransformer

import dataset
from arguments import parse_args
from evaluation.calibration import Calibration, calibrate
from evaluation.metrics import compute_metrics
from evaluation.predictions import Predictions, check_columns
from evaluation.scoring import publish, score
from model.embeddings import embedder
from model.predictions import to_logits
from model.source import Source, locate, sha256_of
from runtime.columns import fill_columns
from runtime.files import UserError
from runtime.machine import pick_machine
from runtime.output_folder import opened
from runtime.record import describe_run
from script.command import reported

FEATURES = {  # of the methods that fit a logistic regression
    "tfidf": ("words",),
    "characters": ("words", "characters"),
    "embeddings": ("embeddings",),
    "combined": ("words", "characters", "embeddings"),
}
METHODS = ("majority", "lookup", *FEATURES)
WEIGHTS = {"embeddings": 2}  # beside two TF-IDF vectors of length 1
SETTINGS = (  # flags of main.py that apply to baselines
    "train_file validation_file test_file text_column_names text_column_delimiter "
    "label_column_name label_names problem_type csv_encoding drop_empty output_dir "
    "max_train_samples seed model_name_or_path safe_csv reject_below"
).split()
STRENGTHS = (0.3, 1, 3, 10, 30, 100)  # C, the inverse of regularisation
SMOOTHING = 0.01  # pseudo-rows of the label frequencies in each look-up: no probability is 0
TIE = 1e-6  # weight of the validation file's label frequencies: they only break ties

Probabilities = Callable[[list[str]], np.ndarray]  # N texts -> probabilities [N, C]


def majority(share: np.ndarray) -> Probabilities:
    """Predict `share`, the label frequencies [C], for every text."""
    return lambda texts: np.tile(share, (len(texts), 1))


def lookup(texts: list[str], one_hot: np.ndarray, share: np.ndarray) -> Probabilities:
    """Predict the labels (`one_hot`, [N, C]) of the same training text; if unseen, `share`."""
    found: dict[str, list[np.ndarray]] = {}
    for text, labels in zip(texts, one_hot, strict=True):
        found.setdefault(dataset.text_key(text), []).append(labels)
    table = {
        key: (np.sum(rows, axis=0) + SMOOTHING * share) / (len(rows) + SMOOTHING)
        for key, rows in found.items()
    }
    return lambda texts: np.stack([table.get(dataset.text_key(text), share) for text in texts])


def vectorizer(method: str, texts: list[str], source: Source | None) -> FeatureUnion:
    """Build the features of a method; source: the backbone of embeddings.

    Raises: UserError if it needs words and no text has one.
    """
    options = {"sublinear_tf": True}
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **options)
    parts: dict = {"words": words}
    if "words" in FEATURES[method] and not any(map(words.build_analyzer(), texts)):
        raise UserError("no text in the training file contains a word: use another baseline")
    parts["characters"] = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **options)
    if "embeddings" in FEATURES[method]:
        parts["embeddings"] = FunctionTransformer(embedder(source, pick_machine("auto")))
    used = [(name, parts[name]) for name in FEATURES[method]]
    weights = {name: weight for name, weight in WEIGHTS.items() if name in FEATURES[method]}
    return FeatureUnion(used, transformer_weights=weights)


def linear(
    features: FeatureUnion, vectors, label_ids: np.ndarray, classes: int, strength: float
) -> Probabilities:
    """Fit a logistic regression on vectors [N, F]; a label without a training row gets 0."""
    model = LogisticRegression(C=strength, max_iter=2000)
    if label_ids.ndim == 2:
        model = OneVsRestClassifier(model)
    model.fit(vectors, label_ids)

    def classify(texts: list[str]) -> np.ndarray:
        probability = np.zeros((len(texts), classes))
        probability[:, model.classes_] = model.predict_proba(features.transform(texts))
        return probability

    return classify


def fit(
    method: str, data: dataset.Data, multi_label: bool, source: Source | None
) -> tuple[Probabilities, dict]:
    """Fit a baseline; return it and the settings that the validation file chose."""
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

    classes = len(data.names)
    if not multi_label and len(set(label_ids)) < 2:
        raise UserError(
            f"{data.train.path}: the {len(texts)} rows drawn have one label: raise "
            "--max_train_samples"
        )
    features = vectorizer(method, texts, source)
    vectors = features.fit_transform(texts)
    fitted = {
        strength: linear(features, vectors, label_ids, classes, strength) for strength in STRENGTHS
    }
    best = max(fitted, key=lambda strength: accuracy(fitted[strength]))
    return fitted[best], {"C": best}


def run(method: str, args: Namespace) -> None:
    """Fit a baseline, score it and publish the results, as `main.run` does."""
    fill_columns(args)
    settings = {name: getattr(args, name) for name in SETTINGS}
    multi_label = args.problem_type == "multi_label_classification"
    with opened(args) as output:
        splits = dataset.read_splits(args, settings)
        data = dataset.prepare(
            args, settings, splits, dataset.label_names(splits["train"], args.label_names)
        )
        check_columns(data, args.reject_below)
        model = {"backbone": method, "weights_sha256": None, "method": f"baseline {method}"}
        source = None
        if "embeddings" in FEATURES.get(method, ()):
            source = locate(args.model_name_or_path)
            model |= {"backbone": source.name, "weights_sha256": sha256_of(source.folders)}
        record = describe_run(settings, model, data.names, data.describe())
        output.start(record)
        classify, chosen = fit(method, data, multi_label, source)
        results = data.count_rows() | chosen

        def logits(split: dataset.Split) -> torch.Tensor:
            return calibration(to_logits(classify(split.texts), multi_label))

        calibration = Calibration()
        if method in FEATURES:
            calibration, found = calibrate(logits(data.eval)[None], data)
            results |= found
        results |= score(logits, data, multi_label, output, args)
        publish(output, record, results)


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    if not argv or argv[0] not in METHODS:
        methods = ", ".join(METHODS)
        print(f"error: first name the method, one of {methods} (see --help)", file=sys.stderr)
        return 2
    given = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    useful = {*SETTINGS, "overwrite_output_dir"}
    if "max_train_samples" not in given:  # the seed only draws these rows
        useful.remove("seed")
    if "embeddings" not in FEATURES.get(argv[0], ()):
        useful.remove("model_name_or_path")
    if unused := sorted(given - useful):
        print(f"error: --{unused[0]} has no effect on a baseline: omit it", file=sys.stderr)
        return 2
    args = parse_args(["--do_train", "--do_eval", "--do_predict", *argv[1:]])
    return reported(run, argv[0], args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
