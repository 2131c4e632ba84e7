"""Run preprocessing.ipynb headless; see `bash script/preprocess.sh --help`."""

import logging
import sys
from argparse import HelpFormatter
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError

from runtime.files import UserError, run_and_report, writing
from runtime.flags import Parser
from script.youtube import check_parameters

NOTEBOOK = "preprocessing.ipynb"


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    known = papermill.inspect_notebook(NOTEBOOK)
    defaults = (f"{name} [{parameter['default']}]" for name, parameter in known.items())
    parser = Parser(
        "bash script/preprocess.sh",
        "Turn the raw USvideos.csv into split files by running preprocessing.ipynb.",
        epilog="parameters: " + ", ".join(defaults),
        formatter_class=HelpFormatter,
    )
    metavar, usage = ("NAME", "VALUE"), "set a parameter of the notebook; can be repeated"
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=metavar, help=usage)
    return run_and_report(run, dict(parser.parse_args(argv).p))


def run(texts: dict[str, str]) -> None:
    """Run the notebook with parameters, and print what it printed.

    Raises: UserError, also as the notebook raises it.
    """
    parameters = check_parameters(**texts)
    executed = Path(parameters.get("output_dir", "csv")) / "executed"
    with writing(executed):
        executed.mkdir(parents=True, exist_ok=True)
    logging.disable()  # silence papermill's own failure report with its traceback
    path, error = executed / NOTEBOOK, None
    options = {"kernel_name": "python3", "progress_bar": sys.stderr.isatty()}
    quiet = ["--log-level=CRITICAL"]  # of the kernel
    try:
        notebook = papermill.execute_notebook(
            NOTEBOOK, path, parameters, extra_arguments=quiet, **options
        )
    except PapermillExecutionError as failed:
        if failed.ename != "UserError":
            raise
        notebook, error = nbformat.read(path, as_version=4), UserError(failed.evalue)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    print("".join(output.text for output in outputs if output.get("name") == "stdout"), end="")
    if error:
        raise error
    print(f"executed notebook, with plots: {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
