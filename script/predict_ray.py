"""Predict a folder of files on many cores or machines, with Ray Data.

    bash script/predict_ray.sh MODEL TEXTS --output_dir DIR [--workers N] [flags of main.py]

MODEL is a model or adapter folder. Each CSV, TSV, JSON lines or Parquet file of the folder TEXTS
becomes DIR/NAME.csv, with the bytes that `main.py --do_predict` with the same --engine would write
as predictions.csv. Beside it, DIR/NAME.json records the model, the input and the flags by their
checksums and values. A file appears when it is whole, and is not predicted again if its record
fits, so the same command resumes. If the record differs, nothing is predicted;
--overwrite_output_dir predicts such files again. A lost worker is started again and repeats its
file. A file that cannot be read is named at the end; the rest is predicted.

With RAY_ADDRESS set, the workers are those of a cluster, whose machines need this program, MODEL,
TEXTS and DIR at the same places. Otherwise there are N workers here [one per core].
"""

import os
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import ray

import dataset
from arguments import parse_args
from evaluation.predictions import Options, check_added, predict_file
from evaluation.quantization import check_int8
from model.classifier import Classifier
from model.source import ModelSource, open_model
from runtime.columns import fill_format, precision_for
from runtime.file_format import SETTINGS, FileFormat
from runtime.files import (
    UserError,
    name_list,
    read_json,
    run_and_report,
    sha256,
    sync,
    to_json,
    write_text,
    writing,
)
from runtime.flags import DIR, INT, SWITCH, Parser, unused_flag
from runtime.machine import engine_for, pick_machine, set_up_process
from runtime.processes import ALONE
from runtime.record import Record, describe_run, run_differences

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
FLAGS = {f"--{name}" for name in SETTINGS} | set(  # of main.py that change predictions
    "--problem_type --safe_csv --reject_below --max_seq_length --per_device_eval_batch_size "
    "--precision --engine --int8".split()
)


class PredictionRecord(Record, total=False):
    """What NAME.json records of NAME.csv: the entries of run.json, and the checksum of the file."""

    predictions_sha256: str


def classifier_of(args: Namespace, source: ModelSource) -> Classifier:
    """Load the model."""
    precision = precision_for(args.precision, [args.model_name_or_path])
    machine = pick_machine(precision, ALONE, args.engine or "torch", args.int8)
    return Classifier(source, machine, args.per_device_eval_batch_size)


class Predictor:
    """A worker: loads the model once, then predicts file after file."""

    def __init__(
        self, args: Namespace, source: ModelSource, form: FileFormat, record: dict
    ) -> None:
        set_up_process()
        self.classifier = classifier_of(args, source)
        self.options = Options(args.safe_csv, args.reject_below)
        self.form, self.record = form, record

    def __call__(self, row: dict[str, str]) -> dict[str, str | int]:
        """Predict the file row["path"] into row["output"]; returns the rows, or the error."""
        path, output = row["path"], Path(row["output"])
        labels, multi_label = self.classifier.labels, self.classifier.multi_label
        with tempfile.TemporaryDirectory(dir=row["staging"]) as staging:
            new = Path(staging) / "predictions.csv"
            try:
                file = dataset.open_test_file(path, self.form, labels)
                check_added(path, file.columns, labels, self.options.reject_below)
                facts = file.columns, new, labels, multi_label, self.options
                rows = predict_file(self.classifier.logits, file, *facts)
                data = {"test": dataset.described(file)}
                record = self.record | {"data": data, "predictions_sha256": sha256(new)}
                # the record first: it fits no other predictions than those that follow it
                write_text(output.with_suffix(".json"), to_json(record))
                with writing(output):
                    sync(new)
                    os.replace(new, output)
            except UserError as error:
                return {"rows": 0, "error": str(error)}
        return {"rows": rows, "error": ""}


