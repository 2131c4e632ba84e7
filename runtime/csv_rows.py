"""The rows of a CSV file, as they are written: encoding, delimiter, quotes and ends of lines."""

import csv
import hashlib
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from runtime import diagnosis
from runtime.file_format import UTF8, FileFormat
from runtime.flags import DELIMITERS
from runtime.json_rows import Bad

MERGED = 5  # lines; a row of more, each like a row, was merged by a stray quote
LOOKED_AT = 1000  # rows, to find the delimiter

OTHER_END = "ends in another way than the first row, with or without a carriage return"

Numbered = Iterator[tuple[range, list[str] | Bad]]  # the lines of a row, and its fields


def fix_tags(line: str) -> str:
    r"""Turn tags as some YouTube files have them into valid CSV: `"a"|"b"` becomes `"a""|""b"`."""
    return re.sub(r'(?<=[^",])"\|"(?=[^",])', '""|""', line)


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
    """The lines of a file. `row` has those since it was cleared; `again` are read once more."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.number = file, 0
        self.row: list[str] = []
        self.again: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.again:
            line = self.again.pop(0)
        else:
            line = next(self.file)
            self.number += 1
        self.row.append(line)
        return line


class Dialect(NamedTuple):
    """How a CSV file is written."""

    encoding: str
    delimiter: str = ","
    quoting: int = csv.QUOTE_MINIMAL
    skipped: int = 0  # lines before the header, such as `sep=;`
    newline: str = "\n"  # as in `open`: "" where lines end in a bare carriage return
    skip_blanks: bool = False  # a blank before a quote is not part of a field


def open_text(path: str | Path, dialect: Dialect, digest=None) -> TextIO:
    """Open a file as text; bytes that are not UTF-8 become surrogates, which `fault_of` finds."""
    is_utf8 = dialect.encoding == UTF8
    raw = io.BufferedReader(HashedFile(path, digest or hashlib.sha256()))
    codec = "utf-8-sig" if is_utf8 else dialect.encoding  # it also takes files without the mark
    errors = "surrogateescape" if is_utf8 else "strict"
    return io.TextIOWrapper(raw, codec, errors, newline=dialect.newline)


def csv_rows(file: TextIO, dialect: Dialect, width: int = 0) -> Numbered:
    """Yield the rows of a CSV file, and a `Bad` where a quote or the end of a line makes no sense.

    The first row is the header, unless its `width` is known. A blank line is skipped but, in a
    file with one column, is a blank text.
    """
    lines = Lines(itertools.islice(file, dialect.skipped, None))
    lines.number = dialect.skipped
    reader = parser(lines, dialect)
    ends: bool | None = None  # whether the first row ends in a carriage return and a line feed
    may_differ = dialect.newline != "\n"  # no row has a carriage return of its own
    while True:
        lines.row.clear()
        start = lines.number + 1
        try:
            row = read_row(reader, lines)
        except StopIteration:
            return
        except csv.Error as error:
            row = misplaced_quote(str(error))
        if not row and width == 1:
            row = [""]
        if not row:
            continue
        end = lines.row[-1][-2:]
        if not width:
            width = len(row) if isinstance(row, list) else 0
            may_differ |= end == "\r\n"
        elif end.endswith("\n") and not may_differ:
            ends = end == "\r\n" if ends is None else ends
            if ends != (end == "\r\n"):
                row = Bad(OTHER_END, droppable=False)
        if len(lines.row) > MERGED and are_rows(lines.row[1:-1], dialect, width):
            row = Bad("goes on over lines that look like rows: is a quote missing or too many?")
        yield range(start, lines.number + 1), row


def are_rows(lines: list[str], dialect: Dialect, width: int) -> bool:
    """Whether each of the lines within a field would be a row of its own."""
    loose = (next(csv.reader([one], delimiter=dialect.delimiter), []) for one in lines)
    return width > 1 and all(len(row) == width and all(map(str.strip, row)) for row in loose)


def parser(lines: Iterator[str], dialect: Dialect) -> Iterator[list[str]]:
    """Return the csv module's parser, which is strict about quotes."""
    return csv.reader(
        lines,
        strict=True,
        delimiter=dialect.delimiter,
        quoting=dialect.quoting,
        skipinitialspace=dialect.skip_blanks,
    )


