"""Files as other programs write them are read back row for row, or refused."""

import csv
import itertools
import tempfile
from pathlib import Path

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.csv_reader import Table
from runtime.file_format import FileFormat
from runtime.files import UserError
from runtime.flags import DELIMITERS

QUOTINGS = {"minimal": csv.QUOTE_MINIMAL, "all": csv.QUOTE_ALL, "none": csv.QUOTE_NONE}
ENCODINGS = ("utf-8", "utf-8-sig", "cp1252", "utf-16")
ENDS = ("\n", "\r\n", "\r")
LAYOUTS = ("header", "no header", "index", "nameless")
WRITERS = ("csv", "pandas", "by hand")
KINDS = list(itertools.product(DELIMITERS, QUOTINGS, ENCODINGS, ENDS, LAYOUTS, WRITERS))
CHARACTERS = st.sampled_from(" abcXYZ019.,;|\t\"'\n\réüß€ñ-_/[]{}")


@st.composite
def tables(draw, delimiter, quoting, end):
    """Draw rows with an id, a text that is not blank, and a label."""
    unsafe = (
        {"\n", "\r", delimiter} if quoting == "none" else {"\r", "\n"} if end == "\r" else set()
    )
    text = st.text(CHARACTERS.filter(lambda one: one not in unsafe), min_size=1, max_size=20)
    row = st.tuples(text.filter(str.strip), st.sampled_from(["spam", "ham", "1", "0", "a b"]))
    return draw(st.lists(row, min_size=1, max_size=6))


def write(path, rows, header, kind):
    """Write rows as one program would."""
    delimiter, quoting, encoding, end, layout, writer = kind
    options = {"quoting": QUOTINGS[quoting]}
    options |= {"quotechar": "\b"} if quoting == "none" else {}  # quotes are plain characters
    if layout == "no header":
        header = None
    if writer == "pandas":
        frame = pd.DataFrame(rows, columns=header)
        frame.to_csv(
            path,
            sep=DELIMITERS[delimiter],
            header=header is not None,
            index=False,
            encoding=encoding,
            lineterminator=end,
            **options,
        )
        return
    with open(path, "w", encoding=encoding, newline="") as file:
        lines = rows if header is None else [header, *rows]
        if writer == "csv":
            delimited = csv.writer(
                file, delimiter=DELIMITERS[delimiter], lineterminator=end, **options
            )
            delimited.writerows(lines)
        else:
            for line in lines:
                cells = line
                if quoting != "none":
                    needs = f'{DELIMITERS[delimiter]}"\n\r' if quoting == "minimal" else None
                    cells = [
                        '"' + one.replace('"', '""') + '"'
                        if needs is None or {*one} & {*needs}
                        else one
                        for one in line
                    ]
                file.write(DELIMITERS[delimiter].join(cells) + end)


@settings(deadline=None, max_examples=600)
@given(st.data(), st.sampled_from(KINDS))
def test_files_of_every_dialect_are_read_back_row_for_row(data, kind):
    delimiter, quoting, encoding, end, layout, writer = kind
    rows = data.draw(tables(DELIMITERS[delimiter], quoting, end))
    columns = ["text", "label"]
    if layout == "index":
        rows, columns = [(str(number), *row) for number, row in enumerate(rows)], ["", *columns]
    elif layout == "nameless":
        rows, columns = [(*row, "", "") for row in rows], [*columns, "", ""]
    names = tuple(columns) if layout == "no header" else None
    encodings = (encoding,) if encoding in ("cp1252", "utf-16") else ("utf-8",)
    form = FileFormat(
        column_names=names,
        delimiter=delimiter if names else None,  # no header tells it
        encodings=encodings,
        quoting="none" if quoting == "none" else "minimal",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        write(path, rows, columns, kind)
        try:
            table = Table(path, form, ["text", "label"])
            found = [tuple(row) for _, row in table]
        except UserError as error:
            assert {"\r", "\n"} & {*"".join(map("".join, rows))}, error  # not quoted by its writer
            return
    assert table.header == columns
    if found != rows:
        assert writer == "pandas" and all(row[-1].endswith("\r") for row in rows)