def list_files(texts: Path, output_dir: Path) -> list[dict[str, str]]:
    """List the files to predict, each with its output; print what else is in the folder.

    Raises: UserError if there are none, or if their predictions would replace files.
    """
    if not texts.is_dir():
        raise UserError(f"folder {texts} does not exist")
    if texts.resolve() == output_dir.resolve():
        raise UserError("--output_dir is the folder of the texts: choose another one")
    entries, kinds = [*texts.resolve().iterdir()], ", ".join(FORMATS)
    files = [path for path in sorted(entries) if path.suffix.lower() in FORMATS and path.is_file()]
    if not files:
        raise UserError(f"{texts} contains no file that ends with {kinds}")
    name, count = Counter(path.stem for path in files).most_common(1)[0]
    if count > 1:
        raise UserError(f"{texts} has two files with the name {name}: rename one")
    if skipped := sorted({*entries} - {*files}):
        names = name_list(path.name for path in skipped)
        print(f"skipped {len(skipped)} of {texts} that do not end with {kinds}: {names}")
    folder = output_dir.resolve()
    return [{"path": str(path), "output": str(folder / f"{path.stem}.csv")} for path in files]


def is_finished(row: dict[str, str], record: dict, overwrite: bool) -> bool:
    """Whether the predictions of a file exist and are those that this command would write.

    Raises: UserError if there is something else that must not be replaced.
    """
    output, described = Path(row["output"]), Path(row["output"]).with_suffix(".json")
    earlier = read_json(described, PredictionRecord) if described.exists() else {}
    for path in filter(Path.exists, (output, described)):
        if "predictions_sha256" not in earlier:
            raise UserError(
                f"{path} was not written by predict_ray.sh: move it away, or choose another "
                "--output_dir"
            )
    if not output.exists():
        return False
    data = {"test": {"sha256": sha256(row["path"])}}
    names = {"data.test": "input file", **{f"settings.{flag[2:]}": flag for flag in FLAGS}}
    fields = run_differences(earlier, record | {"data": data})
    changed = ", ".join(sorted({names.get(field, "model") for field in fields}))
    if not changed and sha256(output) == earlier["predictions_sha256"]:
        return True
    if overwrite:  # a killed call may have replaced the record alone
        return False
    fault = f"was predicted with another {changed}" if changed else "was changed since"
    raise UserError(
        f"{output} {fault}: choose another --output_dir, or predict it again with "
        "--overwrite_output_dir"
    )


def run(args: Namespace, flags: list[str]) -> None:
    """Predict all files that are not finished yet. Raises: UserError naming those that failed."""
    argv = ["--do_predict", "--model_name_or_path", args.model, "--output_dir", args.output_dir]
    settings = parse_args([*argv, *flags])
    form = fill_format(vars(settings))
    source = open_model(args.model, settings.max_seq_length, settings.problem_type)
    form = source.complete(form, vars(settings))
    output_dir = Path(args.output_dir)
    files = list_files(Path(args.texts), output_dir)
    if not settings.engine:  # one for all files
        size = sum(os.path.getsize(row["path"]) for row in files)
        engine = engine_for(None, settings.int8, size)
        settings.engine = None if engine == "torch" else engine
    record = describe_run(source.settings(vars(settings)), source.describe(), source.labels, {})
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    left = [row for row in files if not is_finished(row, record, args.overwrite_output_dir)]
    print(f"{len(files)} files, {len(files) - len(left)} of them already finished", flush=True)
    if not left:
        return
    if settings.int8:
        classify, folder = classifier_of(settings, source).logits, Path(args.model)
        check_int8(classify, folder, source.labels, source.multi_label)
    ray.init(num_cpus=args.workers, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    began, workers = time.perf_counter(), min(len(left), int(ray.cluster_resources()["CPU"]))
    with tempfile.TemporaryDirectory(dir=output_dir.resolve(), prefix=".") as staging:
        # what a killed worker has begun there is removed with the folder
        todo = [row | {"staging": staging} for row in left]
        items = ray.data.from_items(todo, override_num_blocks=len(left))
        done = items.map(
            Predictor,
            fn_constructor_args=(settings, source, form, record),
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
        ).take_all()
    rows, seconds = sum(row["rows"] for row in done), time.perf_counter() - began
    print(f"{rows:,} rows in {seconds:.0f} s with {workers} workers: {rows / seconds:,.0f} rows/s")
    if errors := [row["error"] for row in done if row["error"]]:
        more = f" (and {len(errors) - 1} more files)" if len(errors) > 1 else ""
        raise UserError(errors[0] + more)


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
