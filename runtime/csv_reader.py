"""Read CSV files as text, strictly: a malformed file is rejected with row and line, not misread.

Also what a cell means: when two texts are the same, and which labels a row has.
"""

import codecs
import csv
import hashlib
import io
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
from tokenizers.normalizers import BertNormalizer

from arguments import LABEL_SEPARATOR
from runtime.files import UserError, check_regular

NORMALIZER = BertNormalizer(lowercase=True)
COMPRESSED = {
    b"\x1f\x8b": "compressed: unpack it with gunzip",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save the table as CSV",
}
PASS_ENCODING = (
    "pass its encoding (main.py --csv_encoding NAME, preprocess.sh -p csv_encoding NAME)"
)
USE_SPLIT = "bash script/split.sh reads semicolons and tabs, and writes commas"
BLOCK = 2**20  # bytes in memory at a time, when the byte is sought at which decoding fails
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}


def text_key(text: str) -> str:
    """Return a text's key: two texts with the same key are the same to an uncased BERT.

    They agree up to case, accents, white space and control characters.
    """
    return " ".join(NORMALIZER.normalize_str(text).split()).casefold()


def canonical_label(text: str) -> str:
    """Normalise a label: ` 1` and `1.0` (as pandas may write it) become `1`."""
    text = text.strip()
    return re.sub(r"^([+-]?\d+)\.0*$", r"\1", text)


class HashedFile(io.FileIO):
    """A file that adds each byte that is read to a digest."""

    def __init__(self, path: str | Path, digest) -> None:
        super().__init__(path)
        self.digest = digest

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count


class Lines:
    """The lines of a file, each repaired by `fix`; `last` is the newest one as it was."""

    def __init__(self, file: TextIO, fix: Callable[[str], str]) -> None:
        self.file, self.fix, self.last = file, fix, ""

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.last = line
            yield self.fix(line)


def header_end(path: str | Path, codec: str, fix_line: Callable[[str], str], delimiter: str) -> str:
    """Return the characters that end the header's line: a line feed, a carriage return or both."""
    with open(path, encoding=codec, newline="") as file:
        lines = Lines(file, fix_line)
        next(filter(None, csv.reader(lines, strict=True, delimiter=delimiter)), None)
    return lines.last[len(lines.last.rstrip("\r\n")) :]


def read_rows(
    path: str | Path,
    encoding: str = "utf-8",
    fix_line: Callable[[str], str] = str,
    delimiter: str = ",",
    digest=None,
) -> Iterator[list[str]]:
    """Yield the header and then each row of a CSV file, as text.

    Stricter than pandas, which pads short rows and merges lines after a stray quote: rows never
    vanish silently. A blank line is skipped, except in a file with one column, where it is a blank
    text. If the header ends in a line feed, a bare carriage return is an error: some program did
    not quote it. `fix_line` is applied to each line before parsing, to repair a known flaw. At the
    end, `digest` (of hashlib) is that of the bytes that were read.

    Raises: UserError for a file that is missing, empty, ragged, not in `encoding`, cut off inside a
        quoted field, or contains a NUL byte; also for a pipe.
    """
    check_regular(path)
    digest = digest or hashlib.sha256()
    csv.field_size_limit(2**31 - 1)
    # The "-sig" codec also accepts a file without the byte order mark.
    codec = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    line = 1
    try:
        end = header_end(path, codec, fix_line, delimiter)
        raw = io.BufferedReader(HashedFile(path, digest))
        with io.TextIOWrapper(raw, codec, newline="" if end == "\r" else "\n") as file:
            lines = Lines(file, fix_line)
            reader = csv.reader(lines, strict=True, delimiter=delimiter)
            header = next(filter(None, reader), None)
            check_header(path, header)
            yield header
            number, line = 0, reader.line_num + 1
            for row in reader:
                if not row and len(header) == 1:
                    row = [""]
                if row:
                    number += 1
                    place = f"{path}, row {number} (line {line})"
                    bare_return = end == "\n" and lines.last.endswith(("\r\n", "\r"))
                    check_row(place, row, header, bare_return, delimiter)
                    yield row
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, the row that starts at line {line}: {error}; is a quote missing or doubled?"
        ) from None
    except UnicodeError as error:
        raise UserError(encoding_message(path, encoding, codec, error)) from None
    except (OSError, LookupError) as error:  # LookupError: an encoding that Python lacks
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read: {reason}") from None


