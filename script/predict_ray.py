"""Predict a folder of CSV or Parquet files on many cores or machines, with Ray Data.

    bash script/predict_ray.sh MODEL TEXTS --output_dir DIR [--workers N] [flags of main.py]

MODEL is a model or adapter folder. Each file of the folder TEXTS becomes DIR/NAME.csv, with the
bytes that `main.py --do_predict` would write as predictions.csv. A file appears when it is whole,
and files that exist are not predicted again, so the same command resumes. A lost worker is started
again and repeats its file. A file that cannot be read is named at the end; the rest is predicted.

With RAY_ADDRESS set, the workers are those of a cluster, whose machines need this program, MODEL,
TEXTS and DIR at the same places. Otherwise there are N workers here [one per core].
"""

import argparse
import os
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import pandas as pd
import ray

import dataset
from arguments import DIR, parse_args
from evaluation.predictions import check_added, prediction_writer
from model.bank_start import find_start
from model.classifier import Classifier
from model.predictions import Predictions
from runtime.columns import fill_columns
from runtime.files import UserError
from runtime.machine import set_up_process
from script.command import reported

FORMATS = (".csv", ".parquet")


class Predictor:
    """A worker: loads the model once, then predicts file after file."""

    def __init__(self, argv: list[str]) -> None:
        set_up_process()
        self.args = args = parse_args(argv)
        fill_columns(args)
        start = find_start(args)
        self.classifier, self.settings = Classifier.of(start, args), start.settings(args)

    def __call__(self, row: dict[str, str]) -> dict[str, str | int]:
        """Predict the file row["path"] into row["output"], by way of row["staging"].

        Returns the rows, or the error.
        """
        output, rows = Path(row["output"]), 0
        with tempfile.TemporaryDirectory(dir=row["staging"]) as staging:
            path = Path(staging) / f"{Path(row['path']).stem}.csv"
            try:
                write_csv(Path(row["path"]), path)
                new = Path(staging) / "predictions.csv"
                args = Namespace(**vars(self.args) | {"test_file": str(path)})
                names, multi_label = self.classifier.labels, self.classifier.multi_label
                file = dataset.open_stream(args, self.settings, names, None)
                check_added(row["path"], file.columns, names, args.reject_below)
                options = file.columns, names, args.safe_csv, args.reject_below
                with prediction_writer(new, *options) as write:
                    for chunk in file:
                        found = Predictions.of(self.classifier.logits(chunk), multi_label)
                        write(chunk.table, found)
                        rows += len(chunk)
            except UserError as error:
                return row | {"rows": 0, "error": str(error).replace(str(path), row["path"])}
            os.replace(new, output)
        return row | {"rows": rows, "error": ""}


def write_csv(path: Path, converted: Path) -> None:
    """Write the content of a file as CSV: a link, or converted from Parquet. Raises: UserError."""
    if path.suffix == ".csv":
        converted.symlink_to(path)
        return
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None
    table.astype(object).where(table.notna(), "").astype(str).to_csv(converted, index=False)


def shards(texts: Path, output_dir: Path) -> list[dict[str, str]]:
    """List the files to predict, each with its output. Raises: UserError if there are none."""
    files = sorted(path for path in texts.glob("*") if path.suffix in FORMATS)
    if not files:
        raise UserError(f"{texts} contains no .csv or .parquet file")
    names = [path.stem for path in files]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{texts} has two files with the name {twice[0]}: rename one")
    pairs = ((path.resolve(), output_dir.resolve() / f"{path.stem}.csv") for path in files)
    return [{"path": str(path), "output": str(output)} for path, output in pairs]


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Predict all files that are not finished yet. Raises: UserError naming those that failed."""
    argv = ["--do_predict", "--model_name_or_path", args.model, "--output_dir", args.output_dir]
    find_start(parse_args([*argv, *flags]))  # a bad flag or model is reported before Ray starts
    texts, output_dir = Path(args.texts), Path(args.output_dir)
    every = shards(texts, output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    left = [row for row in every if not Path(row["output"]).exists()]
    print(f"{len(every)} files, {len(every) - len(left)} of them already finished", flush=True)
    if not left:
        return
    ray.init(num_cpus=args.workers, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    began, workers = time.perf_counter(), min(len(left), int(ray.cluster_resources()["CPU"]))
    with tempfile.TemporaryDirectory(dir=output_dir.resolve(), prefix=".") as staging:
        # what a killed worker has begun there is removed with the folder
        todo = [row | {"staging": staging} for row in left]
        items = ray.data.from_items(todo, override_num_blocks=len(left))
        done = items.map(
            Predictor,
            fn_constructor_args=([*argv, *flags],),
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
        ).take_all()
    rows, seconds = sum(one["rows"] for one in done), time.perf_counter() - began
    print(f"{rows:,} rows in {seconds:.0f} s with {workers} workers: {rows / seconds:,.0f} rows/s")
    if failed := [one for one in done if one["error"]]:
        more = f" (and {len(failed) - 1} more files)" if len(failed) > 1 else ""
        raise UserError(failed[0]["error"] + more)


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("texts", metavar="TEXTS")
    parser.add_argument("--output_dir", **DIR, required=True)
    parser.add_argument("--workers", type=int, metavar="N", help="[one per core]")
    args, flags = parser.parse_known_args(argv)
    return reported(run, args, flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
