"""Label the rows of an uploaded CSV file, as `main.py --do_predict` does, byte for byte."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dataset import CHUNK_ROWS, open_table, read_chunks
from evaluation.predictions import check_added, prediction_writer
from model.predictions import Predictions
from runtime.batches import TextRows
from runtime.files import UserError
from runtime.flags import column_names, encoding
from serving.models import Model


def predict_csv(
    classify: Callable[[TextRows], torch.Tensor],
    model: Model,
    content: bytes,
    folder: Path,
    columns: str | None,
    csv_encoding: str | None,
    drop_empty: bool,
) -> Path:
    """Predict each row; returns the file, in `folder`. Labels in the file are not used.

    classify: rows -> logits [N, C]. columns: the text columns, separated by commas [the model's].
    Raises: UserError for a bad file, which it calls "the file"; OSError if it cannot be stored.
    """
    path, output = folder / "upload.csv", folder / "predictions.csv"
    path.write_bytes(content)
    try:
        form = replace(model.form, label_column_name=(), drop_empty=drop_empty, flag_form="{}={}")
        if columns:
            names = checked(column_names, "text_column_names", columns)
            form = replace(form, text_column_names=tuple(names))
        if csv_encoding:
            name = checked(encoding, "csv_encoding", csv_encoding)
            form = replace(form, encodings=(name,))
        table = open_table(path, form, labels_required=False)
        chunks = filter(len, read_chunks(table, CHUNK_ROWS, labels_required=False))
        first = next(chunks, None)
        if first is None:
            raise UserError(f"{path}: every text is blank")
        check_added(str(path), table.header, model.labels)
        with prediction_writer(output, table.header, model.labels) as write:
            for chunk in chain([first], chunks):
                write(chunk.table, Predictions.of(classify(chunk), model.multi_label))
    except UserError as error:
        if isinstance(error.__context__, OSError):  # of `prediction_writer`: the disk is full
            raise error.__context__ from None
        raise UserError(str(error).replace(str(path), "the file")) from None
    return output


def checked(kind: Callable[[str], Any], name: str, text: str) -> Any:
    """Convert a parameter as the command line converts the flag. Raises: UserError."""
    try:
        return kind(text)
    except ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from None
