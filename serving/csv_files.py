"""Label the rows of an uploaded CSV file, as `main.py --do_predict` does, byte for byte."""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dataset import CHUNK_ROWS, read_chunks
from evaluation.predictions import check_added, prediction_writer
from model.predictions import Predictions
from runtime.batches import TextRows
from runtime.csv_reader import PASS_ENCODING, USE_SPLIT
from runtime.files import UserError
from runtime.flags import column_names, encoding
from serving.models import Model
from serving.schemas import CsvOptions

ADVICE = {PASS_ENCODING: "pass its encoding with --csv_encoding", USE_SPLIT: "save it with commas"}


def predict_csv(
    classify: Callable[[TextRows], torch.Tensor],
    model: Model,
    path: Path,
    wanted: CsvOptions,
) -> Path:
    """Predict each row; returns the new file, in the same folder. Labels in `path` are not used.

    classify: rows -> logits [N, C].
    Raises: UserError for a bad file, which it calls "the file"; OSError if it cannot be stored.
    """
    output = path.with_name("predictions.csv")
    try:
        names = model.columns["text_column_names"]
        if wanted.text_column_names:
            names = checked(column_names, "text_column_names", wanted.text_column_names)
        options = {"text_columns": names, "delimiter": model.columns["text_column_delimiter"]}
        options |= {"encoding": checked(encoding, "csv_encoding", wanted.csv_encoding)}
        options |= {"labels_required": False, "label_column": None}
        options |= {"drop_empty": wanted.drop_empty}
        chunks = filter(len, read_chunks(path, size=CHUNK_ROWS, **options))
        first = next(chunks, None)
        if first is None:
            raise UserError(f"{path}: every text is blank")
        check_added(str(path), first.columns, model.labels)
        with prediction_writer(output, first.columns, model.labels) as write:
            for chunk in chain([first], chunks):
                write(chunk.table, Predictions.of(classify(chunk), model.multi_label))
    except UserError as error:
        if isinstance(error.__context__, OSError):  # of `prediction_writer`: the disk is full
            raise error.__context__ from None
        raise UserError(for_client(str(error).replace(str(path), "the file"))) from None
    return output


def for_client(message: str) -> str:
    """Return a message of the command line with the advice that a client can follow."""
    for advice, other in ADVICE.items():
        message = message.replace(advice, other)
    names = "|".join(CsvOptions.model_fields)  # and no column that is called "--x"
    return re.sub(rf"--({names})\b", r"the query parameter \1", message)


def checked(kind: Callable[[str], Any], name: str, text: str) -> Any:
    """Convert a parameter as the command line converts the flag. Raises: UserError."""
    try:
        return kind(text)
    except ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from None
