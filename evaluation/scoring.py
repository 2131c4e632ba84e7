"""Score a model on the files of a run, and publish the results of the run."""

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from dataset import Data, Split
from evaluation import tables
from evaluation.importance import word_importance
from evaluation.metrics import Score
from evaluation.predictions import FILES, Options, predict_file
from model.predictions import Predictions
from runtime.batches import TextRows
from runtime.files import read_json, write_text
from runtime.output_folder import OutputFolder
from runtime.record import peak_memory_bytes

logger = logging.getLogger(__name__)


def score(
    classify: Callable[[Split], torch.Tensor],
    data: Data,
    multi_label: bool,
    output: OutputFolder,
    options: Options,
    explain: bool = True,
) -> dict:
    """Predict the validation and the test file, and score them; the test file may have no labels.

    Writes the predictions and evaluation.json; returns the figures for all_results.json. classify:
    rows -> logits, float32 [N, C]. explain: compute which words the most confident mistakes depend
    on; `classify` is then called with other texts.
    """
    figures, details = {}, {}
    for name, file in data.files().items():
        if name == "train":
            continue
        total, start = Score(multi_label, options.reject_below), time.perf_counter()
        rows = predict_file(
            classify,
            [file] if isinstance(file, Split) else log_progress(file, len(file)),
            file.columns,
            output.staging / FILES[name],
            data.names,
            multi_label,
            options,
            partial(add_rows, total, data, name),
        )
        if name == "test":
            figures["predict_samples_per_second"] = rows / (time.perf_counter() - start)
        if total.rows:
            figures |= total.results(name)
            details[name] = total.details()
            if explain:
                add_words(details[name]["mistakes"], classify, multi_label)
    if details:
        output.write_json("evaluation.json", {"labels": data.names, **details})
    return figures


def add_rows(total: Score, data: Data, name: str, chunk: Split, predictions: Predictions) -> None:
    """Score rows of a file, if they have labels."""
    if chunk.labels is not None:
        seen = data.seen(name, chunk.keys)
        total.add(predictions, chunk.label_ids, chunk.texts, chunk.keys, seen)


def add_words(
    mistakes: list[dict], classify: Callable[[TextRows], torch.Tensor], multi_label: bool
) -> None:
    """Add to mistakes the words that they depend on."""
    importance = word_importance(classify, [mistake["text"] for mistake in mistakes], multi_label)
    for mistake, words in zip(mistakes, importance, strict=True):
        mistake["words"] = [(word, round(value, 4)) for word, value in words]


def log_progress(chunks: Iterable[Split], total: int) -> Iterator[Split]:
    """Yield the chunks of a file, and log the speed while rows are left."""
    start, done = time.perf_counter(), 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        speed = done / (time.perf_counter() - start)
        if done < total:
            left = (total - done) / speed
            logger.info("%d of %d rows: %.0f rows/s, %.0f s left", done, total, speed, left)


def publish(
    output: OutputFolder, record: dict, results: dict, keep_checkpoints: bool = False
) -> None:
    """Write figures, model card and report, publish the run's files and print the summary."""
    results["peak_memory_bytes"] = peak_memory_bytes()
    output.write_json("all_results.json", results)
    trained, evaluation = "train_runtime" in results, output.staging / "evaluation.json"
    if trained or evaluation.exists():
        from evaluation import pages  # matplotlib takes time, which a mere prediction need not

        if trained:
            write_text(output.staging / "README.md", pages.render_card(record, results))
        if evaluation.exists():
            details = read_json(evaluation)
            page = pages.render_run(record, results, details, output.read_metrics())
            write_text(output.staging / "report.html", page)
    output.publish(record, keep_checkpoints)
    show(tables.summary(record, results, output.path))


def show(text: str) -> None:
    """Print, tolerating a limited encoding and a closed pipe."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in Jupyter, which prints any character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - else the interpreter fails at exit
