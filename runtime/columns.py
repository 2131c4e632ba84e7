"""How to read a run's files, and its precision: from flags, tuned models and split.json.

A flag decides; else what the tuned model remembers; else the split.json beside the training file,
if it lists the file with its checksum; else the defaults. So labels that are numbers in a file can
have names everywhere else.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from runtime.csv_reader import Table
from runtime.file_format import SETTINGS, FileFormat, Reading, read_split_record
from runtime.files import UserError, read_json
from runtime.flags import MULTI_LABEL, fill, several_columns

MEMBER_FOLDER = "prefix-{}"  # of each prefix of an ensemble, in one folder
DEFAULTS = {  # of the settings that are never unset
    "text_column_names": ["text"],
    "label_column_name": "label",
    "csv_encoding": "utf-8",
}


class Settings(Reading, total=False):
    """The settings of a run that are read here."""

    precision: str


class Run(TypedDict, total=False):
    """The part of run.json that is read here."""

    settings: Settings


class Checkpoint(TypedDict, total=False):
    """The part of a checkpoint's state.json that is read here."""

    run: Run


def model_folders(settings: dict[str, Any]) -> list[str]:
    """Return the folders of the models that the settings of a run name."""
    return settings["prefix_paths"] or [settings["model_name_or_path"]]


def fill_format(settings: dict[str, Any]) -> FileFormat:
    """Fill in the settings of reading files that no flag sets; returns them as one value.

    `text_column_delimiter` stays None if neither a flag nor the tuned model sets it.

    Raises: UserError if they contradict each other, or if the folders of several prefixes
        remember different ones.
    """
    first, *others = model_folders(settings)
    known = remembered_settings(Path(first))
    for folder in others:
        other = remembered_settings(Path(folder))
        for name in SETTINGS:
            if settings[name] is None and other.get(name) != known.get(name):
                raise UserError(
                    f"--prefix_paths: {first} and {folder} were tuned with different --{name}"
                    f" ({known.get(name)} and {other.get(name)}): pass the one to read"
                )
        names, more = known.get("label_names") or {}, other.get("label_names") or {}
        if clash := [label for label in more if names.get(label, more[label]) != more[label]]:
            raise UserError(f"--prefix_paths: label '{clash[0]}' has another name in {folder}")
        known = known | {"label_names": names | more or None}
    if "text_column_names" not in known:
        known = split_settings(settings["train_file"]) if settings["do_train"] else {}
    settings["label_names"] = known.get("label_names")
    encoding, delimiter = settings["csv_encoding"], settings["text_column_delimiter"]
    fill(settings, {name: known.get(name, DEFAULTS.get(name)) for name in SETTINGS})
    if delimiter is not None and len(settings["text_column_names"]) == 1:
        raise UserError("--text_column_delimiter needs two --text_column_names or more: omit it")
    if several_columns(settings["label_column_name"]):
        fill(settings, {"problem_type": MULTI_LABEL})
    form = FileFormat.from_settings(settings).in_encoding(encoding)
    form.check()
    if settings["do_train"] and settings["column_names"] and not settings["delimiter"]:
        table = Table(settings["train_file"], form)
        if not table.is_ours:  # then split.json has the delimiter, which no header tells
            settings["delimiter"] = table.delimiter
    return replace(form, delimiter=settings["delimiter"])


def is_member(name: str) -> bool:
    """Whether a folder has the name of one prefix of an ensemble."""
    return bool(re.fullmatch(MEMBER_FOLDER.format(r"\d+"), name))


def remembered_settings(folder: Path) -> Settings:
    """Return how a tuned model or checkpoint reads files, and its precision, or {}.

    Raises: UserError if its record has other types.
    """
    if is_member(folder.name) and not (folder / "run.json").is_file():
        folder = folder.parent  # one prefix of an ensemble
    if (folder / "run.json").is_file():
        return read_json(folder / "run.json", Run).get("settings", {})
    if (folder / "state.json").is_file():
        return read_json(folder / "state.json", Checkpoint).get("run", {}).get("settings", {})
    return {}


def precision_for(choice: str, folders: Iterable[str | Path]) -> str:
    """Return the precision to use the models in `folders` with, if a flag chose `choice`.

    "auto" becomes that of their training if it was float32 for all: so they were calibrated.
    bfloat16 stays "auto", since it may be slow on this machine.
    """
    trained_in = set()
    for folder in folders if choice == "auto" else ():
        with suppress(UserError):  # the model cannot be opened either, and that says why
            trained_in.add(remembered_settings(Path(folder)).get("precision"))
    return "fp32" if trained_in == {"fp32"} else choice


def split_settings(path: str | Path) -> Reading:
    """Return the settings and label names in the split.json beside a split file, else {}."""
    split = read_split_record(path)
    return {"label_names": split.get("label_names"), **split.get("columns", {})}
