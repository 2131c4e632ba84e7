"""CSV files: store the one of a request as it arrives, and label its rows.

The answer has the bytes that `main.py --do_predict` writes.
"""

import asyncio
import logging
import shutil
from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from dataset import CHUNK_ROWS, open_table, read_chunks
from evaluation.predictions import check_added, predict_file
from runtime.batches import TextRows
from runtime.file_format import FileFormat
from runtime.files import UserError, plural
from runtime.flags import DELIMITERS, column_names, encoding
from serving.models import Model

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # no line for each broken form
MOST_PARTS = 10  # files of a form, and as many fields, that are read before it is rejected
CHECKS = {  # as of the command line's flags
    "text_column_names": lambda text: tuple(column_names(text)),
    "column_names": lambda text: tuple(column_names(text)),
    "csv_encoding": encoding,
}


class CsvOptions(BaseModel, extra="forbid"):
    """What /v1/predict_csv takes beside the file, as query parameters or fields of a form."""

    model: str | None = None
    text_column_names: str | None = Field(None, description="Comma-separated; else the model's.")
    column_names: str | None = Field(None, description="Comma-separated, if there is no header.")
    delimiter: Literal[tuple(DELIMITERS)] | None = Field(None, description="Else by the header.")
    quoting: Literal["minimal", "none"] | None = None
    csv_encoding: str | None = Field(None, description="Else UTF-8, or that of the model.")
    drop_empty: bool = Field(False, description="Leave out rows without a text.")
    drop_malformed: bool = Field(False, description="Leave out rows that cannot be read.")

    def complete(self, form: FileFormat) -> FileFormat:
        """Return how to read the file: as the options say, else as the model. Raises: UserError."""
        options = self.model_dump(exclude={"model"}, exclude_none=True)
        for name in CHECKS.keys() & options.keys():
            try:
                options[name] = CHECKS[name](options[name])
            except ArgumentTypeError as error:
                raise UserError(f"{name}: {error}") from None
        encoding_name = options.pop("csv_encoding", None)
        return replace(form, **options, flag_form="{}={}").in_encoding(encoding_name)


FORM = CsvOptions.model_json_schema() | {"required": ["file"]}
FORM["properties"] |= {"file": {"type": "string", "format": "binary"}}
CSV_BODY = {  # for OpenAPI
    "required": True,
    "content": {"text/csv": {}, "multipart/form-data": {"schema": FORM}},
}


def rejected(why: str) -> HTTPException:
    """Return an error whose advice works for every CSV file."""
    return HTTPException(422, f"{why}; send one CSV file: curl -F file=@FILE URL")


async def store_upload(request: Request, path: Path) -> CsvOptions:
    """Write the CSV file of a request to `path`; returns the options of the query and the form.

    Raises: HTTPException; RequestValidationError for a field that does not fit; OSError if the file
        cannot be stored; ClientDisconnect.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        raise rejected("this endpoint takes no JSON")
    store = store_form if kind == "multipart/form-data" else store_body
    pairs = [*request.query_params.multi_items(), *await store(request, path)]
    if len(dict(pairs)) < len(pairs):
        raise HTTPException(422, "an option is given twice: leave one out")
    try:
        return CsvOptions.model_validate(dict(pairs))
    except ValidationError as error:  # FastAPI has checked the query
        errors = [entry | {"loc": ("form", *entry["loc"])} for entry in error.errors()]
        raise RequestValidationError(errors) from None


async def store_body(request: Request, path: Path) -> list[tuple[str, str]]:
    """Write the body to a file; returns no options."""
    start, has_lines = b"", False
    with open(path, "wb") as file:
        async for chunk in request.stream():
            start = start or chunk[:200]
            has_lines = has_lines or b"\n" in chunk or b"\r" in chunk
            await asyncio.to_thread(file.write, chunk)
    if start.startswith(b"--") and b"form-data" in start:
        raise rejected("the body is a form, but the header content-type does not say so")
    if start and not has_lines:  # curl -d removes them
        raise rejected("the file has no line breaks")
    return []


async def store_form(request: Request, path: Path) -> list[tuple[str, str]]:
    """Write the only file of a form to `path`; returns the fields, which are options."""
    is_whole = asyncio.Event()
    async with aclosing(request.stream()) as body:
        parser = MultiPartParser(request.headers, body, max_files=MOST_PARTS, max_fields=MOST_PARTS)
        parser.on_end = is_whole.set  # it ignores that a form is cut off
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise rejected(f"the form cannot be read ({error.message.rstrip('.')})") from None
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not is_whole.is_set():
            raise rejected("the form is cut off: its last boundary is missing")
        if len(files) != 1:
            raise rejected(f"the form has {plural(len(files), 'file')}")
        with open(path, "wb") as copy:
            await asyncio.to_thread(shutil.copyfileobj, files[0].file, copy)
    finally:
        await form.close()
    return [(name, value) for name, value in form.multi_items() if isinstance(value, str)]


def predict_csv(
    classify: Callable[[TextRows], torch.Tensor], model: Model, path: Path, options: CsvOptions
) -> tuple[Path, int]:
    """Predict each row. Labels in `path` are not used.

    Returns the new file, in the same folder, and the number of malformed rows that were dropped.

    classify: rows -> logits [N, C].
    Raises: UserError for a bad file, which it calls "the file"; OSError if it cannot be stored.
    """
    output = path.with_name("predictions.csv")
    try:
        form = replace(options.complete(model.form), label_column_name=())  # labels are not used
        table = open_table(path, form, needs_labels=False)
        check_added(str(path), table.header, model.labels)
        chunks = filter(len, read_chunks(table, CHUNK_ROWS, needs_labels=False))
        facts = table.header, output, model.labels, model.multi_label
        if not predict_file(classify, chunks, *facts):
            raise UserError(f"{path}: every text is blank")
    except UserError as error:
        if isinstance(error.__context__, OSError):  # of writing: the disk is full
            raise error.__context__ from None
        raise UserError(str(error).replace(str(path), "the file")) from None
    return output, table.malformed
