"""Store the CSV file of a request, the body or the only file of a form, as it arrives."""

import asyncio
import logging
import shutil
from collections.abc import Iterable
from contextlib import aclosing
from pathlib import Path

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from serving.engine import ApiError, gone
from serving.schemas import CsvOptions

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # no line for each broken form
MOST_PARTS = 10  # files of a form, and as many fields, that are read before it is rejected


def rejected(why: str) -> ApiError:
    """Return an error whose advice works for every CSV file."""
    return ApiError(422, f"{why}; send one CSV file: curl -F file=@FILE URL", "validation")


async def store_upload(request: Request, path: Path, options: CsvOptions) -> CsvOptions:
    """Write the CSV file of a request to `path`.

    Returns the options of the query, and of the form if the file is in one.
    Raises: ApiError; RequestValidationError for a field that does not fit; OSError if the file
        cannot be stored.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        raise rejected("this endpoint takes no JSON")
    try:
        if kind != "multipart/form-data":
            await store_body(request, path)
            return options
        fields = await store_file(request, path)
    except ClientDisconnect:
        raise gone() from None
    return with_fields(request, fields) if fields else options


async def store_body(request: Request, path: Path) -> None:
    """Write the body to a file. Raises: ApiError if it cannot be CSV; OSError."""
    start, has_lines = b"", False
    with open(path, "wb") as file:
        async for chunk in request.stream():
            start = start or chunk[:200]
            has_lines = has_lines or b"\n" in chunk or b"\r" in chunk
            await asyncio.to_thread(file.write, chunk)
    if start.startswith(b"--") and b"form-data" in start:
        raise rejected("the body is a form, but the header content-type does not say so")
    if start and not has_lines:
        raise rejected("the file has no line breaks")


class FormParser(MultiPartParser):
    """Starlette's parser, which also tells whether the end of the form has arrived."""

    is_whole = False

    def on_end(self) -> None:
        """Note the end of the form."""
        self.is_whole = True


async def store_file(request: Request, path: Path) -> list[tuple[str, str]]:
    """Write the only file of a form to `path`; returns the fields. Raises: ApiError; OSError."""
    async with aclosing(request.stream()) as body:
        limits = {"max_files": MOST_PARTS, "max_fields": MOST_PARTS}
        parser = FormParser(request.headers, body, **limits)
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise rejected(f"the form cannot be read ({error.message.rstrip('.')})") from None
    try:
        if not parser.is_whole:
            raise rejected("the form is cut off: its last boundary is missing")
        parts = form.multi_items()
        fields = [(name, value) for name, value in parts if isinstance(value, str)]
        files = [value for _, value in parts if isinstance(value, UploadFile)]
        files = [file for file in files if file.filename or file.size]  # else none was chosen
        if not files:
            others = f", only fields: {shown(name for name, _ in fields)}" if fields else ""
            raise rejected(f"the form has no file{others}")
        if len(files) > 1:
            names = shown(file.filename for file in files)
            raise rejected(f"the form has {len(files)} files: {names}")
        with open(path, "wb") as copy:
            await asyncio.to_thread(shutil.copyfileobj, files[0].file, copy)
    finally:
        await form.close()
    return fields


def with_fields(request: Request, fields: list[tuple[str, str]]) -> CsvOptions:
    """Return the options of a request's query and form. Raises: see `store_upload`."""
    given = [*request.query_params.multi_items(), *fields]
    try:
        options = CsvOptions.model_validate(dict(given))
    except ValidationError as error:
        found = [one | {"loc": ("form", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(found) from None
    names = [name for name, _ in given]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ApiError(422, f"{twice[0]} is given twice: leave one out", "validation")
    return options


def shown(names: Iterable[str]) -> str:
    """Quote the first names, in ASCII and cut."""
    first, *more = [f"{name[:30]!a}" for name in names]
    return ", ".join([first, *more[:2]]) + (", ..." if len(more) > 2 else "")
