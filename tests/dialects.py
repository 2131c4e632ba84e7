"""CSV files in several dialects, written and read by Python's csv module alone."""

import csv
import io
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from runtime.flags import DELIMITERS


def read_plain(path: str) -> list[list[str]]:
    """Read a file that this program wrote."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def in_dialect(rows: list[list[str]], delimiter: str, quoting: int, encoding: str) -> bytes:
    """Return a CSV file; no field has a delimiter, a quote or a line break."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=DELIMITERS[delimiter], quoting=quoting).writerows(rows)
    return text.getvalue().encode(encoding)


def read_rows(text: str, width: int, **dialect) -> Iterator[list[str] | None]:
    """Read a CSV file with the csv module; yields None for a row that it refuses.

    width: of the rows; 0 if the first is a header.
    """
    lone = io.StringIO(text, newline="").readline().endswith("\r")  # as on an old Macintosh
    reader = csv.reader(io.StringIO(text, newline="" if lone else "\n"), strict=True, **dialect)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            row = None
        if row or row is None or width == 1:
            width = width or len(row or ())
            yield [""] if row == [] else row


def check_predictions(
    test: Path,
    folder: Path,
    encoding: str | None = None,
    names: list[str] | None = None,
    delimiter: str | None = None,
    quoting: int = csv.QUOTE_MINIMAL,
    drop_malformed: bool = False,
) -> None:
    """Check that predictions.csv has each row's text, in order, and probabilities.

    encoding, names, delimiter: those that a flag says. Without a delimiter the rows may be those
    of any with which the header has the text column. `names` are for a file without a header, which
    may lack the label.
    """
    data, encoding = test.read_bytes(), encoding or "utf-8"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) and encoding == "utf-8":
        encoding = "utf-16"
    is_utf8 = encoding == "utf-8"
    codec, errors = ("utf-8-sig", "surrogateescape") if is_utf8 else (encoding, "strict")
    text, expected = data.decode(codec, errors), []
    headers = [None] if names is None else [None, names, [n for n in names if n != "label"]]
    for one, given in product(DELIMITERS, headers):
        if delimiter and one != delimiter and given:
            continue
        for blanks in False, True:
            dialect = {"delimiter": DELIMITERS[one], "quoting": quoting, "skipinitialspace": blanks}
            rows = list(read_rows(text, len(given or ()), **dialect))
            header = given or [name.strip() for name in (rows.pop(0) if rows else None) or ()]
            if "text" in header:
                good = [row for row in rows if row and len(row) == len(header) and is_text(row)]
                place = header.index("text")
                kept = [row[place] for row in good if row[place].strip()]
                expected.append((kept, len(rows) - len(good)))
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    malformed = json.loads((folder / "run.json").read_text())["data"]["test"].get("malformed", 0)
    assert drop_malformed or not malformed
    assert ([row["text"] for row in found], malformed) in expected, expected
    for row in found:
        shares = [float(v) for k, v in row.items() if k.startswith("probability_")]
        assert all(0 <= share <= 1 for share in shares) and abs(sum(shares) - 1) < 1e-4


def is_text(row: list[str]) -> bool:
    """Whether the fields of a row have neither NUL characters nor parts of others."""
    text = "".join(row)
    return "\0" not in text and text == text.encode("utf-8", "ignore").decode()
