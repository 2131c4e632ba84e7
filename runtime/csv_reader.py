"""CSV files as text, strictly: what is not whole is refused with its place, never read wrongly."""

import csv
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd


class DataError(ValueError):
    """A data file that cannot be used: its message names the file, the row and the way out."""


def read_rows(
    path: str | Path, encoding: str = "utf-8", mend: Callable[[str], str] = str
) -> Iterator[list[str]]:
    """Yield the header, then each row, of a CSV file, as text.

    Stricter than pandas, which fills up short rows and joins lines at a stray quote: there are
    never fewer rows in silence. A blank line is no row, but a blank text where there is only one
    column. Where the header ends in a line feed, a carriage return is text that some program did
    not quote, and an error. `mend` is applied to each line before it is parsed, for a file with a
    known flaw.

    Raises: DataError for a file that is missing, empty, not in `encoding`, cut off inside a
        quoted field, ragged, or holds a NUL byte.
    """
    csv.field_size_limit(2**31 - 1)
    # The "-sig" codec also takes a file without the byte order mark.
    codec = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    line, last = 1, ""

    def lines(file: TextIO) -> Iterator[str]:
        nonlocal last
        for last in file:
            yield mend(last)

    try:
        with open(path, encoding=codec, newline="") as file:
            next(csv.reader(lines(file), strict=True), None)  # `last` is where the header ends
        end = last[len(last.rstrip("\r\n")) :]
        with open(path, encoding=codec, newline="" if end == "\r" else "\n") as file:
            reader = csv.reader(lines(file), strict=True)
            header = next(reader, None)
            if not header:
                raise DataError(f"{path} is empty: a header and rows are needed")
            check_header(path, header)
            yield header
            number, line = 0, reader.line_num + 1
            for row in reader:
                if not row and len(header) == 1:
                    row = [""]
                number += bool(row)
                if end == "\n" and last.endswith(("\r\n", "\r")):
                    raise DataError(
                        f"{path}, row {number} (line {line}) ends in a carriage return, the header "
                        "does not: quote fields that hold one, or give all lines the same end"
                    )
                if row and len(row) != len(header):
                    raise DataError(
                        f"{path}, row {number} (line {line}) has {len(row)} fields, the header "
                        f"{len(header)}: quote fields that hold a comma, a quote or a line break"
                    )
                if any("\0" in field for field in row):
                    raise DataError(f"{path}, row {number} (line {line}) holds a NUL byte")
                if row:
                    yield row
                line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, the row that starts at line {line}: {error}; is a quote missing or doubled?"
        ) from None
    except UnicodeError as error:
        raise DataError(encoding_message(path, encoding, codec, error)) from None
    except (OSError, LookupError) as error:  # the second: an encoding that Python does not know
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path} cannot be read: {reason}") from None


def check_header(path: str | Path, header: list[str]) -> None:
    """Refuse a column that is there twice, since one of them would be lost."""
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path} has the column {', '.join(map(repr, twice))} more than once")


def encoding_message(path: str | Path, encoding: str, codec: str, error: UnicodeError) -> str:
    """Name the byte at which decoding fails, and the encoding that the file looks to be in."""
    data = Path(path).read_bytes()
    try:
        data.decode(codec)
    except UnicodeDecodeError as whole:  # `error` counts from the start of a chunk, not the file
        error = whole
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    at = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
    return (
        f"{path} is not {encoding}{at}: give its encoding (main.py --csv_encoding NAME, "
        f"preprocess.sh -p csv_encoding NAME), perhaps {'utf-16' if utf16 else 'cp1252'}"
    )


def read_tables(
    path: str | Path,
    encoding: str,
    columns: list[str],
    *,
    size: int | None = None,
    mend: Callable[[str], str] = str,
    hint: str = "",
) -> Iterator[pd.DataFrame]:
    """Yield a file as text, `size` rows at a time, or at once; see `read_rows`.

    It has at least these columns and one row; the index counts its rows from 1.
    Raises: DataError, which ends with `hint` where a column is missing.
    """
    lines = read_rows(path, encoding, mend)
    header = next(lines)
    if missing := [name for name in columns if name not in header]:
        if len(header) == 1 and re.search(r"[;\t]", header[0]):
            hint = ": are its fields separated by something else than commas?"
        raise DataError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, header))}{hint}"
        )
    first = 1
    while rows := list(itertools.islice(lines, size)):
        index = range(first, first + len(rows))
        yield pd.DataFrame(rows, index=index, columns=header, dtype=object)
        first += len(rows)
    if first == 1:
        raise DataError(f"{path} has a header and no rows")


def read_table(path: str | Path, encoding: str, columns: list[str], **options) -> pd.DataFrame:
    """A whole file as text, see `read_tables`; the index counts from 0."""
    return next(read_tables(path, encoding, columns, **options)).reset_index(drop=True)


def file_sha256(path: str | Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row_list(rows: np.ndarray | list[int], shown: int = 5) -> str:
    """`row 3`, or `9 rows (3, 5, 8, 9, 12, ...)`."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    dots = ", ..." if len(rows) > shown else ""
    return f"{len(rows)} rows ({', '.join(map(str, rows[:shown]))}{dots})"
