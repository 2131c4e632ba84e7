"""Commands: `python -m script.NAME` runs one."""

import sys

from runtime.startup import one_line_on_interrupt

if sys.argv[0] == "-m":  # a command is about to load its libraries
    one_line_on_interrupt()