def check_header(path: str | Path, header: list[str] | None) -> None:
    """Reject an empty file, and duplicate columns, since one of them would be lost."""
    if not header:
        raise UserError(f"{path} is empty: it needs a header and rows")
    if "\0" in "".join(header):
        order = "be" if header[0].startswith("\0") else "le"
        raise UserError(
            f"{path} has NUL bytes in its header: {PASS_ENCODING}, perhaps utf-16-{order}"
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(f"{path} has the column {', '.join(map(repr, twice))} more than once")


def check_row(
    place: str, row: list[str], header: list[str], bare_return: bool, delimiter: str
) -> None:
    """Reject a row that is ragged, contains a NUL byte, or ends in a bare carriage return."""
    if bare_return:
        raise UserError(
            f"{place} ends in a carriage return, the header does not: quote fields that contain "
            "one, or end all lines the same way"
        )
    if len(row) != len(header):
        raise UserError(
            f"{place} has {len(row)} fields, the header {len(header)}: quote fields that "
            f"contain a {DELIMITERS.get(delimiter, delimiter)}, a quote or a line break"
        )
    if any("\0" in field for field in row):
        raise UserError(f"{place} contains a NUL byte: remove it")
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        raise UserError(f"{place} contains half of a surrogate pair: remove it") from None


def encoding_message(path: str | Path, encoding: str, codec: str, error: UnicodeError) -> str:
    """Return a message with the byte at which decoding fails, and the likely encoding."""
    with open(path, "rb") as file:
        data = file.read(4)
    for start, what in COMPRESSED.items():
        if data.startswith(start):
            return f"{path} is not a CSV file but {what}"
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    # `error` counts from the start of a block, not of the file; others have no position
    position = bad_byte(path, codec) if isinstance(error, UnicodeDecodeError) else None
    at = "" if position is None else f" at byte {position}"
    likely = "utf-16" if utf16 else "cp1252"
    return f"{path} is not {encoding}{at}: {PASS_ENCODING}, perhaps {likely}"


def bad_byte(path: str | Path, codec: str) -> int | None:
    """Return the position of the first byte at which decoding fails; None if there is none."""
    codec = codec.removesuffix("-sig")  # which counts from after the byte order mark
    decoder, before = codecs.getincrementaldecoder(codec)(), 0
    with open(path, "rb") as file:
        while True:
            block, held = file.read(BLOCK), len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:  # it counts from the bytes held back
                return before - held + error.start
            if not block:
                return None
            before += len(block)


def read_tables(
    path: str | Path,
    encoding: str,
    columns: list[str],
    *,
    size: int | None = None,
    fix_line: Callable[[str], str] = str,
    delimiter: str = ",",
    hint: str = "",
    digest=None,
) -> Iterator[pd.DataFrame]:
    """Yield a CSV file as text, `size` rows at a time or all at once; see `read_rows`.

    The index counts the file's rows from 1.
    Raises: UserError, also if there are no rows or, ending with `hint`, if a column is missing.
    """
    lines = read_rows(path, encoding, fix_line, delimiter, digest)
    header = next(lines)
    if missing := [name for name in columns if name not in header]:
        if len(header) == 1 and re.search(r"[;\t]", header[0]):
            hint = f": are its fields separated by something other than commas? {USE_SPLIT}"
        raise UserError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, header))}{hint}"
        )
    first = 1
    while rows := list(itertools.islice(lines, size)):
        index = range(first, first + len(rows))
        yield pd.DataFrame(rows, index=index, columns=header, dtype=object)
        first += len(rows)
    if first == 1:
        raise UserError(f"{path} has a header but no rows")


def read_table(path: str | Path, encoding: str, columns: list[str], **options) -> pd.DataFrame:
    """Read a whole CSV file as text, see `read_tables`; the index counts from 0."""
    return next(read_tables(path, encoding, columns, **options)).reset_index(drop=True)


def find_delimiter(path: str | Path, encoding: str, columns: list[str]) -> str:
    """Return the delimiter (comma, semicolon or tab) with which a header has most of `columns`.

    Of several, the one with which it has the most columns; a comma if it cannot be read.
    """

    def columns_found(delimiter: str) -> tuple[int, int]:
        try:
            header = next(read_rows(path, encoding, delimiter=delimiter))
        except UserError:
            return -1, 0
        return len({*header} & {*columns}), len(header)

    return max(DELIMITERS, key=columns_found)


def row_list(rows: np.ndarray | list[int], shown: int = 5) -> str:
    """Format row numbers as `row 3`, or `9 rows (3, 5, 8, 9, 12, ...)`."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    dots = ", ..." if len(rows) > shown else ""
    return f"{len(rows)} rows ({', '.join(map(str, rows[:shown]))}{dots})"


def read_labels(
    path: str | Path,
    table: pd.DataFrame,
    rows: list[int],
    column: str | None,
    multi_label: bool,
    required: bool,
) -> list[list[str]] | None:
    """Return the labels of each row, or None if they are missing and not required.

    Raises: UserError for a row without a label (in multi-label data, a blank cell means that no
        label applies).
    """
    if column not in table or (not required and not table[column].str.strip().any()):
        return None
    if multi_label:
        cells = (cell.split(LABEL_SEPARATOR) if cell.strip() else [] for cell in table[column])
        labels = [list(dict.fromkeys(canonical_label(part) for part in cell)) for cell in cells]
    else:
        labels = [[canonical_label(cell)] for cell in table[column]]
    missing = [row for row, names in zip(rows, labels, strict=True) if "" in names]
    if missing:
        advice = "or, if a row may have several labels or none, pass "
        advice += "--problem_type multi_label_classification"
        if multi_label:
            advice = f"or leave out the {LABEL_SEPARATOR} beside an empty label"
        where = row_list(missing)
        raise UserError(f"{path}: no '{column}' in {where}; fill it in, remove such rows, {advice}")
    return labels
