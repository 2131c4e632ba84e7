"""Run preprocessing.ipynb headless; see `bash script/preprocess.sh --help`."""

import ast
import base64
import logging
import sys
from argparse import ArgumentTypeError, HelpFormatter
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError

from runtime.files import UserError, run_and_report, writing
from runtime.flags import Parser, encoding

NOTEBOOK = "preprocessing.ipynb"
# Parameters that stay text, even if they look like a number.
TEXTS = (
    "input_file csv_encoding output_dir text_columns cleaning group_by label_column date_column "
    "date_format id_column quoting"
).split()


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
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
    return run_and_report(run, parser.parse_args(argv).p, known)


def run(given: list[tuple[str, str]], known: dict[str, dict]) -> None:
    """Run the notebook with parameters, by name, and print what it printed.

    known: all parameters, from papermill. Raises: UserError, also as the notebook raises it.
    """
    if unknown := sorted({name for name, _ in given} - set(known)):
        raise UserError(f"-p {unknown[0]}: no such parameter; use {', '.join(known)}")
    parameters = {name: parse(name, value, known[name]["default"]) for name, value in given}
    try:
        encoding(parameters.get("csv_encoding", "utf-8"))
    except ArgumentTypeError as error:
        raise UserError(f"-p csv_encoding: {error}; use one such as utf-8 or cp1252") from None

    executed = Path(parameters.get("output_dir", "csv")) / "executed"
    with writing(executed):
        executed.mkdir(parents=True, exist_ok=True)
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
        print_output(nbformat.read(executed / NOTEBOOK, as_version=4))
        raise UserError(error.evalue) from None
    count = save_plots(notebook, executed)
    print_output(notebook)
    print(f"executed notebook and {count} pictures: {executed}")


def parse(name: str, text: str, default: str) -> object:
    """Return the value of a parameter: a Python literal such as `0.7` or `None`, or else text.

    default: as written in the notebook; `None` is a text's value only if it is the default.
    """
    try:
        is_text = name in TEXTS and not text == default == "None"
        return text if is_text else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def save_plots(notebook: nbformat.NotebookNode, folder: Path) -> int:
    """Save the notebook's plots as `picture_1.png` and so on; returns their number."""
    for old in folder.glob("*.png"):
        old.unlink()
    outputs = [
        output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    ]
    plots = [data["image/png"] for data in outputs if "image/png" in data]
    for number, plot in enumerate(plots, start=1):
        (folder / f"picture_{number}.png").write_bytes(base64.b64decode(plot))
    return len(plots)


def print_output(notebook: nbformat.NotebookNode) -> None:
    """Print what the notebook printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    print("".join(output.text for output in outputs if output.get("name") == "stdout"), end="")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
