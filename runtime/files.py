"""Atomic writes, checked JSON, checksums, and errors that the user can fix."""

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError

NAME_LENGTH, LIST_LENGTH = 40, 150  # characters of a name, and of a list of names, in a message
MAX_JSON_BYTES = 2**28  # far more than any file of a run
JSON_KINDS = {"int": "a whole number", "float": "a number", "str": "a text"}  # msgspec's, in words
JSON_KINDS |= {"bool": "true or false", "array": "a list", "object": "an object"}


class UserError(Exception):
    """An error the user can fix: one line that says what is wrong, where, and what to do."""


def run_and_report(function: Callable[..., None], *args) -> int:
    """Call a script's function; return the exit status, 2 after the one line of a `UserError`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        function(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def help_or_run(text: str, function: Callable[..., None], argv: list[str]) -> int:
    """Print a script's help if it is asked for, else call its function, see `run_and_report`."""
    if {"-h", "--help"} & {*argv}:
        print(text)
        return 0
    return run_and_report(function, argv)


def plural(count: int, noun: str) -> str:
    """Return a number with its noun, such as `1 row` or `2 rows`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def name_list(names: Iterable[str]) -> str:
    """Format names, such as labels, for a message: `a, b, c and 7 more`, in one short line.

    At most 10 of them, and fewer if they are long; long names are cut.
    """
    names, shown = list(names), ""
    for count, name in enumerate(names):
        name = name if name.isprintable() else ascii(name)[1:-1]  # no line breaks
        if len(name) > NAME_LENGTH:
            name = f"{name[: NAME_LENGTH - 1]}…" + name[0] * (name[0] == name[-1] in "'\"")
        if count == 10 or (shown and len(f"{shown}, {name}") > LIST_LENGTH):
            return f"{shown} and {len(names) - count:,} more"
        shown += f", {name}" if shown else name
    return shown


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all, even if the power fails. Raises: UserError."""
    new = path.with_name(f"{path.name}.new")
    with writing(path):
        new.write_text(text, encoding="utf-8")
        sync(new)
        os.replace(new, path)


def to_json(content: object) -> str:
    """Format as indented JSON with a final line break; NaN is an error."""
    options = {"ensure_ascii": False, "allow_nan": False, "default": msgspec.to_builtins}
    return json.dumps(content, indent=2, **options) + "\n"


def check_regular(path: str | Path) -> None:
    """Check a file before it is opened. Raises: UserError for a pipe or a device.

    Files are read more than once, and a pipe can be read only once; others never end.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"{path} is a pipe or a device: write its content to a file and pass that")


def read_json(path: Path, kind: Any = dict[str, Any], lines: bool = False) -> Any:
    """Read a JSON file as a `kind`: a type that msgspec checks, such as a TypedDict or a Struct.

    lines: the file has one JSON value per line; return a list of them, empty if there is no file.
    Raises: UserError if it is unreadable, too large, nested too deeply or not of this kind.
    """
    check_regular(path)
    if lines and not path.exists():
        return []
    decoder = msgspec.json.Decoder(kind)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
        return (decoder.decode_lines if lines else decoder.decode)(path.read_bytes())
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {in_words(error)}; correct it or restore the file") from None
    except (OSError, ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise UserError(f"{path} cannot be read: {error}") from None


def in_words(error: msgspec.ValidationError) -> str:
    """Return what a JSON value should be, such as `hidden_size: expected a whole number`."""
    what, _, place = str(error).partition(" - at `$")
    what = re.sub(
        "`(.+?)`", lambda m: " or ".join(JSON_KINDS.get(k, k) for k in m[1].split(" | ")), what
    ).replace("enum value", "value")
    return f"{place.strip('.`') or 'the whole file'}: {what[0].lower()}{what[1:]}"


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises: UserError for a pipe or a device."""
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_unchanged(path: str | Path, checksum: str) -> None:
    """Check that a file still has its checksum, after it was read. Raises: UserError."""
    if sha256(path) != checksum:
        raise UserError(f"{path} changed while it was read: start the command again")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
