"""Baselines that tune no BERT, scored like the tuned models: same splits, metrics and files.

    .venv/bin/python -m script.baseline METHOD [data flags of main.py] --output_dir DIR

majority: the label frequencies of the training file; if they are balanced, the validation file
decides which label is the most frequent. lookup: the labels of the same text in the training file;
for unseen texts as majority. The others are logistic regression on these features; the validation
file chooses its regularisation strength. tfidf: TF-IDF of words and pairs of words; characters: the
same, and TF-IDF of 2 to 5 characters within words; embeddings: the mean of the frozen backbone's
last states (--model_name_or_path); combined: all of these. tfidf-svm, characters-svm and so on:
a linear support vector machine on the same features, whose margins calibration turns into
probabilities.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import LinearSVC
from torch import nn

import dataset
from arguments import parse_args
from evaluation.calibration import Calibration, calibrate
from evaluation.metrics import compute_metrics
from evaluation.predictions import Options, check_columns
from evaluation.scoring import publish, score
from model.classifier import predict
from model.folders import ModelFolders, locate, sha256_of
from model.loading import load_tokenizer, set_max_seq_length
from model.methods import TUNING
from model.predictions import Predictions, to_logits
from model.source import read_model_config
from runtime.batches import encode, rows_of
from runtime.columns import fill_format
from runtime.file_format import SETTINGS as READING
from runtime.file_format import FileFormat
from runtime.files import UserError, help_or_run
from runtime.flags import fill, unused_flag
from runtime.machine import Machine, pick_machine, set_up_process
from runtime.output_folder import opened
from runtime.record import describe_run

FEATURES = {  # of the linear models
    "tfidf": ("words",),
    "characters": ("words", "characters"),
    "embeddings": ("embeddings",),
    "combined": ("words", "characters", "embeddings"),
}
SVM = "-svm"
LINEAR = (*FEATURES, *(f"{name}{SVM}" for name in FEATURES))
METHODS = ("majority", "lookup", *LINEAR)
WEIGHTS = {"embeddings": 2}  # beside two TF-IDF vectors of length 1
SETTINGS = (  # flags of main.py that apply to baselines
    *READING,
    *"train_file validation_file test_file label_names problem_type output_dir".split(),
    *"max_train_samples seed model_name_or_path safe_csv reject_below".split(),
)
# C, the inverse of regularisation: dense embeddings may need little, and TF-IDF much.
STRENGTHS = (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
SVM_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10)
SMOOTHING = 0.01  # pseudo-rows of the label frequencies in each look-up: no probability is 0
TIE = 1e-6  # weight of the validation file's label frequencies: they only break ties
ABSENT = -20.0  # logit of a label without a training row, below the lowest of the others

Embed = Callable[[list[str]], np.ndarray]  # N texts -> embeddings, float32 [N, HD]
Classify = Callable[[dataset.Split], torch.Tensor]  # split -> logits, float32 [N, C]
Built = tuple[dict, dict, Classify, dict]  # settings and model of `describe_run`, and its figures


def fit_lookup(data: dataset.Data, use_texts: bool) -> Classify:
    """Return a look-up of the labels of the same training text; for others, label frequencies.

    use_texts: otherwise it predicts the frequencies for every text.
    """
    multi_label = data.train.label_ids.ndim == 2
    one_hot, validation = (
        split.label_ids if multi_label else np.eye(len(data.names))[split.label_ids]
        for split in (data.train, data.eval)
    )
    share = (one_hot.mean(axis=0) + TIE * validation.mean(axis=0)) / (1 + TIE)
    same_text: dict[str, list[np.ndarray]] = {}
    for key, labels in zip(data.train.keys, one_hot, strict=True) if use_texts else ():
        same_text.setdefault(key, []).append(labels)
    table = {
        key: (np.sum(rows, axis=0) + SMOOTHING * share) / (len(rows) + SMOOTHING)
        for key, rows in same_text.items()
    }

    def classify(split: dataset.Split) -> torch.Tensor:
        keys = map(dataset.text_key, split.texts)
        return to_logits(np.stack([table.get(key, share) for key in keys]), multi_label)

    return classify


def features_of(method: str) -> tuple[str, ...]:
    """Return the features of a linear model; none for other baselines."""
    return FEATURES.get(method.removesuffix(SVM), ())


def embedder(source: ModelFolders, machine: Machine, batch_size: int = 64) -> Embed:
    """Return a function that maps texts to the mean of the backbone's last states, of length 1.

    As in Sentence-BERT (Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084).
    Raises: UserError if the backbone is not usable.
    """
    config, _ = read_model_config(source)
    set_max_seq_length(config, min(128, config.max_position_embeddings))
    config.pooling = TUNING["probe"].pooling
    tokenizer = load_tokenizer(source.backbone, config)
    model = TUNING["probe"].build(source, config, fresh_head=True).requires_grad_(False)
    model.classifier, model.config.num_labels = nn.Identity(), config.hidden_size
    machine.place(model)

    def embed(texts: list[str]) -> np.ndarray:
        data = encode(tokenizer, rows_of(texts), config.max_seq_length)
        found = predict(model, data, batch_size, machine)
        return nn.functional.normalize(found).numpy()

    return embed


def vectorizer(
    parts: tuple[str, ...], texts: list[str], source: ModelFolders | None
) -> FeatureUnion:
    """Build the features `parts`, float32; source: the backbone of embeddings.

    Raises: UserError if they need words and no text has one.
    """
    options = {"sublinear_tf": True, "dtype": np.float32}
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **options)
    if "words" in parts and not any(map(words.build_analyzer(), texts)):
        raise UserError("no text in the training file contains a word: use another baseline")
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **options)
    features = {"words": words, "characters": characters}
    if source:
        features["embeddings"] = FunctionTransformer(embedder(source, pick_machine("auto")))
    weights = {name: weight for name, weight in WEIGHTS.items() if name in parts}
    return FeatureUnion([(name, features[name]) for name in parts], transformer_weights=weights)


def fit_linear(
    method: str, data: dataset.Data, source: ModelFolders | None
) -> tuple[Classify, dict]:
    """Fit a linear model with each strength; return the one with the best validation accuracy.

    source: the backbone of embeddings. Also returns the chosen strength.
    Raises: UserError if the training rows have a single label.
    """
    texts, label_ids, classes = data.train.texts, data.train.label_ids, len(data.names)
    multi_label = label_ids.ndim == 2
    if not multi_label and len(set(label_ids)) < 2:
        raise UserError(
            f"{data.train.path}: the {len(texts)} rows drawn have one label: raise "
            "--max_train_samples"
        )
    features = vectorizer(features_of(method), texts, source)
    vectors, validation = features.fit_transform(texts), features.transform(data.eval.texts)
    if method.endswith(SVM):
        model, strengths = LinearSVC(random_state=0, max_iter=10_000), SVM_STRENGTHS
    else:  # from each strength to the next, Newton's method needs few steps even for many labels
        model = LogisticRegression(solver="newton-cg", warm_start=True, max_iter=1000)
        strengths = STRENGTHS

    def logits(model: ClassifierMixin, vectors) -> torch.Tensor:
        margins = model.decision_function(vectors)
        if margins.ndim == 1:  # of two labels, the second's
            margins = np.stack([0 * margins, margins], axis=1)
        columns = np.repeat(margins.min(axis=1, keepdims=True) + ABSENT, classes, axis=1)
        columns[:, model.classes_] = margins
        return torch.from_numpy(columns).float()

    best = -1.0, model, 0.0  # accuracy, model, strength
    for strength in strengths:
        model.set_params(C=strength)
        fitted = OneVsRestClassifier(model) if multi_label else model
        fitted.fit(vectors, label_ids)
        predictions = Predictions.from_logits(logits(fitted, validation), multi_label)
        accuracy = compute_metrics(predictions, data.eval.label_ids)["accuracy"]
        if accuracy > best[0]:
            best = accuracy, copy.deepcopy(fitted), strength
    _, fitted, strength = best
    return lambda split: logits(fitted, features.transform(split.texts)), {"C": strength}


def parse(argv: list[str]) -> tuple[str, Namespace]:
    """Split a command line into method and arguments.

    Raises: UserError for an unknown method or a useless flag.
    """
    if not argv or argv[0] not in METHODS:
        raise UserError(f"first name the method, one of {', '.join(METHODS)} (see --help)")
    useful = {f"--{name}" for name in (*SETTINGS, "overwrite_output_dir")}
    if not any(word.startswith("--max_train_samples") for word in argv):
        useful.remove("--seed")  # which only draws these rows
    if "embeddings" not in features_of(argv[0]):
        useful.remove("--model_name_or_path")
    if unused := unused_flag(argv, useful):
        raise UserError(f"{unused} has no effect on a baseline: omit it")
    return argv[0], parse_args(["--do_train", "--do_eval", "--do_predict", *argv[1:]])


def run(argv: list[str]) -> None:
    """Fit a baseline, score it and publish the results."""
    method, args = parse(argv)
    set_up_process()
    form = fill_format(vars(args))
    fill(vars(args), {"text_column_delimiter": form.text_column_delimiter})
    settings = {name: getattr(args, name) for name in SETTINGS}

    def build(data: dataset.Data) -> Built:
        model = {"backbone": method, "weights_sha256": None, "method": f"baseline {method}"}
        if method not in LINEAR:
            return settings, model, fit_lookup(data, method == "lookup"), {}
        source = None
        if "embeddings" in features_of(method):
            source = locate(args.model_name_or_path)
            model |= {"backbone": source.name, "weights_sha256": sha256_of(source.all)}
        return settings, model, *fit_linear(method, data, source)

    score_and_publish(args, form, build, calibrated=method in LINEAR)


def score_and_publish(
    args: Namespace,
    form: FileFormat,
    build: Callable,
    names: list[str] | None = None,
    calibrated: bool = True,
    explain: bool = True,
) -> None:
    """Score a model that is not tuned here, and publish the results, as `main.run` does.

    build: `dataset.Data` -> `Built`. names: the labels, if not those of the training file.
    explain: see `score`.
    """
    with opened(args.output_dir, args.overwrite_output_dir) as output:
        files = {"train": args.train_file, "eval": args.validation_file}
        splits = dataset.read_splits(files, form)
        names = names or dataset.label_names(splits["train"], args.label_names)
        sample = {"max_train_samples": args.max_train_samples, "seed": args.seed}
        data = dataset.prepare(form, splits, names, args.test_file, **sample)
        check_columns(data, args.reject_below)
        settings, model, classify, results = build(data)
        record = describe_run(settings, model, names, data.describe())
        output.start(record)
        calibration, figures = Calibration(), {}
        if calibrated:
            calibration, figures = calibrate(classify(data.eval)[None], data)
        results = data.count_rows() | results | figures

        def logits(split: dataset.Split) -> torch.Tensor:
            return calibration(classify(split))

        options = Options(args.safe_csv, args.reject_below)
        results |= score(logits, data, form.multi_label, output, options, explain)
        publish(output, record, results)


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    return help_or_run(__doc__, run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
