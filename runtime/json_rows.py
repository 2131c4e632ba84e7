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


def parquet_rows(path: str | Path) -> Numbered | None:
    """Return header and rows of a Parquet file, or None if it is not one.

    Raises: UserError if it is damaged, or if pyarrow is not installed.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PAR1":
            return None
    if not find_spec("pyarrow"):
        advice = "run .venv/bin/pip install pyarrow, or save it as CSV"
        raise UserError(f"{path} is a Parquet file: {advice}")
    from pyarrow import Array, ArrowException, parquet

    def numbered_rows() -> Numbered:
        try:
            content = parquet.ParquetFile(path)
            yield range(0), content.schema_arrow.names
            batches = (map(Array.to_pylist, batch.columns) for batch in content.iter_batches())
            rows = chain.from_iterable(zip(*columns, strict=True) for columns in batches)
            for number, row in enumerate(rows, 1):
                yield range(number, number + 1), [cell(value) for value in row]
        except (ArrowException, OSError) as error:
            reason = str(error).strip().split("\n")[0][:100]
            raise UserError(f"{path} is a Parquet file that cannot be read: {reason}") from None

    return numbered_rows()


def json_rows(path: str | Path, dialect: Dialect) -> Numbered | None:
    """Return header and rows of a file of JSON objects, or None if it is not one.

    The objects are the lines, or one array. The header has all their names, in the order in which
    they first occur. dialect: names the encoding. Raises: UserError for JSON of another form.
    """
    with open_text(path, dialect) as file:
        first = file.readline(BLOCK).strip()
        if not re.match(r"\{|\[\s*(\{|\[|$)", first):
            return None
        is_lines = isinstance(parsed(first), dict)
        content = is_lines or parsed(first + file.read())
    if content is None:
        return None

    def numbered() -> Iterator[tuple[int, object]]:  # by line, or by place in the array
        if not is_lines:
            yield from enumerate(content if isinstance(content, list) else [content], 1)
            return
        with open_text(path, dialect) as file:
            yield from ((n, parsed(line)) for n, line in enumerate(file, 1) if line.strip())

    names: dict[str, None] = {}
    for _, value in numbered():
        is_object = isinstance(value, dict)
        if is_object:
            names |= dict.fromkeys(value)
        if all(isinstance(v, dict | list) for v in value.values()) if is_object else not is_lines:
            what = "JSON, but not one object with its fields per row"
            raise UserError(f"{path} has {what}: with pandas, orient='records' writes them")

    def rows() -> Numbered:
        yield range(0), [*names]
        for number, value in numbered():
            fields = isinstance(value, dict) and [cell(value.get(name)) for name in names]
            yield range(number, number + 1), fields or Bad("is not a JSON object")

    return rows()


def parsed(text: str) -> object:
    """Return the value that a JSON text has, or None if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def cell(value: object) -> str:
    """Return a value as text; a missing one is blank."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bytes):  # of Parquet
        return value.decode(errors="backslashreplace")
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
