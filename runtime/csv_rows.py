"""The rows of a CSV file, as they are written: encoding, delimiter, quotes and ends of lines."""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from runtime.file_format import UTF8, FileFormat
from runtime.files import plural
from runtime.flags import DELIMITERS

MERGED = 5  # lines; a row of more, each like a row, was merged by a stray quote
LOOKED_AT = 1000  # rows, to find the delimiter
LONGEST = 2**20  # characters of a header

csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True)
class Bad:
    """Why a row cannot be read, as the end of a sentence that names the row, and what helps."""

    fault: str
    advice: str = ""
    droppable: bool = True
    fields: int = 0  # if it has another number of fields than the header


Numbered = Iterator[tuple[range, list[str] | Bad]]  # the lines of a row, and its fields

NUL = Bad("contains a NUL byte")
BROKEN = Bad(
    "has a byte that is not UTF-8",
    "remove such bytes (iconv -c -f utf-8 -t utf-8 OLD.csv > NEW.csv)",
)
SURROGATE = Bad("contains half of a surrogate pair")
OTHER_END = Bad(
    "ends in another way than the first row, with or without a carriage return",
    r"remove carriage returns (tr -d '\r' < OLD.csv > NEW.csv)",
    droppable=False,
)
OPEN_QUOTE = Bad("opens a quote that never closes", droppable=False)
MERGED_ROWS = Bad("has lines that look like rows of their own, as if a quote were missing")


class Dialect(NamedTuple):
    """How a CSV file is written."""

    encoding: str
    delimiter: str = ","
    quoting: int = csv.QUOTE_MINIMAL
    skipped: int = 0  # lines before the header, such as `sep=;`
    newline: str = "\n"  # as in `open`: "" where lines end in a bare carriage return
    skip_blanks: bool = False  # a blank before a quote is not part of a field


class Start(NamedTuple):
    """The first rows of a CSV file in a dialect."""

    fit: tuple  # how well they fit, to compare dialects
    dialect: Dialect
    header: set[str]  # the fields of the first row, without blanks around them
    alike: int = 0  # the number of rows as long as the header


def open_text(path: str | Path, dialect: Dialect) -> TextIO:
    """Open a file as text; bytes that are not UTF-8 become surrogates, see `row_fault`."""
    is_utf8 = dialect.encoding == UTF8
    codec = "utf-8-sig" if is_utf8 else dialect.encoding  # it also takes files without the mark
    errors = "surrogateescape" if is_utf8 else "strict"
    return open(path, encoding=codec, errors=errors, newline=dialect.newline)


def csv_rows(path: str | Path, dialect: Dialect, names: Sequence[str] | None = None) -> Numbered:
    """Yield the header, or the `names` of a file without one, and the rows of a CSV file."""
    if names:
        yield range(0), [*names]
    with open_text(path, dialect) as file:
        yield from parse(file, dialect, len(names or ()))


def parse(file: Iterable[str], dialect: Dialect, width: int = 0) -> Numbered:
    """Yield the rows of a CSV file, and a `Bad` where a quote or the end of a line makes no sense.

    The first row is the header, unless its `width` is known. A blank line is skipped but, in a
    file with one column, is a blank text.
    """
    taken: list[str] = []  # the lines of a row
    lines = noted(itertools.islice(file, dialect.skipped, None), taken)
    reader, number = strict_reader(lines, dialect), dialect.skipped
    ends: bool | None = None  # whether the first row ends in a carriage return and a line feed
    may_differ = dialect.newline != "\n"  # no row has a carriage return of its own
    while True:
        number += len(taken)
        taken.clear()
        try:
            row = read_row(reader, lines, taken, dialect, is_header=not width)
        except StopIteration:
            return
        if not row and width == 1:
            row = [""]
        if not row:
            continue
        end, is_list = taken[-1][-2:] == "\r\n", isinstance(row, list)
        if not width:
            width = len(row) if is_list else 0
            may_differ |= end
        elif taken[-1].endswith("\n") and not may_differ:
            ends = end if ends is None else ends
            row = row if end == ends else OTHER_END
        if is_list and len(taken) > MERGED and are_rows(taken[1:-1], dialect, width):
            row = MERGED_ROWS
        yield range(number + 1, number + len(taken) + 1), row


