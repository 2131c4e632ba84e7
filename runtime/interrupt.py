"""Let Ctrl-C end a program with one line, also while its libraries load."""

import os
import signal
import sys


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