def misplaced_quote(message: str) -> Bad:
    """Say in other words why the csv module refuses a row."""
    if "unexpected end of data" in message:
        return Bad("opens a quote that never closes", droppable=False)
    if "expected after" in message:
        return Bad("has a quote inside a quoted field")
    return Bad("has a carriage return outside quotes")


def read_row(reader: Iterator[list[str]], lines: Lines) -> list[str]:
    """Read the next row, with its tags repaired if it cannot be read otherwise."""
    try:
        return next(reader)
    except csv.Error:
        fixed = [fix_tags(line) for line in lines.row]
        if fixed == lines.row:
            raise
        lines.again, lines.row = fixed, []
        try:
            return next(reader)
        finally:
            lines.again = []


def find_dialect(path: str | Path, form: FileFormat, wanted: list[str]) -> Dialect:
    """Find how a CSV file is written: its encoding, and the delimiter that fits its header best.

    That is the one with which the header has the most `wanted` columns; of several, the one with
    which the rows are as long as the header, then with which it has the most columns.
    """
    quoting = csv.QUOTE_NONE if form.quoting == "none" else csv.QUOTE_MINIMAL
    dialect = Dialect(find_encoding(path, form), quoting=quoting, newline="")
    with open_text(path, dialect) as file:
        stated = re.fullmatch(r'"?sep=(.)"?\s*', file.readline(20))
    if stated:
        dialect = dialect._replace(skipped=1)
    delimiters = [DELIMITERS[form.delimiter]] if form.delimiter else DELIMITERS.values()
    delimiters = stated[1] if stated and not form.delimiter else delimiters
    best: tuple[tuple, Dialect] | None = None
    for delimiter in delimiters:
        fit, found = try_delimiter(path, dialect._replace(delimiter=delimiter), form, wanted)
        if best is None or fit > best[0]:
            best = fit, found
    return best[1]


def try_delimiter(
    path: str | Path, dialect: Dialect, form: FileFormat, wanted: list[str]
) -> tuple[tuple, Dialect]:
    """Read the first rows with a delimiter: how well it fits, and the dialect in full."""
    with open_text(path, dialect) as file:
        start = Lines(itertools.islice(file, dialect.skipped, dialect.skipped + LOOKED_AT))
        try:
            header = next(filter(None, parser(start, dialect)), [])
        except csv.Error:
            return (-1,), dialect
        if not header:
            return (-1,), dialect
        lone_return = start.row[-1].endswith("\r")
        blank = dialect.quoting != csv.QUOTE_NONE and f'{dialect.delimiter} "' in start.row[0]
        dialect = dialect._replace(newline="" if lone_return else "\n", skip_blanks=blank)
    with open_text(path, dialect) as file:
        rows = itertools.islice(csv_rows(file, dialect), LOOKED_AT)
        sizes = [len(row) for _, row in rows if isinstance(row, list)]
    width = len(form.column_names or header)
    alike = sum(size == width for size in sizes) / max(len(sizes), 1)
    if form.column_names:
        return (alike,), dialect
    found = len({name.strip() for name in header} & {*wanted})
    return (found, width > 1, alike, width), dialect


def find_encoding(path: str | Path, form: FileFormat) -> str:
    """Return the first encoding of the format in which the file can be read."""
    with open(path, "rb") as file:
        start = file.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff") and form.encodings[0] == UTF8:
        return "utf-16"
    if len(form.encodings) > 1:
        health = diagnosis.utf8_health(path)
        return form.encodings[health.broken > health.characters]
    return form.encodings[0]
