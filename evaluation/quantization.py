"""Check that a model predicts as well in 8 bits as it did before, on its validation file."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dataset import Split, read_split
from evaluation.intervals import NORMAL
from evaluation.predictions import FILES
from model.predictions import Predictions, to_logits
from model.sequence_classification import classification_loss
from runtime.columns import remembered_settings
from runtime.file_format import FileFormat
from runtime.files import UserError
from runtime.record import RUN_FILE, read_record

logger = logging.getLogger(__name__)

FEWEST, MOST = 100, 1000  # rows to compare: enough to tell, and no more than take a second or two
NEGLIGIBLE = 0.002  # a fall in accuracy, or a rise in log loss, that nobody minds


def check_int8(
    classify: Callable[[Split], torch.Tensor], folder: Path, labels: list[str], multi_label: bool
) -> None:
    """Compare predictions in 8 bits with those that a model folder has of its validation file.

    Logs both differences with their 95 % intervals over distinct texts, and the share of equal
    labels. classify: rows -> logits, float32 [N, C]. labels: the C labels.
    Raises: UserError if accuracy falls, or log loss rises, by more than chance and `NEGLIGIBLE`
        explain, or if the folder has too few predictions.
    """
    path = folder / FILES["eval"]
    if not path.is_file():
        raise UserError(
            f"--int8: {folder} has no {path.name} to compare with; train it with --do_eval, or "
            "omit --int8"
        )
    if read_record(folder / RUN_FILE).get("settings", {}).get("safe_csv"):
        raise UserError(f"--int8: --safe_csv has changed the texts in {path}: omit --int8")
    form = FileFormat.from_settings(remembered_settings(folder)).written_here()
    split = read_split(path, replace(form, multi_label=multi_label))
    split = split.sample(MOST, seed=0).number_labels(labels)
    if len(set(split.keys)) < FEWEST:
        raise UserError(f"--int8: {path} has fewer than {FEWEST} texts: omit --int8")
    columns = [f"probability_{name}" for name in labels]
    probability = split.table[columns].to_numpy(np.float32, copy=True)
    logits = to_logits(probability, multi_label), classify(split)
    before, after = (Predictions.from_logits(x, multi_label) for x in logits)
    truth = torch.from_numpy(split.label_ids)
    losses = [classification_loss(x, truth, by_row=True).numpy() for x in logits]
    right = after.is_right(split.label_ids).astype(float) - before.is_right(split.label_ids)
    fall, least_fall = interval(-right, split.keys)
    rise, least_rise = interval(losses[1] - losses[0], split.keys)
    equal = after.is_right(before.label).mean()
    message = (
        f"int8: {100 * equal:.2f} % of {len(split)} labels of {path} stay the same; accuracy "
        f"{-100 * fall:+.2f} points (95 %: {-100 * (2 * fall - least_fall):+.2f} to "
        f"{-100 * least_fall:+.2f}), log loss {rise:+.4f} ({least_rise:+.4f} to "
        f"{2 * rise - least_rise:+.4f})"
    )
    if max(least_fall, least_rise) > NEGLIGIBLE:
        raise UserError(f"{message}: omit --int8")
    logger.info(message)


def interval(differences: np.ndarray, keys: list[str]) -> tuple[float, float]:
    """Return the mean difference of rows, float [N], and the lower end of its 95 % interval.

    Rows with the same key are one case.
    """
    mean = differences.mean()
    sums = pd.Series(differences - mean).groupby(np.array(keys, dtype=object)).sum()
    return float(mean), float(mean - NORMAL * math.sqrt((sums**2).sum()) / len(differences))
