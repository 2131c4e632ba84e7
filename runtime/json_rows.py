"""Read JSON lines, JSON arrays of objects, and Parquet as rows of text, header first."""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from runtime.csv_rows import Bad, Dialect, Numbered, open_text
from runtime.files import UserError

BLOCK = 2**20  # bytes


def parquet_rows(path: str | Path, digest) -> Numbered | None:
    """Return header and rows of a Parquet file, or None if it is not one; digest: of hashlib.

    Raises: UserError if it is damaged, or if pyarrow is not installed.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PAR1":
            return None
    if not find_spec("pyarrow"):
        advice = "run .venv/bin/pip install pyarrow, or save it as CSV"
        raise UserError(f"{path} is a Parquet file: {advice}")
    from pyarrow import ArrowException, parquet

    try:
        content = parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{path} is a Parquet file that cannot be read: {reason}") from None

    def rows() -> Numbered:
        names = content.schema_arrow.names
        yield range(0), names
        columns = (batch.to_pydict().values() for batch in content.iter_batches())
        each = chain.from_iterable(zip(*values, strict=True) for values in columns)
        try:
            for number, row in enumerate(each, 1):
                yield range(number, number + 1), [cell(value) for value in row]
        except (ArrowException, OSError) as error:
            raise UserError(f"{path} is a damaged Parquet file: {first_line(error)}") from None
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)

    return rows()


def first_line(error: Exception) -> str:
    """Return the start of an error's text."""
    return str(error).strip().split("\n")[0][:100]


def json_rows(path: str | Path, dialect: Dialect, digest) -> Numbered | None:
    """Return header and rows of a file of JSON objects, or None if it is not one.

    The objects are the lines, or one array. The header has all their names, in the order in which
    they first occur. dialect: names the encoding. digest: of hashlib.
    Raises: UserError for JSON of another form.
    """
    objects = None
    with open_text(path, dialect) as file:
        first = file.readline(BLOCK).strip()
        if not re.match(r"\{|\[\s*(\{|\[|$)", first):
            return None
        if not isinstance(parsed(first), dict):
            objects = parsed(first + file.read())
            if objects is None:
                return None
    names: dict[str, None] = {}
    for _, value in numbered(path, dialect, objects):
        names |= dict.fromkeys(value if isinstance(value, dict) else ())
        nested = isinstance(value, dict) and all(isinstance(v, dict | list) for v in value.values())
        if nested or (objects is not None and not isinstance(value, dict)):
            advice = "with pandas, orient='records' writes them"
            raise UserError(
                f"{path} has JSON, but not one object with its fields per row: {advice}"
            )

    def rows() -> Numbered:
        yield range(0), [*names]
        for lines, value in numbered(path, dialect, objects, digest):
            fields = isinstance(value, dict) and [cell(value.get(name)) for name in names]
            yield lines, fields or Bad("is not a JSON object")

    return rows()


def parsed(text: str) -> object:
    """Return the value that a JSON text has, or None if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def numbered(
    path: str | Path, dialect: Dialect, objects: object, digest=None
) -> Iterator[tuple[range, object]]:
    """Yield the values of a file, each with its line (of an array: its number)."""
    with open_text(path, dialect, digest) as file:
        for number, line in enumerate(file, 1):
            if objects is None and line.strip():
                yield range(number, number + 1), parsed(line)
    if objects is not None:
        values = objects if isinstance(objects, list) else [objects]
        for number, value in enumerate(values, 1):
            yield range(number, number + 1), value


def cell(value: object) -> str:
    """Return a value as text; a missing one is blank."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):  # of Parquet
        return value.decode(errors="backslashreplace")
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
