"""Atomic writes, JSON, checksums, and the exception for errors that the user can fix."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class UserError(Exception):
    """An error the user can fix: one line that says what is wrong, where, and what to do."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all. Raises: UserError if writing fails."""
    new = path.with_name(f"{path.name}.new")
    with writing(path):
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)


def to_json(content: object) -> str:
    """Format as indented JSON with a final line break; NaN is an error."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict:
    """Read a JSON file. Raises: UserError if it is unreadable or not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def read_json_lines(path: Path) -> list[dict]:
    """Read a JSON-lines file; return an empty list if there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
