"""Read tables as text, strictly: a malformed row is refused or counted, never misread.

CSV files with four delimiters; `runtime/json_rows.py` reads JSON and Parquet.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pandas as pd
from tokenizers.normalizers import BertNormalizer

from runtime import advice, diagnosis
from runtime.csv_rows import BROKEN, Bad, Dialect, csv_rows, find_dialect, row_fault
from runtime.file_format import UTF8, FileFormat, read_split_record
from runtime.files import UserError, plural, sha256
from runtime.flags import DELIMITERS
from runtime.json_rows import json_rows, parquet_rows

NORMALIZER = BertNormalizer(lowercase=True)
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

    def __init__(self, path: str | Path, form: FileFormat, columns: Sequence[str] = ()) -> None:
        """Open a file and read its header. columns: those that are used.

        Raises: UserError for a file that is missing, empty, a pipe or no table, and if a column is
        missing or occurs twice.
        """
        self.path, self.form, self.columns = path, form, columns
        self.bad_rows: list[int] = []  # the numbers of malformed rows
        self.fault, self.first_fault = None, ""  # of the first malformed row; in words
        self.droppable, self.is_broken = True, False  # whether a row has bytes that are not UTF-8
        self.longest = range(0), 0  # the lines of the longest row, and its number
        self.dialect: Dialect | None = None  # None: not CSV
        with self.reading():
            self.sha256 = sha256(path)
            if what := diagnosis.not_csv(path):
                raise UserError(f"{path} is not a CSV file but {what}")
            if read_split_record(path, self.sha256):
                self.form = form.written_here()
            self.is_ours = self.form is not form  # a file of split.sh, which has named its faults
            self.characters, self.broken = diagnosis.utf8_health(path)
            self.is_utf8 = self.characters > self.broken  # and not ASCII alone
            self.encoding = self.find_encoding()
            self.rows = parquet_rows(path) or json_rows(path, Dialect(self.encoding))
            if self.rows is None:
                if self.form.column_names:
                    self.form = self.with_names()
                self.dialect = find_dialect(path, self.form, self.encoding, self.named).dialect
                self.rows = csv_rows(path, self.dialect, self.form.column_names)
            self.header = self.read_header()

    @property
    def malformed(self) -> int:
        """How many rows are malformed, after the last row."""
        return len(self.bad_rows)

    @property
    def named(self) -> list[str]:
        """The columns by which the header is recognised."""
        return [*self.form.text_column_names, *self.form.label_column_name, *self.columns]

    @cached_property
    def likely_encoding(self) -> tuple[str, str] | None:
        """The encoding that the file has instead of the one in which it is read, and a sample."""
        if self.encoding == UTF8 and self.is_utf8:
            return None
        return diagnosis.likely_encoding(self.path, self.encoding)

    def find_encoding(self) -> str:
        """Return the first encoding of the format in which the file can be read."""
        first, *others = self.form.encodings
        with open(self.path, "rb") as file:
            if first == UTF8 and file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                return "utf-16"
        return others[0] if others and self.broken > self.characters else first

    def with_names(self) -> FileFormat:
        """Return the format whose `column_names` fit the file: none if it has a header.

        So a model that was tuned on a file without a header also reads files that have one, and
        those of texts alone.
        """
        form, path, encoding = self.form, self.path, self.encoding
        bare = replace(form, column_names=None, delimiter=None)
        if {*form.text_column_names} <= find_dialect(path, bare, encoding, self.named).header:
            return bare
        texts = [name for name in form.column_names if name not in form.label_column_name]
        short = replace(form, column_names=tuple(texts))
        alike = [find_dialect(path, choice, encoding).alike for choice in (short, form)]
        fits = {*self.columns} <= {*texts} and alike[0] > alike[1]
        return short if fits else form

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn errors of the disk and of decoding into a UserError."""
        try:
            yield
        except UnicodeError:
            message = f"{self.path} is not {self.encoding}: save it as UTF-8"
            raise UserError(advice.another_encoding(self) or message) from None
        except (OSError, LookupError) as error:  # LookupError: an encoding that Python lacks
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(f"{self.path} cannot be read: {reason}") from None

    def read_header(self) -> list[str]:
        """Return the names of the columns, without blanks around them; some may be blank."""
        lines, header = next(self.rows, (None, None))
        if header is None:
            raise UserError(f"{self.path} is empty: it needs a header and rows")
        if isinstance(header, Bad):
            raise UserError(f"{self.path}, line {lines.start} {header.fault}: correct the header")
        if fault := row_fault(header, len(header)):
            message = f"{self.path}: the header {fault.fault}: {fault.advice or 'correct it'}"
            raise UserError(advice.another_encoding(self) or message)
        header = [name.strip() for name in header]
        if missing := [name for name in self.columns if name not in header]:
            raise UserError(advice.missing_columns(self, header, missing))
        if twice := [name for name in self.named if header.count(name) > 1]:
            raise UserError(f"{self.path} has the column {twice[0]!r} more than once: rename one")
        return header

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the number and the fields of each row. Raises: UserError, see the class."""
        number = 0
        with self.reading():
            for number, (lines, row) in enumerate(self.rows, 1):
                fault = row_fault(row, len(self.header))
                if fault is None:
                    if len(lines) > len(self.longest[0]):
                        self.longest = lines, number
                    yield number, row
                    continue
                if not self.bad_rows:
                    place = f"lines {lines.start} to {lines.stop - 1}"
                    place = place if len(lines) > 1 else f"line {lines.start}"
                    self.fault, self.first_fault = fault, f"row {number} ({place}) {fault.fault}"
                self.bad_rows.append(number)
                self.droppable &= fault.droppable
                self.is_broken |= fault is BROKEN
        if number == 0:
            raise UserError(f"{self.path} has a header but no rows")
        dropped = self.droppable and self.form.drop_malformed and self.malformed < number
        if self.malformed and not dropped:
            is_other = self.is_broken and not self.form.drop_malformed
            message = is_other and advice.another_encoding(self)
            raise UserError(message or advice.malformed_rows(self, number))

    def frames(self, size: int | None = None) -> Iterator[pd.DataFrame]:
        """Yield the rows as text, `size` at a time or all at once; the index has their numbers."""
        rows = iter(self)
        while taken := list(itertools.islice(rows, size)):
            index, fields = zip(*taken, strict=True)
            yield pd.DataFrame(list(fields), index=index, columns=self.header, dtype=object)

    def remarks(self) -> list[str]:
        """Return what may be wrong with the file, after the last row."""
        remarks, (lines, number) = [], self.longest
        if self.malformed:
            dropped = f"dropped {plural(self.malformed, 'malformed row')}"
            remarks.append(f"{self.path}: {dropped}; the first: {self.first_fault}")
        if len(lines) >= MANY_LINES and not self.is_ours:
            span = f"row {number} goes from line {lines.start} to line {lines.stop - 1}"
            remarks.append(f"{self.path}: {span}: is a quote missing there?")
        if not self.encoding.startswith("utf") and self.is_utf8:
            remarks.append(f"{self.path} looks like UTF-8, but is read as {self.encoding}")
        if self.is_broken and (flag := advice.encoding_flag(self)):
            remarks.append(f"{self.path}: rows were dropped that {flag} may read")
        return remarks

    @property
    def delimiter(self) -> str | None:
        """The delimiter's name as a flag takes it, if it has one."""
        names = {character: name for name, character in DELIMITERS.items()}
        return names.get(self.dialect.delimiter) if self.dialect else None

    def read_as(self) -> str:
        """Return how the file is read, if that is not usual, as the end of a sentence."""
        if self.dialect is None:
            return " (JSON or Parquet)"
        kinds = [self.delimiter] if self.delimiter != "comma" and len(self.header) > 1 else []
        kinds += [self.dialect.encoding] if self.dialect.encoding != UTF8 else []
        kinds += ["no quoting"] if self.form.quoting == "none" else []
        return f" ({', '.join(kinds)})" if kinds else ""
