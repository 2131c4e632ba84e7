"""How to read a file of texts and labels: one value, from the flags to every reader.

`runtime/columns.py` finds it for a run: the flags, what the tuned model remembers, the defaults.
"""

import codecs
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypedDict

from msgspec import Meta

from runtime.files import UserError, name_list, read_json, sha256
from runtime.flags import DELIMITERS, MULTI_LABEL, QUOTINGS, is_encoding

LABEL_SEPARATOR = "|"
UTF8 = "utf-8"
SHOWN = 60  # characters of a text


def plain_name(encoding: str) -> str:
    """Return the name of an encoding: UTF8 for all of its names, and others as they are."""
    return UTF8 if codecs.lookup(encoding).name == UTF8 else encoding


class Reading(TypedDict, total=False):
    """The settings that are remembered, with their types."""

    text_column_names: Annotated[list[str], Meta(min_length=1)]
    text_column_delimiter: str
    label_column_name: str
    label_separator: Annotated[str, Meta(min_length=1)] | None
    column_names: list[str] | None
    delimiter: Literal[tuple(DELIMITERS)] | None
    quoting: Literal[QUOTINGS] | None
    csv_encoding: str
    label_names: dict[str, str] | None


# The settings of a run that say how its files are read; flags of main.py have the same names.
SETTINGS = (*[*Reading.__annotations__][:-1], "drop_empty", "drop_malformed")


class SplitRecord(TypedDict, total=False):
    """The entries of split.json that are used."""

    files: dict[str, str]  # checksums by name
    columns: Reading
    label_names: dict[str, str] | None
    synthetic: bool
    protocol: str
    input: str
    input_sha256: str
    parameters: dict[str, Any]


def read_split_record(path: str | Path, checksum: str | None = None) -> SplitRecord:
    """Return the split.json beside a split file, or {} if it does not list this very file.

    checksum: the file's, if it is known.
    """
    path = Path(path)
    try:
        record = read_json(path.parent / "split.json", SplitRecord)
        return record if record["files"][path.name] == (checksum or sha256(path)) else {}
    except (OSError, KeyError, UserError):  # none, or of another program or file
        return {}


@dataclass(frozen=True)
class FileFormat:
    """The columns, labels and dialect of a CSV file; other kinds of files need the first two."""

    text_column_names: tuple[str, ...] = ("text",)
    text_column_delimiter: str = " [SEP] "  # joins text columns: BERT's own separator
    # One column; several are columns of 0 and 1, one for each label; () if labels are not read.
    label_column_name: tuple[str, ...] = ("label",)
    multi_label: bool = False  # whether a row may have several labels, or none
    label_separator: str = LABEL_SEPARATOR  # of the labels in a cell
    label_names: dict[str, str] | None = None  # {label in the file: name}
    column_names: tuple[str, ...] | None = None  # of a file without a header
    delimiter: str | None = None  # a key of `flags.DELIMITERS`; None: found by the header
    quoting: str = "minimal"  # none: a quote is a character like any other
    encodings: tuple[str, ...] = (UTF8,)  # the first in which the file can be read
    drop_empty: bool = False  # drop rows with a blank text
    drop_malformed: bool = False  # drop rows that cannot be read
    flag_form: str = "--{} {}"  # how messages write a setting and its value

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """Return the format that a run with these settings remembers.

        A file that is not UTF-8 has the remembered encoding. Raises: UserError if Python lacks it.
        """
        known = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
        encoding = known.pop("csv_encoding", UTF8)
        if not is_encoding(encoding):
            raise UserError(f"csv_encoding: Python cannot read files in {encoding[:40]!r}")
        if "label_column_name" in known:
            known["label_column_name"] = known["label_column_name"].split(",")
        for name in {"text_column_names", "label_column_name", "column_names"} & {*known}:
            known[name] = tuple(known[name])
        return cls(
            **known,
            multi_label=settings.get("problem_type") == MULTI_LABEL,
            label_names=settings.get("label_names"),
            encodings=tuple(dict.fromkeys((UTF8, plain_name(encoding)))),
        )

    def check(self) -> None:
        """Raises: UserError if a column is both of texts and of labels."""
        if both := {*self.text_column_names} & {*self.label_column_name}:
            raise UserError(f"--text_column_names: '{min(both)}' is the label column")

    def in_encoding(self, encoding: str | None) -> Self:
        """Return the format of files in this very encoding, if one is given."""
        return replace(self, encodings=(plain_name(encoding),)) if encoding else self

    def flag(self, name: str, value: str = "") -> str:
        """Return a setting as its user writes it, such as `--csv_encoding cp1252`."""
        if not value and self.flag_form != FileFormat.flag_form:
            value = "True"  # only the command line can do without
        return self.flag_form.format(name, shlex.quote(value) if value else "").strip()

    def describe(self, path: str | Path, rows: str, first: str, read_as: str) -> str:
        """Return what was read, in a line: so that a wrong guess is seen at once.

        rows: how many, in words. first: the first text. read_as: see `Table.read_as`.
        """
        columns = f"text from {name_list(self.text_column_names)}"
        if self.label_column_name:
            columns += f", labels from {name_list(self.label_column_name)}"
        shown = first if len(first) <= SHOWN else first[: SHOWN - 1] + "…"
        return f"{path}: {rows}; {columns}{read_as}; the first text: {shown!r}"

    def written_here(self) -> Self:
        """Return the format of a file that this program writes, with the same columns."""
        own = {"column_names": None, "delimiter": "comma", "quoting": "minimal"}
        return replace(self, encodings=(UTF8,), **own)
