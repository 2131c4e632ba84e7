"""Read JSON lines, JSON arrays of objects, and Parquet as rows of text, header first."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from runtime.files import UserError

BLOCK = 2**20  # bytes


Rows = Iterator[tuple[range, "list[str] | Bad"]]  # the lines of each row, and its fields


class Bad:
    """Why a row cannot be read, as the end of a sentence that names the row."""

    def __init__(self, fault: str, droppable: bool = True) -> None:
        self.fault, self.droppable = fault, droppable

    def __str__(self) -> str:
        return self.fault


def parquet_rows(path: str | Path, digest) -> Rows | None:
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
        reason = str(error).strip().split("\n")[0][:100]
        raise UserError(f"{path} is a Parquet file that cannot be read: {reason}") from None

    def rows() -> Rows:
        names = content.schema_arrow.names
        yield range(0), names
        columns = (batch.to_pydict().values() for batch in content.iter_batches())
        each = chain.from_iterable(zip(*values, strict=True) for values in columns)
        for number, row in enumerate(each, 1):
            yield range(number, number + 1), [cell(value) for value in row]
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)

    return rows()


def json_rows(path: str | Path, digest) -> Rows | None:
    """Return header and rows of a file of JSON objects, or None if it is not one.

    The objects stand in lines, or in one array. The header has all their names, in the order in
    which they first occur. digest: of hashlib. Raises: UserError for JSON of another form.
    """
    objects = None
    with open(path, "rb") as file:
        first = file.readline(BLOCK).removeprefix(b"\xef\xbb\xbf").strip()
        if first[:1] not in (b"{", b"["):
            return None
        if not isinstance(parsed(first), dict):
            objects = parsed(first + file.read())
            if objects is None:
                return None
    names: dict[str, None] = {}
    for _, one in numbered(path, objects):
        names |= dict.fromkeys(one if isinstance(one, dict) else ())
        nested = isinstance(one, dict) and all(isinstance(v, dict | list) for v in one.values())
        if nested or (objects is not None and not isinstance(one, dict)):
            advice = "with pandas, orient='records' writes them"
            raise UserError(
                f"{path} has JSON, but not one object with its fields per row: {advice}"
            )

    def rows() -> Rows:
        yield range(0), [*names]
        for lines, one in numbered(path, objects, digest):
            fields = isinstance(one, dict) and [cell(one.get(name)) for name in names]
            yield lines, fields or Bad("is not a JSON object")

    return rows()


def parsed(text: bytes) -> object:
    """Return the value that a JSON text has, or None if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # of JSON, or of UTF-8
        return None


def numbered(path: str | Path, objects: object, digest=None) -> Iterator[tuple[range, object]]:
    """Yield the values of a file, each with its line (of an array: its number)."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if digest:
                digest.update(line)
            line = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip()
            if objects is None and line:
                yield range(number, number + 1), parsed(line)
    if objects is not None:
        values = objects if isinstance(objects, list) else [objects]
        for number, one in enumerate(values, 1):
            yield range(number, number + 1), one


def cell(value: object) -> str:
    """Return a value as text; a missing one is blank."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
