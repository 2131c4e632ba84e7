"""Say why a table cannot be read, and which flags or commands help."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from runtime.csv_rows import LOOKED_AT, csv_rows, find_dialect, row_fault
from runtime.file_format import UTF8, FileFormat
from runtime.files import name_list
from runtime.flags import DELIMITERS
from runtime.guess import guess_columns

if TYPE_CHECKING:
    from runtime.csv_reader import Table

SHOWN = 5  # numbers of rows in a message


def row_list(rows: Sequence[int]) -> str:
    """Format row numbers as `row 3`, or `9 rows (3, 5, 8, 9, 12, ...)`."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    dots = ", ..." if len(rows) > SHOWN else ""
    return f"{len(rows)} rows ({', '.join(map(str, rows[:SHOWN]))}{dots})"


def malformed_rows(table: "Table", total: int) -> str:
    """Say which of all rows are malformed, and what helps."""
    form, fault, count, width = table.form, table.fault, table.malformed, len(table.header)
    which = f"all {total:,} rows" if count == total else row_list(table.bad_rows)
    which = f": {which} are malformed; " if count > 1 else ", "
    message, between = f"{table.path}{which}{table.first_fault}: ", table.delimiter or "delimiter"
    if flag := working_flag(table, form, width):
        return f"{message}pass {flag}, with which every row can be read"
    advice = fault.advice or f"correct {'them' if count > 1 else 'it'}"
    if fault.fields and form.column_names:
        advice = f"name as many columns with {form.flag('column_names', 'A,B')}"
    elif fault.fields == width + 1 and count == total:
        advice = f"quote fields with a {between}, or add the name of a first column"
    elif fault.fields and form.quoting != "none":
        advice = f"quote fields that contain a {between}, a quote or a line break"
    if table.droppable and count < total:
        advice += f", or leave such rows out with {form.flag('drop_malformed')}"
    return message + advice


def working_flag(table: "Table", form: FileFormat, width: int) -> str | None:
    """Return the flag with which every row can be read, "" if none is needed; None if none helps.

    width: the number of columns in this format.
    """
    if table.dialect is None:
        return None
    usual, _ = trial(table, form)
    changes = [("quoting", "none")] if form.quoting != "none" else []
    if form.delimiter or width == 1:
        changes += [("delimiter", name) for name in DELIMITERS]
    for name, value in changes if usual else ():
        malformed, quoted = trial(table, replace(form, **{name: value}))
        if not malformed and quoted <= usual:  # else quotes around fields are meant to be quotes
            return form.flag(name, value)
    return None if usual else ""


def trial(table: "Table", form: FileFormat) -> tuple[float, int]:
    """Return how many rows are malformed in another format, and how many have quotes left."""
    dialect = find_dialect(table.path, form, table.encoding, table.columns).dialect
    rows = (row for _, row in csv_rows(table.path, dialect, form.column_names))
    header, malformed, quoted = next(rows, None), 0, 0
    if not isinstance(header, list) or not {*table.columns} <= {*map(str.strip, header)}:
        return math.inf, 0
    for row in rows:
        if row_fault(row, len(header)):
            malformed += 1
        else:
            quoted += any(field.startswith('"') and field.endswith('"') for field in row)
    return malformed, quoted


def missing_columns(table: "Table", header: list[str], missing: list[str]) -> str:
    """Say which columns are missing, and what the file has instead."""
    form, texts, labels = table.form, "text_column_names", "label_column_name"
    first = [row for _, row in itertools.islice(table.rows, LOOKED_AT)]
    rows = [row for row in first if isinstance(row, list) and len(row) == len(header)]
    message = f"{table.path} has no column {name_list(map(repr, missing))}"
    if form.delimiter and (flag := working_flag(table, form, len(header))):
        return f"{message}: pass {flag}"
    if 2 * len(rows) < len(first):
        shown = f"its first line {','.join(header)[:60]!r} has other fields than the next lines"
        return f"{message}: {shown}: remove it if it is not the header"
    encoding, guess = encoding_flag(table), guess_columns(header, rows)
    if guess.header_is_row and not form.column_names:
        message += ": its first line looks like a row; name its columns with "
        own = {"text": form.text_column_names[0], "label": [*form.label_column_name, ""][0]}
        names = tuple(own.get(name, name) for name in guess.names)
        if not {*table.columns} <= {*names}:
            return f"{message}{form.flag('column_names', 'A,B')}, one for each of {len(names)}"
        more = encoding or working_flag(table, replace(form, column_names=names), len(names))
        return f"{message}{form.flag('column_names', ','.join(names))} {more or ''}".strip()
    lacking = [name for name in (texts, labels) if {*getattr(form, name)} & {*missing}]
    flags = [
        form.flag(name, column)
        for name, column in ((texts, guess.text), (labels, guess.label))
        if name in lacking and getattr(form, name) == getattr(FileFormat, name) and can_type(column)
    ]
    if flags:
        return f"{message}: try {' '.join([*flags, encoding])}".strip()
    hint = f": name another with {' '.join(form.flag(name, 'NAME') for name in lacking)}"
    return f"{message}; it has {name_list(map(repr, header))}{hint if lacking else ''}"


def can_type(name: str | None) -> bool:
    """Whether a message can show a column's name as the value of a flag."""
    if name is None or not name.isprintable() or len(name) > 150:
        return False
    return all(len(part) <= 60 for part in name.split(","))


def encoding_flag(table: "Table") -> str:
    """Return the flag with which a file that is read as UTF-8 has its likely encoding, or ""."""
    if table.encoding != UTF8 or table.broken <= table.characters or not table.likely_encoding:
        return ""
    return table.form.flag("csv_encoding", table.likely_encoding[0])


def another_encoding(table: "Table") -> str | None:
    """Say which encoding the file has instead of the one in which it is read, if one is likely."""
    if not table.likely_encoding:
        return None
    (name, sample), form = table.likely_encoding, table.form
    message = f"{table.path} is not {table.encoding}: pass {form.flag('csv_encoding', name)}"
    message += f", which reads {sample!r} in it"
    if table.broken <= SHOWN:
        message += f", or leave such rows out with {form.flag('drop_malformed')}"
    return message
