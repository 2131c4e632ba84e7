"""The rows of a CSV file, as they are written: encoding, delimiter, quotes and ends of lines."""

import csv
import io
import itertools
import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from runtime.file_format import UTF8, FileFormat
from runtime.flags import DELIMITERS

MERGED = 5  # lines; a row of more, each like a row, was merged by a stray quote
LOOKED_AT = 1000  # rows, to find the delimiter

OTHER_END = "ends in another way than the first row, with or without a carriage return"


def fix_tags(line: str) -> str:
    r"""Turn tags as some YouTube files have them into valid CSV: `"a"|"b"` becomes `"a""|""b"`."""
    return re.sub(r'(?<=[^",])"\|"(?=[^",])', '""|""', line)


class Bad:
    """Why a row cannot be read, as the end of a sentence that names the row."""

    def __init__(self, fault: str, droppable: bool = True) -> None:
        self.fault, self.droppable = fault, droppable

    def __str__(self) -> str:
        return self.fault


Numbered = Iterator[tuple[range, list[str] | Bad]]  # the lines of a row, and its fields


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
        self.again: deque[str] = deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.again:
            line = self.again.popleft()
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
    raw = io.BufferedReader(HashedFile(path, digest) if digest else io.FileIO(path))
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
            row = refused(str(error), len(lines.row))
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
        is_long = isinstance(row, list) and len(lines.row) > MERGED
        if is_long and are_rows(lines.row[1:-1], dialect, width):
            row = Bad("has lines that look like rows of their own, as if a quote were missing")
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


def refused(message: str, lines: int) -> Bad:
    """Say in other words why the csv module refuses a row.

    One of several lines may be many rows that a stray quote merged, so it is not to be dropped.
    """
    if "unexpected end of data" in message:
        return Bad("opens a quote that never closes", droppable=False)
    if "expected after" in message:
        return Bad("has a quote in a quoted field", droppable=lines == 1)
    if "new-line" in message:
        return Bad("has a carriage return outside quotes")
    return Bad(f"cannot be read ({message})")


def read_row(reader: Iterator[list[str]], lines: Lines) -> list[str]:
    """Read the next row, with its tags repaired if it cannot be read otherwise."""
    try:
        return next(reader)
    except csv.Error:
        fixed = [fix_tags(line) for line in lines.row]
        if fixed == lines.row:
            raise
        lines.again, lines.row = deque(fixed), []
        try:
            return next(reader)
        finally:
            lines.again.clear()


def find_dialect(
    path: str | Path, form: FileFormat, encoding: str, wanted: Sequence[str] = ()
) -> Dialect:
    """Find how a CSV file is written: the delimiter that fits its header best.

    That is the one with which the header has the most `wanted` columns; of several, the one with
    which the rows are as long as the header, then with which it has the most columns. Without a
    header, texts may contain commas, so a comma comes last.
    """
    quoting = csv.QUOTE_NONE if form.quoting == "none" else csv.QUOTE_MINIMAL
    dialect = Dialect(encoding, quoting=quoting, newline="")
    with open_text(path, dialect) as file:
        stated = re.fullmatch(r'"?sep=(.)"?\s*', file.readline(20))
    if stated:
        dialect = dialect._replace(skipped=1)
    delimiters = [DELIMITERS[form.delimiter]] if form.delimiter else [*DELIMITERS.values()]
    delimiters = delimiters[::-1] if form.column_names else delimiters
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
    with open_text(path, dialect) as file:  # a quote that never closes must not take the whole file
        rows = csv_rows(itertools.islice(file, 10 * LOOKED_AT), dialect)
        rows = itertools.islice(rows, LOOKED_AT)
        sizes = [len(row) for _, row in rows if isinstance(row, list)]
    width = len(form.column_names or header)
    alike = sum(size == width for size in sizes) / max(len(sizes), 1)
    several = width > 1 or (len({*sizes[1:]}) == 1 and sizes[1] > 1)  # of one name: rows have more
    if form.column_names:
        return (several, alike), dialect
    found = len({name.strip() for name in header} & {*wanted})
    return (found, several, alike, width), dialect
