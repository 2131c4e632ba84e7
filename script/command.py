"""The end of every script that scores runs: its log, and user errors in one line."""

import logging
import sys
from collections.abc import Callable

from runtime.files import UserError


def reported(run: Callable[..., None], *args) -> int:
    """Call `run` with a log; return 0, or 2 after a one-line error that the user can fix."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        run(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
