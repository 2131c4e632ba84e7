"""Which columns a run reads, and what its labels are called.

A flag decides; else what the trained model remembers; else the split.json beside the training
file, if it lists the file with its checksum; else the defaults. So labels that are numbers in a
file can have names everywhere else.
"""

import re
from argparse import Namespace
from pathlib import Path

from arguments import fill
from runtime.files import UserError, read_json, sha256

DEFAULTS = {
    "text_column_names": ["text"],
    "text_column_delimiter": " [SEP] ",  # BERT's own separator (results/LOG.md)
    "label_column_name": "label",
    "label_names": None,  # {label in the file: name}, in the order of the model's classes
}


def fill_columns(args: Namespace) -> None:
    """Fill in the columns that no flag gives, and the labels' names.

    Raises: UserError if the label column is also a text column.
    """
    model = args.prefix_paths[0] if args.prefix_paths else args.model_name_or_path
    known = read_or_empty(Path(model) / "run.json").get("settings", {})
    if "text_column_names" not in known:
        known = split_columns(args.train_file) if args.do_train else {}
    args.label_names = None
    fill(args, {name: known.get(name, default) for name, default in DEFAULTS.items()})
    if args.label_column_name in args.text_column_names:
        raise UserError(f"--text_column_names: '{args.label_column_name}' is the label column")


def split_columns(path: str | Path) -> dict:
    """Return the columns and label names in the split.json beside a split file, else `DEFAULTS`."""
    split = read_split_record(path)
    return DEFAULTS | {"label_names": split.get("label_names"), **split.get("columns", {})}


def read_split_record(path: str | Path, checksum: str | None = None) -> dict:
    """Return the split.json beside a split file, or {} if it does not list this very file.

    checksum: the file's, if it is known.
    """
    path = Path(path)
    record = read_or_empty(path.parent / "split.json")
    try:
        return record if record["files"][path.name] == (checksum or sha256(path)) else {}
    except (OSError, KeyError, TypeError):
        return {}


def read_or_empty(path: Path) -> dict:
    """Read a JSON object, or return {} if there is none; others report what is wrong with it."""
    try:
        return read_json(path)
    except UserError:
        return {}


def sort_labels(names: set[str], order: dict[str, str] | None) -> list[str]:
    """Sort labels: those with a place in `order` by it, then numbers by value, then words."""
    places = {name: place for place, name in enumerate((order or {}).values())}

    def key(name: str) -> tuple:
        number = re.fullmatch(r"[+-]?\d+(\.\d+)?", name)
        return (places.get(name, len(places)), not number, float(name) if number else 0, name)

    return sorted(names, key=key)
