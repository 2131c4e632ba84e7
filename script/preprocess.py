"""Run preprocessing.ipynb headless; see `bash script/preprocess.sh --help`."""

import argparse
import ast
import base64
import logging
import sys
from pathlib import Path

import papermill
from papermill.exceptions import PapermillExecutionError

NOTEBOOK = "preprocessing.ipynb"
EXECUTED = Path("csv/executed")
# Parameters that are words, even where they look like a number.
TEXTS = ("input_file", "csv_encoding", "output_dir", "text_columns", "cleaning", "group_by")


def main() -> int:
    """Returns the exit status: 0, or 2 after one line about what the user can mend."""
    known = papermill.inspect_notebook(NOTEBOOK)
    parser = argparse.ArgumentParser(
        prog="script/preprocess.sh",
        description="Raw USvideos.csv to split files, by preprocessing.ipynb.",
        epilog="parameters: "
        + ", ".join(f"{name} [{about['default']}]" for name, about in known.items()),
    )
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a parameter of the notebook; can be repeated",
    )  # fmt: skip
    parameters = dict(parser.parse_args().p)
    if unknown := sorted(set(parameters) - set(known)):
        print(f"error: -p {unknown[0]}: the parameters are {', '.join(known)}", file=sys.stderr)
        return 2

    EXECUTED.mkdir(parents=True, exist_ok=True)
    logging.disable()  # papermill's own report of a failure, with its traceback
    try:
        notebook = papermill.execute_notebook(
            NOTEBOOK,
            EXECUTED / NOTEBOOK,
            {name: literal(name, value) for name, value in parameters.items()},
            kernel_name="python3",
            progress_bar=sys.stderr.isatty(),
            extra_arguments=["--log-level=CRITICAL"],  # the kernel's own talk
        )
    except PapermillExecutionError as error:
        if error.ename != "DataError":
            raise
        print(f"error: {error.evalue}", file=sys.stderr)
        return 2
    show(notebook)
    return 0


def literal(name: str, text: str) -> object:
    """A parameter's value: `0.7`, `True` and `None` as Python has them, else the text it is."""
    if name in TEXTS:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def show(notebook) -> None:
    """Print what the notebook printed, and put its pictures beside the executed copy."""
    for old in EXECUTED.glob("*.png"):
        old.unlink()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [
        output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    for number, picture in enumerate(pictures, start=1):
        (EXECUTED / f"picture_{number}.png").write_bytes(base64.b64decode(picture))
    print("".join(output.text for output in outputs if output.get("name") == "stdout"), end="")
    print(f"executed notebook and {len(pictures)} pictures: {EXECUTED}")


if __name__ == "__main__":
    sys.exit(main())
