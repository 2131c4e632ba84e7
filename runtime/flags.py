"""The kinds of values that command-line flags take, and a parser with short errors."""

import argparse
import codecs
import math
import os
from argparse import ArgumentTypeError
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

DELIMITERS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|"}
QUOTINGS = ("minimal", "none")
SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"
path = os.path.expanduser  # a shell leaves `~` as it is in `--flag=~/folder`


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviated flags, whose errors are one line with status 2."""

    def __init__(self, prog: str, description: str, **options) -> None:
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, **options}
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
        value = math.nan
        with suppress(ValueError):
            value = float(text)
        if not math.isfinite(value) or (kind is int and value % 1):
            noun = "whole number" if kind is int else "number"
            raise ArgumentTypeError(f"'{text}' is not a {noun}")
        if not low <= value <= high or (open_low and value == low):
            bound = f"above {low:g}" if open_low else f"{low:g} or more"
            limit = "" if high == math.inf else f" and at most {high:.10g}"
            raise ArgumentTypeError(f"{text} is out of range: must be {bound}{limit}")
        return kind(value)

    return convert


def boolean(text: str) -> bool:
    """Read `True` or `False` as HF's parser does (also yes/no, 1/0)."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ArgumentTypeError(f"'{text}' is neither True nor False")


def column_names(text: str) -> list[str]:
    """Split column names such as `title,tags` at the commas."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ArgumentTypeError(f"'{text}' contains an empty column name")
    if len(set(names)) < len(names):
        raise ArgumentTypeError(f"'{text}' names a column twice")
    return names


def several_columns(label_column_name: str | None) -> bool:
    """Whether the value of --label_column_name is several columns, each of 0 and 1 for a label."""
    return "," in (label_column_name or "")


def label_columns(text: str) -> str:
    """Check the names of label columns, such as `label` or `toxic,insult`."""
    return ",".join(column_names(text))


def separator(text: str) -> str:
    """Check that a separator is not empty."""
    if not text:
        raise ArgumentTypeError("'' separates nothing: pass one such as ';'")
    return text


def is_encoding(name: str) -> bool:
    """Whether Python can read files in an encoding."""
    with suppress(LookupError, ValueError):  # punycode, for one, cannot be read piece by piece
        pieces = (bytes([byte]) for byte in "a,\n".encode(name))
        return "".join(codecs.iterdecode(pieces, name)) == "a,\n"
    return False


def encoding(text: str) -> str:
    """Check that Python can read files in an encoding."""
    if not is_encoding(text):
        raise ArgumentTypeError(f"Python cannot read files in '{text}'")
    return text


def unused_flag(argv: list[str], useful: set[str]) -> str | None:
    """Return the first flag on a command line, by name, that is not among the useful ones."""
    flags = {word.partition("=")[0] for word in argv if word.startswith("--")}
    return min(flags - useful, default=None)


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


# The kinds of most flags.
INF = math.inf
SWITCH = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}  # --flag [True|False]
NAME, STR = value(metavar="NAME"), value(metavar="STR")
FILE, DIR = value(path, "FILE"), value(path, "DIR")
INT, COUNT = value(number(int, 1, INF)), value(number(int, 0, INF))
RATE = value(number(float, 0, 1e30, open_low=True), "LR")
POSITIVE, STEPS = value(number(float, 0, INF, open_low=True), "X"), value(number(float, 0, INF))
TOKENS, SEED = value(number(int, 3, 1e6)), value(number(int, 0, 2**32 - 1))
DROPOUT, PROBABILITY = (value(number(float, 0, high), "P") for high in (0.99, 1))
