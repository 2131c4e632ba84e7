"""Label the rows of an uploaded CSV file, as `main.py --do_predict` does, byte for byte."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch

from dataset import CHUNK_ROWS, read_chunks
from evaluation.predictions import check_added, prediction_writer
from model.predictions import Predictions
from runtime.batches import TextRows
from runtime.files import UserError
from runtime.flags import column_names
from serving.models import Model


def predict_csv(
    classify: Callable[[TextRows], torch.Tensor],
    model: Model,
    content: bytes,
    folder: Path,
    columns: str | None,
    encoding: str,
) -> Path:
    """Predict each row; returns the file, in `folder`.

    classify: rows -> logits [N, C]. columns: the text columns, separated by commas [the model's].
    Raises: UserError for a bad file, which it calls "the file"; OSError if it cannot be stored.
    """
    path, output = folder / "upload.csv", folder / "predictions.csv"
    path.write_bytes(content)
    try:
        names = split_names(columns) if columns else model.columns["text_column_names"]
        options = {"text_columns": names, "encoding": check_encoding(encoding)}
        options |= {"delimiter": model.columns["text_column_delimiter"]}
        options |= {"labels_required": False, "multi_label": model.multi_label}
        chunks = read_chunks(path, size=CHUNK_ROWS, **options)
        first = next(chunks)
        check_added(str(path), first.columns, model.labels)
        with prediction_writer(output, first.columns, model.labels) as write:
            for chunk in chain([first], chunks):
                write(chunk.table, Predictions.of(classify(chunk), model.multi_label))
    except UserError as error:
        if isinstance(error.__context__, OSError):  # of `prediction_writer`: the disk is full
            raise error.__context__ from None
        raise UserError(str(error).replace(str(path), "the file")) from None
    return output


def split_names(columns: str) -> list[str]:
    """Split column names at the commas. Raises: UserError if one is empty or there twice."""
    try:
        return column_names(columns)
    except ArgumentTypeError as error:
        raise UserError(str(error)) from None


def check_encoding(name: str) -> str:
    """Return the name of an encoding of text. Raises: UserError if there is none of that name."""
    try:
        b"a".decode(name)
    except (LookupError, ValueError):
        raise UserError("there is no such csv_encoding") from None
    return name