def noted(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    """Yield lines, and append them to `taken`."""
    for line in lines:
        taken.append(line)
        yield line


def strict_reader(lines: Iterable[str], dialect: Dialect) -> Iterator[list[str]]:
    """Return the csv module's parser, which is strict about quotes."""
    options = {"delimiter": dialect.delimiter, "quoting": dialect.quoting}
    return csv.reader(lines, strict=True, skipinitialspace=dialect.skip_blanks, **options)


def read_row(
    reader: Iterator[list[str]],
    lines: Iterator[str],
    taken: list[str],
    dialect: Dialect,
    is_header: bool,
) -> list[str] | Bad:
    r"""Read the next row, or say why it cannot be read.

    Tags as some YouTube files have them are turned into valid CSV, `"a"|"b"` into `"a""|""b"`, but
    not in a header, which may have this delimiter.
    """
    try:
        return next(reader)
    except csv.Error as error:
        message = str(error)
    fixed = [re.sub(r'(?<=[^",])"\|"(?=[^",])', '""|""', line) for line in taken]
    if fixed != taken and not is_header:
        try:
            return next(strict_reader(itertools.chain(fixed, lines), dialect))
        except csv.Error as error:
            message = str(error)
    if "unexpected end of data" in message:
        return OPEN_QUOTE
    if "expected after" in message:  # several lines may be many rows that a stray quote merged
        advice = "write such quotes twice, or correct the row"
        return Bad("has a quote in a quoted field", advice, droppable=len(taken) == 1)
    if "new-line" in message:
        return Bad("has a carriage return outside quotes")
    return Bad(f"cannot be read ({message})")


def are_rows(lines: list[str], dialect: Dialect, width: int) -> bool:
    """Whether each of the lines within a field would be a row of its own."""
    rows = (next(csv.reader([line], delimiter=dialect.delimiter), []) for line in lines)
    return width > 1 and all(len(row) == width and all(map(str.strip, row)) for row in rows)


def row_fault(row: list[str] | Bad, width: int) -> Bad | None:
    """Say what is wrong with a row of a table with `width` columns."""
    if isinstance(row, Bad):
        return row
    if len(row) != width:
        return Bad(f"has {plural(len(row), 'field')}, not {width}", fields=len(row))
    text = "".join(row)
    if "\0" in text:
        return NUL
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BROKEN if "\udc80" <= text[error.start] <= "\udcff" else SURROGATE
    return None


def find_dialect(
    path: str | Path, form: FileFormat, encoding: str, wanted: Sequence[str] = ()
) -> Start:
    """Find how a CSV file is written: the delimiter that fits its header best.

    That is the one with which the header has the most `wanted` columns; of several, the one with
    which the rows are as long as the header, then with which it has the most columns. Without a
    header, texts may contain commas, so a comma comes last.
    """
    quoting = csv.QUOTE_NONE if form.quoting == "none" else csv.QUOTE_MINIMAL
    names = [form.delimiter] if form.delimiter else [*DELIMITERS]
    delimiters = [DELIMITERS[name] for name in (names[::-1] if form.column_names else names)]
    with open_text(path, Dialect(encoding, newline="")) as file:
        line, skipped = file.readline(LONGEST), 0
        if stated := re.fullmatch(r'"?sep=(.)"?\s*', line):
            line, skipped = file.readline(LONGEST), 1
            delimiters = delimiters if form.delimiter else [stated[1]]
        while line and not line.strip():  # else a cell that starts with a carriage return loses it
            line = file.readline(LONGEST)
    starts = []
    for delimiter in delimiters:
        blanks = form.quoting != "none" and f'{delimiter} "' in line
        newline = "" if line.endswith("\r") else "\n"
        dialect = Dialect(encoding, delimiter, quoting, skipped, newline, blanks)
        starts.append(try_dialect(path, dialect, form, wanted))
    return max(starts, key=lambda start: start.fit)  # the first of several


def try_dialect(
    path: str | Path, dialect: Dialect, form: FileFormat, wanted: Sequence[str]
) -> Start:
    """Read the first rows in a dialect."""
    with open_text(path, dialect) as file:  # a quote that never closes must not take the whole file
        rows = parse(itertools.islice(file, 10 * LOOKED_AT), dialect)
        first = [row for _, row in itertools.islice(rows, LOOKED_AT)]
    if not first or isinstance(first[0], Bad):
        return Start((-1,), dialect, set())
    sizes = [len(row) for row in first if isinstance(row, list)]
    header, width = {name.strip() for name in first[0]}, len(form.column_names or first[0])
    alike = sum(size == width for size in sizes)
    several = width > 1 or (len({*sizes[1:]}) == 1 and sizes[1] > 1)  # of one name: rows have more
    fit = (several, alike / len(sizes))
    if not form.column_names:
        fit = (len(header & {*wanted}), *fit, width)
    return Start(fit, dialect, header, alike)
