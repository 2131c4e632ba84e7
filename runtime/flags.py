"""The kinds of values that command-line flags take, and a parser with short errors."""

import argparse
import codecs
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

DELIMITERS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|"}
QUOTINGS = ("minimal", "none")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error in one line and exits with status 2.

    It takes no abbreviated flags, and prints a description as it is.
    """

    def __init__(self, prog: str, description: str, **options) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')} (see {self.prog} --help)\n")

    def given(self, argv: list[str]) -> dict[str, str]:
        """Return the flags on a command line, as they are written there, by their destinations."""
        words = {word.partition("=")[0] for word in argv}
        flags = ((action.dest, flag) for action in self._actions for flag in action.option_strings)
        return {name: flag for name, flag in flags if flag in words}


def number(kind: type, low: float, high: float, *, open_low: bool = False):
    """Make an argparse type: a number within [low, high], or (low, high] if `open_low`.

    A whole number may be written as `3.0`, as scripts for the Trainer often do.
    """

    def convert(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not math.isfinite(found) or (kind is int and found % 1):
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"'{text}' is not a {noun}")
        if not low <= found <= high or (open_low and found == low):
            bound = f"above {low:g}" if open_low else f"{low:g} or more"
            limit = "" if high == math.inf else f" and at most {high:.10g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {bound}{limit}")
        return kind(found)

    return convert


def boolean(text: str) -> bool:
    """Read `True` or `False` as HF's parser does (also yes/no, 1/0)."""
    found = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in found:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return found[text.lower()]


def column_names(text: str) -> list[str]:
    """Split column names such as `title,tags` at the commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"'{text}' contains an empty column name")
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"'{text}' names a column twice")
    return found


def label_columns(text: str) -> str:
    """Check the names of label columns, such as `label` or `toxic,insult`."""
    return ",".join(column_names(text))


def separator(text: str) -> str:
    """Check that a separator is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("'' separates nothing: pass one such as ';'")
    return text


def is_encoding(name: str) -> bool:
    """Whether Python can read files in an encoding."""
    found = None
    with suppress(LookupError, ValueError):  # punycode, for one, cannot be read piece by piece
        pieces = (bytes([byte]) for byte in "a,\n".encode(name))
        found = "".join(codecs.iterdecode(pieces, name))
    return found == "a,\n"


def encoding(text: str) -> str:
    """Check that Python can read files in an encoding."""
    if not is_encoding(text):
        raise argparse.ArgumentTypeError(f"Python cannot read files in '{text}'")
    return text


def path(text: str) -> str:
    """Expand `~`, which a shell leaves as it is in `--flag=~/folder`."""
    return os.path.expanduser(text)


def unused_flag(argv: list[str], useful: set[str]) -> str | None:
    """Return the first flag on a command line, by name, that is not among the useful ones."""
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    return min(given - useful, default=None)


def contains(folder: str, other: str) -> bool:
    """Whether `other` is `folder` or lies in it."""
    return Path(os.path.realpath(other)).is_relative_to(os.path.realpath(folder))


def value(kind=str, metavar: str = "N", **options) -> dict:
    """Return the argparse options of a flag that takes one value."""
    return {"type": kind, "metavar": metavar, **options}


def choice(*words: str) -> dict:
    """Return the argparse options of a flag that takes one of `words`."""
    return {"choices": words}


def fill(settings: dict, defaults: dict) -> None:
    """Set each setting that is None to its default."""
    settings.update({k: v for k, v in defaults.items() if settings[k] is None})
