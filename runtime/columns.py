"""What a tuned model remembers: which columns it reads, its labels' names, its precision.

A flag decides; else what the trained model remembers; else the split.json beside the training
file, if it lists the file with its checksum; else the defaults. So labels that are numbers in a
file can have names everywhere else.
"""

import re
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from arguments import fill
from runtime.files import UserError, read_json, sha256

ENSEMBLE_FOLDER = "prefix-{}"  # of each prefix of an ensemble, in one folder
DEFAULTS = {
    "text_column_names": ["text"],
    "text_column_delimiter": " [SEP] ",  # BERT's own separator (results/LOG.md)
    "label_column_name": "label",
    "label_names": None,  # {label in the file: name}, in the order of the model's classes
}


class Columns(TypedDict, total=False):
    """The settings that tell which columns a run reads."""

    text_column_names: Annotated[list[str], Meta(min_length=1)]
    text_column_delimiter: str
    label_column_name: str
    label_names: dict[str, str] | None


class Settings(Columns, total=False):
    """The settings of a run that are read here."""

    precision: str


class TrainedRun(TypedDict, total=False):
    """The part of run.json, or of the `run` in a checkpoint's state.json, that is read here."""

    settings: Settings


class CheckpointState(TypedDict, total=False):
    """The part of state.json that is read here."""

    run: TrainedRun


class SplitRecord(TypedDict, total=False):
    """The entries of split.json that are used."""

    files: dict[str, str]  # checksums by name
    columns: Columns
    label_names: dict[str, str] | None
    synthetic: bool
    protocol: str
    input: str
    input_sha256: str
    parameters: dict[str, Any]


def model_folders(args: Namespace) -> list[str]:
    """Return the folders of the models that the arguments name."""
    return args.prefix_paths or [args.model_name_or_path]


def fill_columns(args: Namespace) -> None:
    """Fill in the columns that no flag gives, and the labels' names.

    Raises: UserError if the label column is also a text column, or if the folders of several
        prefixes remember different columns.
    """
    folders = model_folders(args)
    found = [remembered_columns(Path(folder)) for folder in folders]
    known = found[0]
    for folder, other in zip(folders, found, strict=True):
        for name in ("text_column_names", "text_column_delimiter", "label_column_name"):
            if getattr(args, name) is None and other.get(name) != known.get(name):
                raise UserError(
                    f"--prefix_paths: {folders[0]} and {folder} were tuned with different --{name}"
                    f" ({known.get(name)} and {other.get(name)}): pass the one to read"
                )
        names, more = known.get("label_names") or {}, other.get("label_names") or {}
        if clash := [label for label in more if names.get(label, more[label]) != more[label]]:
            raise UserError(f"--prefix_paths: label '{clash[0]}' has another name in {folder}")
        if more:
            known = known | {"label_names": names | more}
    if "text_column_names" not in known:
        known = split_columns(args.train_file) if args.do_train else {}
    args.label_names, delimiter = None, args.text_column_delimiter
    fill(args, {name: known.get(name, default) for name, default in DEFAULTS.items()})
    if args.label_column_name in args.text_column_names:
        raise UserError(f"--text_column_names: '{args.label_column_name}' is the label column")
    if delimiter is not None and len(args.text_column_names) == 1:
        raise UserError("--text_column_delimiter needs two --text_column_names or more: omit it")


def is_member(name: str) -> bool:
    """Whether a folder has the name of one prefix of an ensemble."""
    return re.fullmatch(ENSEMBLE_FOLDER.format(r"\d+"), name) is not None


def remembered_columns(folder: Path) -> Settings:
    """Return the columns and the precision that a tuned model or checkpoint remembers, or {}.

    Raises: UserError if its record has other types.
    """
    if is_member(folder.name) and not (folder / "run.json").is_file():
        folder = folder.parent  # one prefix of an ensemble
    if (folder / "run.json").is_file():
        return read_json(folder / "run.json", TrainedRun).get("settings", {})
    if (folder / "state.json").is_file():
        return read_json(folder / "state.json", CheckpointState).get("run", {}).get("settings", {})
    return {}


def precision_for(choice: str, folders: Iterable[str | Path]) -> str:
    """Return the precision to use the models in `folders` with, if a flag chose `choice`.

    "auto" becomes that of their training if it was float32 for all: so they were calibrated.
    bfloat16 stays "auto", since it may be slow on this machine.
    """
    known = set()
    for folder in folders:
        with suppress(UserError):  # the model cannot be opened either, and that says why
            known.add(remembered_columns(Path(folder)).get("precision"))
    return "fp32" if choice == "auto" and known == {"fp32"} else choice


def split_columns(path: str | Path) -> dict:
    """Return the columns and label names in the split.json beside a split file, else `DEFAULTS`."""
    split = read_split_record(path)
    return DEFAULTS | {"label_names": split.get("label_names"), **split.get("columns", {})}


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


def label_numbers(names: list[str]) -> dict[str, int]:
    """Return each label's number; labels without names (LABEL_0, LABEL_1, ...) are numbers too."""
    numbers = {name: number for number, name in enumerate(names)}
    if all(name == f"LABEL_{number}" for name, number in numbers.items()):
        numbers |= {str(number): number for number in range(len(names))}
    return numbers


def sort_labels(names: set[str], order: dict[str, str] | None) -> list[str]:
    """Sort labels: those with a place in `order` by it, then numbers by value, then words."""
    places = {name: place for place, name in enumerate((order or {}).values())}

    def key(name: str) -> tuple:
        number = re.fullmatch(r"[+-]?\d+(\.\d+)?", name)
        return (places.get(name, len(places)), not number, float(name) if number else 0, name)

    return sorted(names, key=key)
