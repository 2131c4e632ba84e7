"""The labels of rows: what a cell says, which labels are the same, and their order."""

import json
import re
import unicodedata
from ast import literal_eval
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain, compress

import pandas as pd

from runtime.advice import row_list
from runtime.file_format import LABEL_SEPARATOR, FileFormat
from runtime.files import UserError, name_list
from runtime.flags import MULTI_LABEL

TRUE, FALSE = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no", ""}


def label_key(label: str) -> str:
    """Return what equal labels have in common: `1` and `1.0` are equal, and é in both its forms.

    Programs change one into the other: pandas whole numbers with a missing one among them, and
    some systems the form of accents (https://unicode.org/reports/tr15/).
    """
    text = unicodedata.normalize("NFC", label.strip())
    return re.sub(r"^([+-]?\d+)\.0*$", r"\1", text)


def is_list(text: str) -> bool:
    """Whether a cell looks like a list of Python or JSON."""
    return text[:1] == "[" and text[-1:] == "]"


def look_alike_key(label: str) -> str:
    """Return a key that is the same for labels that a reader may take for the same."""
    text = unicodedata.normalize("NFKC", label).casefold()
    visible = (character for character in text if unicodedata.category(character) != "Cf")
    return " ".join("".join(visible).split())


def cell_labels(cell: str, separator: str) -> list[str]:
    """Return the labels in a cell such as `a|b`, `['a', 'b']` or `["a", "b"]`, each once."""
    text = cell.strip()
    parts = list_items(text) if is_list(text) else text.split(separator)
    return list(dict.fromkeys(filter(None, map(str.strip, parts))))


def list_items(text: str) -> list[str]:
    """Return the items of a list that Python, JSON or NumPy wrote."""
    spaced = re.sub(r"""(?<=['"])\s+(?=['"])""", ", ", text)  # NumPy writes ['a' 'b']
    for parse, written in (json.loads, text), (literal_eval, spaced):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return [str(item) for item in parse(written) if item is not None]
    return [item.strip(" '\"") for item in text[1:-1].split(",")]


def read_labels(
    path: str, table: pd.DataFrame, rows: list[int], form: FileFormat, needed: bool
) -> list[list[str]] | None:
    """Return the names of each row's labels, or None if the file has no labels.

    rows: their numbers. needed: blank cells in all rows are an error, too.
    Raises: UserError for a row without a label (in multi-label data, a blank cell means that no
        label applies), and for a column of 0 and 1 with something else.
    """
    names = [*form.label_column_name]
    if not names or not {*names} <= {*table}:
        return None
    if not needed and not any(table[name].str.strip().any() for name in names):
        return None
    if len(names) > 1:
        labels = flagged(path, table, rows, names)
    elif form.multi_label:
        labels = [cell_labels(cell, form.label_separator) for cell in table[names[0]]]
    else:
        labels = [[cell.strip()] for cell in table[names[0]]]
    is_missing = [not form.multi_label and (len(row) != 1 or not row[0]) for row in labels]
    if any(is_missing):
        what = f"'{names[0]}'" if len(names) == 1 else f"single label of {name_list(names)}"
        flag = form.flag("problem_type", MULTI_LABEL)
        raise UserError(
            f"{path}: no {what} in {row_list([*compress(rows, is_missing)])}; fill it in, remove "
            f"such rows, or, if a row may have several labels or none, pass {flag}"
        )
    if form.label_names:
        named = {label_key(label): name for label, name in form.label_names.items()}
        labels = [[named.get(label_key(label), label) for label in row] for row in labels]
    return labels


def flagged(path: str, table: pd.DataFrame, rows: list[int], names: list[str]) -> list[list[str]]:
    """Return the names of the columns that hold 1, of each row. Raises: UserError."""
    columns = []
    for name in names:
        cells = table[name].str.strip().str.casefold()
        odd = ~cells.isin(TRUE | FALSE)
        if odd.any():
            where = row_list([*compress(rows, odd)])
            raise UserError(f"{path}: '{name}' is {cells[odd].iloc[0]!r}, not 0 or 1, in {where}")
        columns.append(cells.isin(TRUE))
    return [[*compress(names, row)] for row in zip(*columns, strict=True)]


def label_numbers(names: list[str]) -> dict[str, int]:
    """Return each label's number by its key; LABEL_0 and so on are numbers too."""
    numbers = {label_key(name): number for number, name in enumerate(names)}
    if all(name == f"LABEL_{number}" for name, number in numbers.items()):
        numbers |= {str(number): number for number in range(len(names))}
    return numbers


def sort_labels(
    labels: Iterable[str], order: dict[str, str] | None, multi_label: bool = False
) -> list[str]:
    """Return each label once, as it is first written: in `order`, then numbers, then words.

    Raises: UserError for one of several labels that contains what joins them in predictions.
    """
    places = {label_key(name): place for place, name in enumerate((order or {}).values())}
    first: dict[str, str] = {}
    for label in labels:
        first.setdefault(label_key(label), label)

    joined = [name for name in first.values() if multi_label and LABEL_SEPARATOR in name]
    if joined:
        what = f"has a {LABEL_SEPARATOR}, which separates several labels in predictions"
        raise UserError(f"label {joined[0]!r} {what}: rename it")

    def sort_key(name: str) -> tuple:
        number = re.fullmatch(r"[+-]?\d+(\.\d+)?", name)
        place = places.get(label_key(name), len(places))
        return (place, not number, float(name) if number else 0, name)

    return sorted(first.values(), key=sort_key)


def label_counts(counts: dict[str, int], without: int = 0) -> str:
    """Format the rows of each label, the most frequent first. without: rows without a label."""
    shown = name_list(f"{name} {count:,}" for name, count in Counter(counts).most_common())
    return shown + f"; {without:,} without a label" * bool(without)


def label_remarks(counts: dict[str, int], form: FileFormat) -> list[str]:
    """Return what may be wrong with labels. counts: of the training rows, by label."""
    remarks, alike = [], {}
    for name in counts:
        alike.setdefault(look_alike_key(name), []).append(name)
    if pairs := [names for names in alike.values() if len(names) > 1]:
        shown = " and ".join(ascii(name[:40]) for name in pairs[0])
        more = f" (and {len(pairs) - 1} more)" if len(pairs) > 1 else ""
        what = f"look alike but count as different{more}: are they the same?"
        remarks.append(f"labels {shown} {what}")
    if joined := joined_labels([*counts]):
        name, separator = joined
        flags = [] if form.multi_label else [form.flag("problem_type", MULTI_LABEL)]
        flags += [form.flag("label_separator", separator)] if separator else []
        advice = f"pass {' '.join(flags)}"
        if form.label_separator != LABEL_SEPARATOR:
            advice = "separate its labels as the others are"
        remarks.append(f"{name[:40]!r} is one label; if it is several, {advice}")
    if single := [name for name, count in counts.items() if count == 1]:
        remarks.append(f"only one row of label {name_list(single)}")
    return remarks


def joined_labels(labels: list[str]) -> tuple[str, str] | None:
    """Return a label that seems to be several, and their separator if it is not the default."""
    for name in labels:
        if is_list(name) or LABEL_SEPARATOR in name:
            return name, ""
    for separator in ",;":
        parts = {name: {*map(str.strip, name.split(separator))} for name in labels}
        uses = Counter(chain.from_iterable(parts.values()))
        for name, several in parts.items():
            if separator in name and any(uses[part] > 1 for part in several):
                return name, separator
    return None
