"""The first moments of a program, before its libraries load."""

import os
import signal
import sys
from importlib.util import find_spec

# Limit how long OpenMP threads spin at a barrier before they sleep; libgomp reads it when torch
# loads it. By default they spin so long that training beside other processes is ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def open_closed_streams() -> None:
    """Replace standard streams that are closed, whose numbers another file would get."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def check_packages(*packages: str) -> None:
    """End the program with one line and exit status 2 if one is not installed."""
    for package in packages:
        if not find_spec(package):
            advice = "run bash script/run_og.sh once, then use .venv/bin/python"
            print(f"error: {package} is not installed here; {advice}", file=sys.stderr)
            sys.exit(2)


def one_line_on_interrupt() -> None:
    """Let Ctrl-C end this program with one line and exit status 130 instead of a traceback.

    While libraries load, KeyboardInterrupt is of no use: C++ aborts on it, or an import that it
    broke is tried again and fails. A program's `main` is defined when they have loaded.
    """
    usual = sys.excepthook

    def stop(*_) -> None:
        if hasattr(sys.modules["__main__"], "main"):
            raise KeyboardInterrupt
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)

    def hook(kind: type, *rest) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            return usual(kind, *rest)
        print("interrupted", file=sys.stderr)
        raise SystemExit(130)

    sys.excepthook = hook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, stop)
