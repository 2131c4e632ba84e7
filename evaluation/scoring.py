"""Score a model on the files of a run, and publish the results of the run."""

import io
import logging
import os
import sys
import time
from collections.abc import Callable

import torch

from dataset import Data, Split
from evaluation import tables
from evaluation.importance import word_importance
from evaluation.metrics import Score
from evaluation.predictions import FILES, Options, predict_file
from model.predictions import Predictions
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
    scores: dict[str, Score] = {}
    figures, start = {}, time.perf_counter()
    for name, file in data.files().items():
        if name == "train":
            continue
        start, done = time.perf_counter(), 0

        def use(
            chunk: Split,
            predictions: Predictions,
            name: str = name,
            file=file,
            start: float = start,
        ) -> None:
            nonlocal done
            if chunk.labels is not None:
                seen = data.seen(name, chunk.keys)
                total = scores.setdefault(name, Score(multi_label, options.reject_below))
                total.add(predictions, chunk.label_ids, chunk.texts, chunk.keys, seen)
            done += len(chunk)
            if name == "test":
                figures["predict_samples_per_second"] = log_speed(done, len(file), start)

        chunks = [file] if isinstance(file, Split) else file
        path = output.staging / FILES[name]
        predict_file(classify, chunks, file.columns, path, data.names, multi_label, options, use)
    if scores:
        details = {name: total.details() for name, total in scores.items()}
        for mistakes in (part["mistakes"] for part in details.values() if explain):
            texts = [mistake["text"] for mistake in mistakes]
            importance = word_importance(classify, texts, multi_label)
            for mistake, words in zip(mistakes, importance, strict=True):
                mistake["words"] = [(word, round(value, 4)) for word, value in words]
        output.write_json("evaluation.json", {"labels": data.names, **details})
    for name, total in scores.items():
        figures |= total.results(name)
    return figures


def log_speed(done: int, total: int, start: float) -> float:
    """Return the rows per second since `start`; log progress while rows are left."""
    speed = done / (time.perf_counter() - start)
    if done < total:
        left = (total - done) / speed
        logger.info("%d of %d rows: %.0f rows/s, %.0f s left", done, total, speed, left)
    return speed


def publish(
    output: OutputFolder, record: dict, results: dict, keep_checkpoints: bool = False
) -> None:
    """Write figures, model card and report, publish the run's files and print the summary."""
    results["peak_memory_bytes"] = peak_memory_bytes()
    output.write_json("all_results.json", results)
    if "train_runtime" in results or (output.staging / "evaluation.json").exists():
        write_pages(output, record, results)
    output.publish(record, keep_checkpoints)
    show(tables.summary(record, results, output.path))


def write_pages(output: OutputFolder, record: dict, results: dict) -> None:
    """Write the model card of a trained model, and the report of a scored one."""
    from evaluation import pages  # matplotlib takes time, which a mere prediction need not

    if "train_runtime" in results:
        write_text(output.staging / "README.md", pages.render_card(record, results))
    if (output.staging / "evaluation.json").exists():
        details = read_json(output.staging / "evaluation.json")
        page = pages.render_run(record, results, details, output.read_metrics())
        write_text(output.staging / "report.html", page)


def show(text: str) -> None:
    """Print, tolerating a limited encoding and a closed pipe."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in Jupyter, which prints any character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - else the interpreter fails at exit
