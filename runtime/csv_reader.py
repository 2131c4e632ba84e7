"""Read tables as text, strictly: a malformed row is refused or counted, never misread.

CSV files with four delimiters; `runtime/json_rows.py` reads JSON and Parquet.
"""

import csv
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from tokenizers.normalizers import BertNormalizer

from runtime import diagnosis
from runtime.csv_rows import (
    LOOKED_AT,
    OTHER_END,
    Bad,
    Dialect,
    Numbered,
    csv_rows,
    find_dialect,
    open_text,
)
from runtime.file_format import UTF8, FileFormat
from runtime.files import UserError, check_regular, name_list, plural
from runtime.flags import DELIMITERS
from runtime.guess import guess_columns
from runtime.json_rows import json_rows, parquet_rows

NORMALIZER = BertNormalizer(lowercase=True)
SHOWN = 5  # numbers of rows in a message
REMOVE_BYTES = "remove such bytes (iconv -c -f utf-8 -t utf-8 OLD.csv > NEW.csv)"
MANY_LINES = 10  # of one row: is a quote missing?


def text_key(text: str) -> str:
    """Return a text's key: two texts with the same key are the same to an uncased BERT.

    They agree up to case, accents, white space and control characters.
    """
    return " ".join(NORMALIZER.normalize_str(text).split()).casefold()


