"""Score a model on the files of a run, and publish the results of the run."""

import io
import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager

import pandas as pd
import torch

from dataset import Data, Split, Stream
from evaluation import tables
from evaluation.importance import word_importance
from evaluation.metrics import Score
from evaluation.predictions import FILES, prediction_writer
from model.predictions import Predictions
from runtime.files import read_json, write_text
from runtime.output_folder import OutputFolder
from runtime.record import peak_memory_bytes

logger = logging.getLogger(__name__)

Classify = Callable[[Split], torch.Tensor]  # split -> logits, float32 [N, C]
Write = Callable[[pd.DataFrame, Predictions], None]  # adds rows to a file of predictions


def score(
    classify: Classify,
    data: Data,
    multi_label: bool,
    output: OutputFolder,
    args: Namespace,
    explain: bool = True,
) -> dict:
    """Predict the validation and the test file, and score them; the test file may have no labels.

    Writes the predictions (safe_csv and reject_below of the arguments: see `prediction_writer`) and
    evaluation.json; returns the figures for all_results.json. explain: compute which words the
    most confident mistakes depend on; `classify` is then called with other texts.
    """
    scores: dict[str, Score] = {}

    def add(name: str, split: Split, write: Write) -> None:
        found = Predictions.of(classify(split), multi_label)
        write(split.table, found)
        if split.labels is not None:
            seen = data.seen(name, split.keys)
            one = scores.setdefault(name, Score(multi_label, args.reject_below))
            one.add(found, split.label_ids, split.texts, split.keys, seen)

    def writer(name: str, file: Split | Stream) -> AbstractContextManager[Write]:
        path, options = output.staging / FILES[name], (args.safe_csv, args.reject_below)
        return prediction_writer(path, file.columns, data.names, *options)

    if data.eval is not None:
        with writer("eval", data.eval) as write:
            add("eval", data.eval, write)
    figures = {}
    if data.test is not None:
        done, start = 0, time.perf_counter()
        with writer("test", data.test) as write:
            for chunk in data.test:
                add("test", chunk, write)
                done += len(chunk)
                figures["predict_samples_per_second"] = log_speed(done, len(data.test), start)
    if scores:
        details = {name: one.details() for name, one in scores.items()}
        for mistakes in (one["mistakes"] for one in details.values() if explain):
            texts = [one["text"] for one in mistakes]
            words = word_importance(classify, texts, multi_label)
            for mistake, one in zip(mistakes, words, strict=True):
                mistake["words"] = [(word, round(value, 4)) for word, value in one]
        output.write_json("evaluation.json", {"labels": data.names, **details})
    for name, one in scores.items():
        figures |= one.results(name)
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
