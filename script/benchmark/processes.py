"""What both benchmarks share: processes that end with them, the table and the file of figures."""

import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from runtime.files import run_and_report

SPAWN = multiprocessing.get_context("spawn")


def begin(parent: int) -> None:
    """Let this process end with its parent, and log less."""
    from runtime.processes import end_with_parent  # loads torch, as every contender does

    end_with_parent(parent)
    logging.disable(logging.INFO)


def worker() -> ProcessPoolExecutor:
    """Return a process of its own that calls functions, one after the other."""
    return ProcessPoolExecutor(1, SPAWN, begin, (os.getpid(),))


def child(parent: int, function, *arguments) -> None:
    """Call a function in a process that ends with its parent, whatever the function does."""
    begin(parent)
    sys.exit(run_and_report(function, *arguments))


@contextmanager
def started(function, *arguments) -> Iterator[multiprocessing.Process]:
    """Call a function in a process of its own, which is killed at the end of the block."""
    process = SPAWN.Process(target=child, args=(os.getpid(), function, *arguments))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def format_table(results: dict[str, dict], columns: dict[str, Callable[[dict], str]]) -> str:
    """Format a row of figures for each contender; columns: how to show each one, by title."""
    import pandas as pd  # not in the workers, which import this module

    cells = [[show(row) for show in columns.values()] for row in results.values()]
    return pd.DataFrame(cells, results, columns).to_string()


def write_figures(folder: str, name: str, figures: dict) -> None:
    """Write the figures of a benchmark as JSON, and say where they are."""
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nall figures: {path}")
