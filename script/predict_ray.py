"""Predict a folder of files on many cores or machines, with Ray Data.

    bash script/predict_ray.sh MODEL TEXTS --output_dir DIR [--workers N] [flags of main.py]

MODEL is a model or adapter folder. Each CSV, TSV, JSON lines or Parquet file of the folder TEXTS
becomes DIR/NAME.csv, with the bytes that `main.py --do_predict` would write as predictions.csv.
Beside it, DIR/NAME.json records the model, the input and the flags by their checksums and values. A
file appears when it is whole, and is not predicted again if its record fits, so the same command
resumes. If the record differs, nothing is predicted; --overwrite_output_dir predicts such files
again. A lost worker is started again and repeats its file. A file that cannot be read is named at
the end; the rest is predicted.

With RAY_ADDRESS set, the workers are those of a cluster, whose machines need this program, MODEL,
TEXTS and DIR at the same places. Otherwise there are N workers here [one per core].
"""

import os
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import ray

import dataset
from arguments import DIR, INT, SWITCH, parse_args
from evaluation.predictions import check_added, prediction_writer
from model.bank_start import find_start
from model.classifier import Classifier
from model.predictions import Predictions
from model.start import Start
from runtime.columns import fill_format
from runtime.file_format import SETTINGS, FileFormat
from runtime.files import (
    UserError,
    read_json,
    run_and_report,
    sha256,
    sync,
    to_json,
    write_text,
    writing,
)
from runtime.flags import Parser, unused_flag
from runtime.machine import set_up_process
from runtime.record import Record, describe_run, run_differences

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
SHOWN = 5  # names of skipped entries
FLAGS = {f"--{name}" for name in SETTINGS} | set(  # of main.py that change predictions
    "--problem_type --safe_csv --reject_below --max_seq_length --per_device_eval_batch_size "
    "--precision".split()
)


class PredictionRecord(Record, total=False):
    """What NAME.json records of NAME.csv: the entries of run.json, and the checksum of the file."""

    predictions_sha256: str


class Predictor:
    """A worker: loads the model once, then predicts file after file."""

    def __init__(self, argv: list[str], record: dict) -> None:
        set_up_process()
        self.args, start, self.form = open_model(argv)
        self.classifier = Classifier.of(start, self.args)
        self.record = record

    def __call__(self, row: dict[str, str]) -> dict[str, str | int]:
        """Predict the file row["path"] into row["output"], by way of row["staging"].

        Returns the rows, or the error.
        """
        output, rows = Path(row["output"]), 0
        with tempfile.TemporaryDirectory(dir=row["staging"]) as staging:
            try:
                new = Path(staging) / "predictions.csv"
                args = Namespace(**vars(self.args) | {"test_file": row["path"]})
                names, multi_label = self.classifier.labels, self.classifier.multi_label
                file = dataset.open_stream(args, self.form, names, None)
                check_added(row["path"], file.columns, names, args.reject_below)
                options = file.columns, names, args.safe_csv, args.reject_below
                with prediction_writer(new, *options) as write:
                    for chunk in file:
                        found = Predictions.of(self.classifier.logits(chunk), multi_label)
                        write(chunk.table, found)
                        rows += len(chunk)
                data = {"test": dataset.described(file)}
                record = self.record | {"data": data, "predictions_sha256": sha256(new)}
                write_text(Path(staging) / "record.json", to_json(record))
                with writing(output):
                    sync(new)
                    # the record first: it fits no other predictions than those that follow it
                    os.replace(Path(staging) / "record.json", output.with_suffix(".json"))
                    os.replace(new, output)
            except UserError as error:
                return row | {"rows": 0, "error": str(error)}
        return row | {"rows": rows, "error": ""}


def open_model(argv: list[str]) -> tuple[Namespace, Start, FileFormat]:
    """Return the arguments, the model, and how it reads files."""
    args = parse_args(argv)
    form = fill_format(args)
    start = find_start(args)
    return args, start, start.complete(form, args, start.tokenizer())


def shards(texts: Path, output_dir: Path) -> list[dict[str, str]]:
    """List the files to predict, each with its output; print what else is in the folder.

    Raises: UserError if there are none, or if their predictions would replace files.
    """
    if not texts.is_dir():
        raise UserError(f"folder {texts} does not exist")
    if texts.resolve() == output_dir.resolve():
        raise UserError("--output_dir is the folder of the texts: choose another one")
    entries = sorted(texts.iterdir())
    files = [path for path in entries if path.suffix.lower() in FORMATS and path.is_file()]
    if not files:
        raise UserError(f"{texts} contains no file that ends with {', '.join(FORMATS)}")
    names = [path.stem for path in files]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{texts} has two files with the name {twice[0]}: rename one")
    if skipped := [path.name for path in entries if path not in files]:
        shown = ", ".join(skipped[:SHOWN]) + ", ..." * (len(skipped) > SHOWN)
        kinds = ", ".join(FORMATS)
        print(f"skipped {len(skipped)} of {texts} that do not end with {kinds}: {shown}")
    pairs = ((path.resolve(), output_dir.resolve() / f"{path.stem}.csv") for path in files)
    return [{"path": str(path), "output": str(output)} for path, output in pairs]


def is_finished(row: dict[str, str], record: dict, overwrite: bool) -> bool:
    """Whether the predictions of a file exist and are those that this command would write.

    Raises: UserError if there is something else that must not be replaced.
    """
    output, described = Path(row["output"]), Path(row["output"]).with_suffix(".json")
    found = read_json(described, PredictionRecord) if described.exists() else {}
    for path in (output, described):
        if path.exists() and "predictions_sha256" not in found:
            raise UserError(
                f"{path} was not written by predict_ray.sh: move it away, or choose another "
                "--output_dir"
            )
    if not output.exists():
        return False
    data = {"test": {"sha256": sha256(row["path"])}}
    names = {"data.test": "input file", **{f"settings.{flag[2:]}": flag for flag in FLAGS}}
    fields = run_differences(found, record | {"data": data})
    changed = sorted({names.get(field, "model") for field in fields})
    if not changed and sha256(output) == found["predictions_sha256"]:
        return True
    if overwrite:  # a killed call may have replaced the record alone
        return False
    fault = f"was predicted with another {', '.join(changed)}" if changed else "was changed since"
    raise UserError(
        f"{output} {fault}: choose another --output_dir, or predict it again with "
        "--overwrite_output_dir"
    )


def run(args: Namespace, flags: list[str]) -> None:
    """Predict all files that are not finished yet. Raises: UserError naming those that failed."""
    argv = ["--do_predict", "--model_name_or_path", args.model, "--output_dir", args.output_dir]
    argv += flags
    given, start, _ = open_model(argv)  # a bad flag or model is reported before Ray starts
    record = describe_run(start.settings(given), start.describe(), start.labels, {})
    texts, output_dir = Path(args.texts), Path(args.output_dir)
    every = shards(texts, output_dir)
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    left = [row for row in every if not is_finished(row, record, args.overwrite_output_dir)]
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
            fn_constructor_args=(argv, record),
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
    parser = Parser("bash script/predict_ray.sh", __doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("texts", metavar="TEXTS")
    parser.add_argument("--output_dir", **DIR, required=True)
    parser.add_argument(
        "--overwrite_output_dir", **SWITCH, default=False, help="predict again what differs"
    )
    parser.add_argument("--workers", **INT, help="[one per core]")
    args, flags = parser.parse_known_args(argv)
    if unused := unused_flag(flags, FLAGS):
        parser.error(f"{unused} has no effect here: omit it")
    return run_and_report(run, args, flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
