"""Label the rows of an uploaded CSV file, as `main.py --do_predict` does, byte for byte."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dataset import CHUNK_ROWS, open_table, read_chunks
from evaluation.predictions import check_added, predict_file
from runtime.batches import TextRows
from runtime.file_format import FileFormat
from runtime.files import UserError
from runtime.flags import column_names, encoding
from serving.models import Model
from serving.uploads import CsvOptions

CHECKS = {
    "text_column_names": lambda text: tuple(column_names(text)),
    "column_names": lambda text: tuple(column_names(text)),
    "csv_encoding": encoding,
}


def predict_csv(
    classify: Callable[[TextRows], torch.Tensor], model: Model, path: Path, wanted: CsvOptions
) -> tuple[Path, int]:
    """Predict each row. Labels in `path` are not used.

    Returns the new file, in the same folder, and the number of malformed rows that were dropped.

    classify: rows -> logits [N, C].
    Raises: UserError for a bad file, which it calls "the file"; OSError if it cannot be stored.
    """
    output = path.with_name("predictions.csv")
    try:
        table = open_table(path, wanted_format(model.form, wanted), labels_required=None)
        check_added(str(path), table.header, model.labels)
        chunks = filter(len, read_chunks(table, CHUNK_ROWS, labels_required=None))
        facts = table.header, output, model.labels, model.multi_label
        if not predict_file(classify, chunks, *facts):
            raise UserError(f"{path}: every text is blank")
    except UserError as error:
        if isinstance(error.__context__, OSError):  # of writing: the disk is full
            raise error.__context__ from None
        raise UserError(str(error).replace(str(path), "the file")) from None
    return output, table.malformed


def wanted_format(form: FileFormat, wanted: CsvOptions) -> FileFormat:
    """Return how to read the file: as a request says, else as the model. Raises: UserError."""
    options = wanted.model_dump(exclude={"model"}, exclude_none=True)
    for name in CHECKS.keys() & options.keys():
        try:  # as the command line does with the flag
            options[name] = CHECKS[name](options[name])
        except ArgumentTypeError as error:
            raise UserError(f"{name}: {error}") from None
    encoding_name = options.pop("csv_encoding", None)
    return replace(form, **options, flag_form="{}={}").in_encoding(encoding_name)
