"""Score a model on the files of a run, and publish the results of the run."""

import logging
import os
import sys
import time
from collections.abc import Callable

import torch

from dataset import Data, Split, seen_texts
from evaluation import tables
from evaluation.metrics import Score
from evaluation.predictions import prediction_writer
from model.predictions import Predictions
from runtime.output_folder import OutputFolder
from runtime.record import peak_memory_bytes

logger = logging.getLogger(__name__)

Classify = Callable[[Split], torch.Tensor]  # split -> logits, float32 [N, C]


def score(
    classify: Classify, data: Data, multi_label: bool, output: OutputFolder, safe_csv: bool = False
) -> dict:
    """Score the validation file; predict the test file, and score it if it has labels.

    Writes predictions.csv (safe_csv: see `prediction_writer`) and evaluation.json; returns the
    figures for all_results.json.
    """
    scores: dict[str, Score] = {}

    def add(name: str, split: Split, found: Predictions) -> None:
        keys = data.training_keys
        seen = None if keys is None else seen_texts(keys, split.keys)
        one = scores.setdefault(name, Score(multi_label))
        one.add(found, split.label_ids, split.texts, split.keys, seen)

    if data.eval is not None:
        add("eval", data.eval, Predictions.of(classify(data.eval), multi_label))
    figures = {}
    if data.test is not None:
        done, start = 0, time.perf_counter()
        path = output.staging / "predictions.csv"
        with prediction_writer(path, data.test.columns, data.names, safe_csv) as write:
            for chunk in data.test:
                found = Predictions.of(classify(chunk), multi_label)
                write(chunk.table, found)
                if data.test.labelled:
                    add("test", chunk, found)
                done += len(chunk)
                figures["predict_samples_per_second"] = log_speed(done, len(data.test), start)
    if scores:
        details = {name: one.details() for name, one in scores.items()}
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
        output.write_text("README.md", pages.render_card(record, results))
    if (output.staging / "evaluation.json").exists():
        page = pages.render_run(
            record, results, output.read_json("evaluation.json"), output.read_metrics()
        )
        output.write_text("report.html", page)


def show(text: str) -> None:
    """Print, tolerating a limited encoding and a closed pipe."""
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - else the interpreter fails at exit
