"""Run preprocessing.ipynb headless; see `bash script/preprocess.sh --help`."""

import ast
import base64
import logging
import sys
from argparse import HelpFormatter
from pathlib import Path

import papermill
from papermill.exceptions import PapermillExecutionError

from runtime.flags import Parser

NOTEBOOK = "preprocessing.ipynb"
# Parameters that stay text, even if they look like a number.
TEXTS = (
    "input_file csv_encoding output_dir text_columns cleaning group_by label_column date_column "
    "date_format id_column"
).split()


def main() -> None:
    """Run from the command line; exits with status 2 after a one-line error the user can fix."""
    known = papermill.inspect_notebook(NOTEBOOK)
    defaults = [f"{name} [{parameter['default']}]" for name, parameter in known.items()]
    parser = Parser(
        "bash script/preprocess.sh",
        "Turn the raw USvideos.csv into split files by running preprocessing.ipynb.",
        epilog="parameters: " + ", ".join(defaults),
        formatter_class=HelpFormatter,
    )
    metavar, usage = ("NAME", "VALUE"), "set a parameter of the notebook; can be repeated"
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=metavar, help=usage)
    parameters = {name: parse(name, value) for name, value in parser.parse_args().p}
    if unknown := sorted(set(parameters) - set(known)):
        parser.exit(2, f"error: -p {unknown[0]}: no such parameter; use {', '.join(known)}\n")

    executed = Path(parameters.get("output_dir", "csv")) / "executed"
    try:
        executed.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.exit(2, f"error: {executed} cannot be written: {error.strerror}\n")
    logging.disable()  # silence papermill's own failure report with its traceback
    try:
        notebook = papermill.execute_notebook(
            NOTEBOOK,
            executed / NOTEBOOK,
            parameters,
            kernel_name="python3",
            progress_bar=sys.stderr.isatty(),
            extra_arguments=["--log-level=CRITICAL"],  # silence the kernel
        )
    except PapermillExecutionError as error:
        if error.ename != "UserError":
            raise
        parser.exit(2, f"error: {error.evalue}\n")
    show(notebook, executed)


def parse(name: str, text: str) -> object:
    """Return the value of a parameter: a Python literal such as `0.7` or `None`, or else text."""
    try:
        return text if name in TEXTS else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def show(notebook, executed: Path) -> None:
    """Print what the notebook printed, and save its plots next to the executed notebook."""
    for old in executed.glob("*.png"):
        old.unlink()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    plots = [one.data["image/png"] for one in outputs if "image/png" in one.get("data", {})]
    for number, plot in enumerate(plots, start=1):
        (executed / f"picture_{number}.png").write_bytes(base64.b64decode(plot))
    print("".join(output.text for output in outputs if output.get("name") == "stdout"), end="")
    print(f"executed notebook and {len(plots)} pictures: {executed}")


if __name__ == "__main__":
    main()
