"""Guess which columns of a table hold the text and the label, for messages."""

import re
from typing import NamedTuple

TEXT_NAMES = set(  # as key() writes them
    "text texts sentence title headline tweet comment comments commenttext review reviews "
    "reviewtext content message question query utterance body sms".split()
)
LABEL_NAMES = set(
    "label labels class category categoryid target sentiment intent topic tag emotion y".split()
)
NUMBER = re.compile(r"\s*[+-]?[\d.,]*\d%?\s*")
DATE = re.compile(r"(?=.{,40}$).*(\d:\d\d|\d{4}[-/.]\d\d?[-/.]\d|\d[-/.]\d\d?[-/.]\d{4}).*")
# Several words, or a script without blanks between words
WORDS = re.compile(r"(?s).*([^\W\d]\S?\s|[\u0e00-\u0e7f\u3040-\u30ff\u4e00-\u9fff]{4}).*")


class Guess(NamedTuple):
    """What the columns of a table probably are."""

    header_is_row: bool
    names: list[str]
    text: str | None
    label: str | None


def key(name: str) -> str:
    """Return a column's name as it is compared: `Comment Text` and `comment_text` are the same."""
    return re.sub(r"[\W_]", "", name).lower()


def share(pattern: re.Pattern, values: list[str]) -> float:
    """Return the share of values that a pattern matches as a whole."""
    return sum(bool(pattern.fullmatch(value)) for value in values) / max(len(values), 1)


def looks_like_row(header: list[str], rows: list[list[str]]) -> bool:
    """Whether the first line of a table is a row and not the names of the columns."""
    keys, filled = {key(cell) for cell in header}, [cell for cell in header if cell.strip()]
    numbered = [str(number) for number in range(max(2, len(filled)))]  # as pandas names columns
    if (keys & TEXT_NAMES and keys & LABEL_NAMES) or filled == numbered:
        return False
    rows = [row for row in rows if row != header]  # headers repeat if files were joined
    is_row = any(len(cell) > 60 or NUMBER.fullmatch(cell) for cell in filled)
    for place, cell in enumerate(header):
        column = [row[place] for row in rows if cell.strip() and row[place].strip()]
        if len(column) > 2 and share(NUMBER, column) == 1 and not NUMBER.fullmatch(cell):
            return False
        count, is_name = column.count(cell), key(cell) in TEXT_NAMES | LABEL_NAMES
        is_row |= count > 0 and (20 * count >= len(rows) or (count > 1 and not is_name))
    return is_row


def is_label(values: list[str]) -> bool:
    """Whether values look like labels: few, short and repeated."""
    filled = [value for value in values if value.strip()]
    kinds = len(set(filled))
    if len(filled) < 0.9 * len(values) or not 2 <= kinds <= len(values) / 2:
        return False
    too_many = kinds > 20 and share(NUMBER, filled) >= 0.5
    return not too_many and max(map(len, filled)) <= 40 and share(DATE, filled) < 0.5


def text_length(values: list[str]) -> float:
    """Return the mean length of values that look like texts: of several words, mostly distinct."""
    filled = [value for value in values if value.strip()]
    if len(set(filled)) <= len(values) / 2 or share(WORDS, filled) - share(DATE, filled) <= 0.5:
        return 0.0
    return sum(map(len, filled)) / len(filled)


def guess_columns(header: list[str], rows: list[list[str]]) -> Guess:
    """Guess which columns hold the text and the label; a column that is not obvious is None.

    Several label columns of 0 and 1 are joined by commas.

    rows: the first rows after the header, as long as the header. If the first line is itself a
        row, `names` are those to pass as --column_names; otherwise they are the header's.
    """
    is_row, names = looks_like_row(header, rows), [*header]
    if is_row:
        names, rows = [f"column_{place}" for place in range(1, len(header) + 1)], [header, *rows]
    columns = {
        name: [row[place] for row in rows]
        for place, name in enumerate(names)
        if name.strip() and "," not in name and names.count(name) == 1
    }
    texts = [name for name in columns if key(name) in TEXT_NAMES]
    labels = [name for name in columns if key(name) in LABEL_NAMES]
    if len(texts) != 1:
        lengths = {n: text_length(columns[n]) for n in texts or columns if n not in labels}
        first, second = [*sorted(lengths.values(), reverse=True), 0, 0][:2]
        texts = [name for name in lengths if lengths[name] == first > 1.5 * second]
    if len(labels) != 1:
        labels = [n for n in labels or columns if n not in texts and is_label(columns[n])]
    flags = [name for name in columns if {*columns[name]} == {"0", "1"}]
    if len(labels) != 1 and len(flags) > 1 and not is_row:  # a column of 0 and 1 for each label
        labels = [",".join(flags)]
    text, label = (matches[0] if len(matches) == 1 else None for matches in (texts, labels))
    if not is_row:
        return Guess(False, names, text, label)
    renamed = {text: "text", label: "label"}
    names = [renamed.get(name, name) for name in names]
    return Guess(True, names, text and "text", label and "label")