class Table:
    """A file of rows, as text: `for number, row in table`, numbered from 1.

    Stricter than pandas, which pads short rows and merges lines after a stray quote. A malformed
    row (ragged, with a NUL byte, a misplaced quote or bytes that are not text) is an error, after
    the last row so that all are counted, or is dropped; if all are, that is an error.
    """

    def __init__(
        self, path: str | Path, form: FileFormat, columns: Sequence[str] = (), digest=None
    ) -> None:
        """Open a file and read its header.

        columns: those that are used. digest: of hashlib; after the last row it is the file's.
        Raises: UserError for a file that is missing, empty, a pipe or no table, and if a column is
        missing or occurs twice.
        """
        check_regular(path)
        csv.field_size_limit(2**31 - 1)
        self.path, self.form, self.columns = path, form.for_file(path), columns
        self.is_ours = self.form is not form  # a file of split.sh, which has named its faults
        self.malformed, self.first_fault, self.droppable = 0, "", True
        self.is_broken = False  # whether a row has bytes that are not UTF-8
        self.longest = range(0), 0  # the lines of the longest row, and its number
        self.dialect: Dialect | None = None  # None: not CSV
        digest = digest or hashlib.sha256()
        with self.reading():
            if what := diagnosis.not_csv(path):
                raise UserError(f"{path} is not a CSV file but {what}")
            self.encoding = self.find_encoding()
            self.rows = parquet_rows(path, digest)
            self.rows = self.rows or json_rows(path, Dialect(self.encoding), digest)
            if self.rows is None:
                if self.form.column_names:
                    self.form = self.with_names()
                self.dialect = find_dialect(path, self.form, self.encoding, self.named)
                self.rows = self.open_csv(self.dialect, digest)
            self.header = self.read_header()

    @property
    def named(self) -> list[str]:
        """The columns by which the header is recognised."""
        return [*self.form.text_column_names, *self.form.label_column_name, *self.columns]

    @cached_property
    def health(self) -> diagnosis.Utf8Health:
        """How much of the file is UTF-8; takes a pass over the file."""
        return diagnosis.utf8_health(self.path)

    def find_encoding(self) -> str:
        """Return the first encoding of the format in which the file can be read."""
        first, *others = self.form.encodings
        with open(self.path, "rb") as file:
            if first == UTF8 and file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                return "utf-16"
        return others[0] if others and self.health.broken > self.health.characters else first

    def with_names(self) -> FileFormat:
        """Return the format whose `column_names` fit the file: none if it has a header.

        So a model that was tuned on a file without a header also reads files that have one, and
        those of texts alone.
        """
        form = self.form
        other = replace(form, column_names=None, delimiter=None)
        dialect = find_dialect(self.path, other, self.encoding, self.named)
        with open_text(self.path, dialect) as file:
            _, first = next(csv_rows(file, dialect), (None, []))
        cells = {cell.strip() for cell in first} if isinstance(first, list) else set()
        if {*form.text_column_names} <= cells:
            return other
        texts = [name for name in form.column_names if name not in form.label_column_name]
        shorter = replace(form, column_names=tuple(texts))
        if {*self.columns} <= {*texts} and self.fit(shorter) > self.fit(form):
            return shorter
        return form

    def fit(self, form: FileFormat) -> int:
        """Return how many of the first rows have as many fields as `column_names`."""
        dialect = find_dialect(self.path, form, self.encoding)
        with open_text(self.path, dialect) as file:
            rows = [row for _, row in itertools.islice(csv_rows(file, dialect, 1), LOOKED_AT)]
        return sum(len(row) == len(form.column_names) for row in rows if isinstance(row, list))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn errors of the disk and of decoding into a UserError."""
        try:
            yield
        except UnicodeError:
            message = f"{self.path} is not {self.encoding}: save it as UTF-8"
            raise UserError(self.encoding_message() or message) from None
        except (OSError, LookupError) as error:  # LookupError: an encoding that Python lacks
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(f"{self.path} cannot be read: {reason}") from None

    def open_csv(self, dialect: Dialect, digest=None) -> Numbered:
        """Yield header and rows of a CSV file."""
        names = self.form.column_names
        with open_text(self.path, dialect, digest) as file:
            if names:
                yield range(0), [*names]
            yield from csv_rows(file, dialect, len(names or ()))

    def read_header(self) -> list[str]:
        """Return the names of the columns, without blanks around them; some may be blank."""
        lines, header = next(self.rows, (None, None))
        if header is None:
            raise UserError(f"{self.path} is empty: it needs a header and rows")
        if isinstance(header, Bad):
            raise UserError(f"{self.path}, line {lines.start} {header}: correct the header")
        if (fault := broken_text(header)) and (message := self.encoding_message()):
            raise UserError(message)
        if fault:
            advice = REMOVE_BYTES if "UTF-8" in str(fault) else "correct it"
            raise UserError(f"{self.path}: the header {fault}: {advice}")
        header = [name.strip() for name in header]
        if missing := [name for name in self.columns if name not in header]:
            raise UserError(self.missing_message(header, missing))
        if twice := [name for name in self.named if header.count(name) > 1]:
            raise UserError(f"{self.path} has the column {twice[0]!r} more than once: rename one")
        return header

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the number and the fields of each row. Raises: UserError, see the class."""
        number, numbers, width = 0, [], len(self.header)
        with self.reading():
            for number, (lines, row) in enumerate(self.rows, 1):
                fault = self.fault_of(row, width)
                if fault is None:
                    if len(lines) > len(self.longest[0]):
                        self.longest = lines, number
                    yield number, row
                    continue
                self.malformed += 1
                self.droppable &= fault.droppable
                if len(numbers) <= SHOWN:
                    numbers.append(number)
                if self.malformed == 1:
                    place = f"lines {lines.start} to {lines.stop - 1}"
                    place = place if len(lines) > 1 else f"line {lines.start}"
                    self.first_fault = f"row {number} ({place}) {fault}"
        if number == 0:
            raise UserError(f"{self.path} has a header but no rows")
        dropped = self.droppable and self.form.drop_malformed and self.malformed < number
        if self.malformed and not dropped:
            raise UserError(self.malformed_message(number, numbers))

    def frames(self, size: int | None = None) -> Iterator[pd.DataFrame]:
        """Yield the rows as text, `size` at a time or all at once; the index has their numbers."""
        rows = iter(self)
        while taken := list(itertools.islice(rows, size)):
            index, fields = zip(*taken, strict=True)
            yield pd.DataFrame(list(fields), index=index, columns=self.header, dtype=object)

    def remarks(self) -> list[str]:
        """Return what may be wrong with the file, after the last row."""
        found, (lines, number) = [], self.longest
        if self.malformed:
            dropped = f"dropped {plural(self.malformed, 'malformed row')}"
            found.append(f"{self.path}: {dropped}; the first: {self.first_fault}")
        if len(lines) >= MANY_LINES and not self.is_ours:
            span = f"row {number} goes from line {lines.start} to line {lines.stop - 1}"
            found.append(f"{self.path}: {span}: is a quote missing there?")
        if not self.encoding.startswith("utf") and self.health.characters > self.health.broken:
            found.append(f"{self.path} looks like UTF-8, but is read as {self.encoding}")
        if self.encoding == UTF8 and self.is_broken and (flags := self.encoding_flag()):
            found.append(f"{self.path}: rows were dropped that {flags[0]} may read")
        return found

    @property
    def delimiter(self) -> str | None:
        """The delimiter's name as a flag takes it, if it has one."""
        found = self.dialect and self.dialect.delimiter
        return next((name for name, one in DELIMITERS.items() if one == found), None)

    def read_as(self) -> str:
        """Return how the file is read, if that is not usual, as the end of a sentence."""
        if self.dialect is None:
            return " (JSON or Parquet)"
        kinds = [self.delimiter] if self.delimiter != "comma" and len(self.header) > 1 else []
        kinds += [self.dialect.encoding] if self.dialect.encoding != UTF8 else []
        kinds += ["no quoting"] if self.form.quoting == "none" else []
        return f" ({', '.join(kinds)})" if kinds else ""

    # --------------------------------------------------------------------------- what is wrong

    def fault_of(self, row: list[str] | Bad, width: int) -> Bad | None:
        """Say what is wrong with a row. Raises: UserError if the file has another encoding."""
        if isinstance(row, Bad):
            return row
        if len(row) != width:
            names = self.form.flag("column_names", "A,B") if self.form.column_names else ""
            return Bad(f"has {plural(len(row), 'field')}, {names or 'the header'} {width}")
        if (fault := broken_text(row)) and "UTF-8" in str(fault) and not self.is_broken:
            self.is_broken = True
            if not self.form.drop_malformed and (message := self.encoding_message()):
                raise UserError(message)
        return fault

    def malformed_message(self, total: int, numbers: list[int]) -> str:
        """Say which rows are malformed, and what helps."""
        message = f"{self.path}, {self.first_fault}: "
        if self.malformed > 1:
            which = row_list(numbers, self.malformed)
            which = f"all {total:,} rows" if self.malformed == total else which
            message = f"{self.path}: {which} are malformed; {self.first_fault}: "
        if works := self.what_works():
            return f"{message}pass {works}, with which every row can be read"
        if OTHER_END in self.first_fault:
            return message + r"remove carriage returns (tr -d '\r' < OLD.csv > NEW.csv)"
        if not self.droppable:
            return f"{message}correct it"
        width, between = len(self.header), self.delimiter or "delimiter"
        if self.malformed == total and f" {width + 1} fields, the header" in self.first_fault:
            advice = f"quote fields with a {between}, or add a name that the header lacks"
            return f"{message}{advice}, as of a first column"
        advice = "correct them" if self.malformed > 1 else "correct it"
        if "not UTF-8" in self.first_fault:
            advice = REMOVE_BYTES
        if self.form.column_names and " field" in self.first_fault:
            advice = f"name as many columns with {self.form.flag('column_names', 'A,B')}"
        elif " field" in self.first_fault and self.dialect and self.form.quoting != "none":
            advice = f"quote fields that contain a {between}, a quote or a line break"
        if self.malformed < total:
            advice += f", or leave such rows out with {self.form.flag('drop_malformed')}"
        return f"{message}{advice}"

    def works_with(self, form: FileFormat) -> str | None:
        """Return the flag that the file also needs beside another format, if there is one."""
        table = Table(self.path, form, self.columns)
        try:
            for _ in table:
                pass
        except UserError:
            return table.what_works()
        return None

    def what_works(self) -> str | None:
        """Return a flag with which no row is malformed, if there is one."""
        tries = [{"quoting": "none"}] if self.form.quoting != "none" else []
        if len(self.header) == 1 or self.form.delimiter:
            tries += [{"delimiter": name} for name in DELIMITERS]
        for change in tries if self.dialect else ():
            form = replace(self.form, **change)
            dialect = find_dialect(self.path, form, self.encoding, self.columns)
            header, quoted = None, 0
            for _, row in self.open_csv(dialect):
                header = header or row
                if isinstance(row, Bad) or len(row) != len(header) or broken_text(row):
                    break
                if not {*self.columns} <= {*map(str.strip, header)}:
                    break
                quoted += any(field.startswith('"') and field.endswith('"') for field in row)
            else:  # quotes around whole fields are meant to be quotes
                if quoted <= self.malformed:
                    return self.form.flag(*next(iter(change.items())))
        return None

    def missing_message(self, header: list[str], missing: list[str]) -> str:
        """Say which columns are missing, and what the file has instead."""
        form = self.form
        found = [row for _, row in itertools.islice(self.rows, LOOKED_AT)]
        rows = [row for row in found if isinstance(row, list) and len(row) == len(header)]
        message = f"{self.path} has no column {name_list(map(repr, missing))}"
        counts = [{row[0].count(one) for row in rows} for one in DELIMITERS.values()]
        more = len(header) == 1 and any(len(count) == 1 and max(count) > 0 for count in counts)
        if more or 2 * len(rows) < len(found):
            shown = f"its first line {','.join(header)[:60]!r} has other fields than the next lines"
            return f"{message}: {shown}: remove it if it is not the header"
        guess = guess_columns(header, rows)
        if guess.header_is_row and not form.column_names:
            wanted = {"text": form.text_column_names[0], "label": [*form.label_column_name, ""][0]}
            message += ": its first line looks like a row; name its columns with "
            names = [wanted.get(name, name) for name in guess.names]
            if not {*self.columns} <= {*names}:
                return f"{message}{form.flag('column_names', 'A,B')}, one for each of {len(names)}"
            changed = replace(form, column_names=tuple(names))
            more = self.encoding_flag() or [self.works_with(changed)]
            flags = [form.flag("column_names", ",".join(names)), *filter(None, more)]
            return message + " ".join(flags)
        default, flags = FileFormat(), []
        for name, found in ("text_column_names", guess.text), ("label_column_name", guess.label):
            columns = getattr(form, name)
            if {*columns} & {*missing} and columns == getattr(default, name) and can_type(found):
                flags.append(form.flag(name, found))
        if flags:
            return f"{message}: try {' '.join([*flags, *self.encoding_flag()])}"
        names = ("text_column_names", "label_column_name")
        used = [form.flag(name, "NAME") for name in names if {*getattr(form, name)} & {*missing}]
        hint = f": name another with {' '.join(used)}" if used else ""
        return f"{message}; it has {name_list(map(repr, header))}{hint}"

    def encoding_flag(self) -> list[str]:
        """Return the flag that the file also needs if it is not in the encoding to read it in."""
        if self.form.encodings != (UTF8,) or self.health.broken <= self.health.characters:
            return []
        likely = diagnosis.likely_encoding(self.path, [UTF8])
        return [self.form.flag("csv_encoding", likely[0])] if likely else []

    def encoding_message(self) -> str | None:
        """Say which encoding the file has instead of the expected one; None if none is likely."""
        if self.encoding == UTF8 and self.health.characters > self.health.broken:
            return None
        likely = diagnosis.likely_encoding(self.path, [self.encoding])
        if likely is None:
            return None
        name, sample = likely
        message = f"{self.path} is not {self.encoding}: pass {self.form.flag('csv_encoding', name)}"
        message += f", which reads {sample!r} in it"
        if self.health.broken <= SHOWN:
            message += f", or leave such rows out with {self.form.flag('drop_malformed')}"
        return message


def can_type(name: str | None) -> bool:
    """Whether a message can show a column's name as the value of a flag."""
    if name is None or not name.isprintable() or len(name) > 150:
        return False
    return all(len(part) <= 60 for part in name.split(","))


def broken_text(fields: list[str]) -> Bad | None:
    """Say what is wrong with the characters of a row."""
    text = "".join(fields)
    if "\0" in text:
        return Bad("contains a NUL byte")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        is_byte = "\udc80" <= text[error.start] <= "\udcff"
        what = "has a byte that is not UTF-8" if is_byte else "contains half of a surrogate pair"
        return Bad(what)
    return None


def row_list(rows: np.ndarray | list[int], count: int | None = None) -> str:
    """Format row numbers as `row 3`, or `9 rows (3, 5, 8, 9, 12, ...)`.

    count: of all rows, if not all are in `rows`.
    """
    count = len(rows) if count is None else count
    if count == 1:
        return f"row {rows[0]}"
    dots = ", ..." if count > SHOWN else ""
    return f"{count} rows ({', '.join(map(str, rows[:SHOWN]))}{dots})"
