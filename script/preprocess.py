"""Run preprocessing.ipynb headless; see `bash script/preprocess.sh --help`."""

import ast
import logging
import sys
from argparse import HelpFormatter
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError

from runtime.files import UserError, run_and_report, writing
from runtime.flags import Parser

NOTEBOOK = "preprocessing.ipynb"
VALUES = "seed drop_malformed top_quantile balance train_share test_share".split()  # not texts


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    known = papermill.inspect_notebook(NOTEBOOK)
    defaults = {name: parameter["default"] for name, parameter in known.items()}
    parser = Parser(
        "bash script/preprocess.sh",
        "Turn the raw USvideos.csv into split files by running preprocessing.ipynb.",
        epilog="parameters: " + ", ".join(f"{name} [{text}]" for name, text in defaults.items()),
        formatter_class=HelpFormatter,
    )
    metavar, usage = ("NAME", "VALUE"), "set a parameter of the notebook; can be repeated"
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=metavar, help=usage)
    return run_and_report(run, parser.parse_args(argv).p, defaults)


def run(given: list[tuple[str, str]], defaults: dict[str, str]) -> None:
    """Run the notebook with parameters, by name, and print what it printed.

    defaults: of all parameters, as written in the notebook.
    Raises: UserError, also as the notebook raises it.
    """
    if unknown := [name for name, _ in given if name not in defaults]:
        raise UserError(f"-p {unknown[0]}: no such parameter; use {', '.join(defaults)}")
    parameters = {name: parse(name, text, defaults[name]) for name, text in given}
    executed = Path(parameters.get("output_dir", "csv")) / "executed"
    with writing(executed):
        executed.mkdir(parents=True, exist_ok=True)
    logging.disable()  # silence papermill's own failure report with its traceback
    path, error = executed / NOTEBOOK, None
    options = {"kernel_name": "python3", "progress_bar": sys.stderr.isatty()}
    quiet = ["--log-level=CRITICAL"]  # of the kernel
    try:
        papermill.execute_notebook(NOTEBOOK, path, parameters, extra_arguments=quiet, **options)
    except PapermillExecutionError as failed:
        if failed.ename != "UserError":
            raise
        error = UserError(failed.evalue)
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    print("".join(output.text for output in outputs if output.get("name") == "stdout"), end="")
    if error:
        raise error
    print(f"executed notebook, with plots: {path}")


def parse(name: str, text: str, default: str) -> object:
    """Return the value of a parameter; `None` is a text's value only if it is the default."""
    if name not in VALUES:
        return None if text == default == "None" else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # the notebook says what is wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
