"""Fail the tests if a process that they started is left at their end."""

import ctypes
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

import psutil
import pytest

PATIENCE = 5.0  # seconds in which processes that are ending may end
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl(2)


@pytest.fixture(autouse=True, scope="session")
def no_process_left() -> Iterator[None]:
    """Check that no process is left, and end those that are. Linux only.

    Orphans count, too: they become children of this process instead of init's.
    """
    if sys.platform != "linux":
        yield
        return
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = running()
    yield
    deadline = time.monotonic() + PATIENCE
    while (left := running(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    while found := running(before):  # a process may start others until it is killed
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, 1)
    assert not left, f"the tests left processes, which were killed: {[*left.values()]}"


def running(besides: Iterable[psutil.Process] = ()) -> dict[psutil.Process, str]:
    """Return the running descendants of this process, with their command lines.

    multiprocessing's tracker of resources does not count: it ends with this process.
    """
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            command = " ".join(process.cmdline())
            if process.status() != psutil.STATUS_ZOMBIE and process not in besides:
                found[process] = command
    return {p: said for p, said in found.items() if "multiprocessing.resource_tracker" not in said}
