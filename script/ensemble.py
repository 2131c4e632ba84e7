"""Average finished runs, with weights that the validation file chooses.

    bash script/ensemble.sh RUN... --output_dir DIR [--overwrite_output_dir] [--reject_below P]

RUN is the output folder of a finished run of main.py or a baseline. All must have the same data
files, columns and labels. The ensemble has the files, figures, report and record of a run, but no
weights: to classify new texts, classify them with the chosen runs and average the probabilities.

The weights come from greedy selection (Caruana et al. 2004, "Ensemble selection from libraries of
models", as in AutoGluon): starting with nothing, add the run that lowers the validation log loss of
the average most, again and again, the same run as often as it helps; then keep the best average.

K runs, N rows, C classes.
"""

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import dataset
from arguments import parse_args
from evaluation.calibration import ENOUGH_ROWS, calibrate, calibration_rows, figures
from evaluation.predictions import FILES, Options, check_columns
from evaluation.scoring import publish, score
from model.predictions import to_logits
from runtime.csv_reader import Table
from runtime.file_format import SETTINGS, FileFormat
from runtime.files import UserError, run_and_report, sha256
from runtime.flags import contains, unused_flag
from runtime.output_folder import opened
from runtime.record import RUN_FILE, describe_run, differences, read_record

logger = logging.getLogger(__name__)

ROUNDS = 50  # so a weight is a multiple of 2 % or more
SMALLEST = 1e-6  # predictions have 6 decimals, so 0 means less than this
DATA_SETTINGS = (  # of a run: how its files are read
    *SETTINGS,
    *"label_names problem_type train_file validation_file test_file max_train_samples seed".split(),
)


def read_runs(folders: Sequence[str]) -> list[dict]:
    """Read the records of finished runs.

    Raises: UserError if one is not finished or cannot be combined with the first.
    """
    if not folders:
        raise UserError("no runs: pass their output folders before the flags")
    records = []
    for folder in folders:
        record = read_record(Path(folder) / RUN_FILE)
        missing = [name for name in FILES.values() if not (Path(folder) / name).is_file()]
        if not record or missing:
            what = f"lacks {missing[0]}" if record else "contains no finished run"
            raise UserError(f"{folder} {what}: pass folders of runs that evaluated and predicted")
        if missing := {"train", "eval", "test"} - record["data"].keys():
            raise UserError(f"{folder} used no {missing.pop()} file: pass a run that trained")
        records.append(record)
    for folder, record in zip(folders, records, strict=True):
        if other := differences(comparable(records[0]), comparable(record)):
            raise UserError(
                f"{folder} and {folders[0]} have different {', '.join(other)}: pass runs on the "
                "same files"
            )
    return records


def comparable(record: dict) -> dict:
    """Return what the records of an ensemble's runs must have in common."""
    names = set(DATA_SETTINGS) - {"train_file", "validation_file", "test_file", "seed"}
    if record["settings"].get("max_train_samples") is not None:
        names.add("seed")  # it draws the rows
    settings = {name: record["settings"].get(name) or None for name in names}
    if len(settings["text_column_names"]) == 1:
        settings["text_column_delimiter"] = None  # joins nothing
    return {
        "settings": settings,
        "data": {name: one["sha256"] for name, one in record["data"].items()},
        "labels": sorted(record["labels"]),
    }


def texts_of(table: pd.DataFrame, columns: list[str]) -> list[list[str]]:
    """Return the cells of these columns, without the apostrophes that --safe_csv may have added."""
    return [[cell.lstrip("'") for cell in table[name]] for name in columns]


def read_probabilities(
    folder: str, name: str, labels: list[str], text_columns: list[str], texts: list[list[str]]
) -> np.ndarray:
    """Read a run's predictions of a file: probabilities [N, C], in the order of `labels`.

    texts: `texts_of` the file. Raises: UserError if the predictions were changed.
    """
    path, columns = Path(folder) / FILES[name], [f"probability_{label}" for label in labels]
    file = Table(path, FileFormat().written_here(), [*text_columns, *columns])
    table = next(file.frames())
    if texts_of(table, text_columns) != texts:
        raise UserError(f"{path} has other rows than the file it predicts: repeat that run")
    try:
        found = table[columns].to_numpy(dtype=float)
    except ValueError:
        raise UserError(f"{path} has a probability that is no number: repeat that run") from None
    return np.clip(found, SMALLEST, 1 - SMALLEST)


def select(probability: np.ndarray, label_ids: np.ndarray) -> np.ndarray:
    """Return how often each run is selected: int64 [K].

    probability: of the validation rows, [K, N, C]. label_ids: their labels, as in `Counts.add`.
    """

    def loss(total: np.ndarray, count: int) -> float:
        return figures(to_logits(total / count, label_ids.ndim == 2)[None], label_ids)["loss"]

    chosen: list[int] = []
    losses: list[float] = []
    total = np.zeros(probability.shape[1:])
    for count in range(1, ROUNDS + 1):
        after = [loss(total + one, count) for one in probability]
        chosen.append(int(np.argmin(after)))
        losses.append(min(after))
        total += probability[chosen[-1]]
    best = int(np.argmin(losses)) + 1
    return np.bincount(chosen[:best], minlength=len(probability))


def parse(argv: list[str]) -> tuple[list[str], Namespace]:
    """Split a command line into folders and arguments. Raises: UserError for a useless flag."""
    flags = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    allowed = {"--output_dir", "--overwrite_output_dir", "--reject_below", "--safe_csv"}
    if unused := unused_flag(argv[flags:], allowed):
        raise UserError(f"{unused} has no effect on an ensemble: omit it")
    return argv[:flags], parse_args(["--do_train", "--do_eval", "--do_predict", *argv[flags:]])


def run(argv: list[str]) -> None:
    """Choose the weights, score the average and publish the results, as `main.run` does."""
    folders, args = parse(argv)
    records = read_runs(folders)
    settings = {name: records[0]["settings"].get(name) for name in DATA_SETTINGS}
    names, multi_label = records[0]["labels"], settings["problem_type"].startswith("multi")
    vars(args).update(settings)
    for folder in folders:
        if contains(args.output_dir, folder):
            raise UserError(f"--output_dir contains the run {folder}: choose another one")
    with opened(args.output_dir, args.overwrite_output_dir) as output:
        form = FileFormat.from_settings(settings)
        files = {"train": args.train_file, "eval": args.validation_file}
        sample = {"max_train_samples": args.max_train_samples, "seed": args.seed}
        splits = dataset.read_splits(files, form)
        data = dataset.prepare(form, splits, names, args.test_file, **sample)
        for name, described in data.describe().items():
            if described["sha256"] != records[0]["data"][name]["sha256"]:
                raise UserError(f"{described['path']} has changed since {folders[0]} used it")
        check_columns(data, args.reject_below)
        columns, found = settings["text_column_names"], {}
        for name, parts in (("eval", [data.eval]), ("test", data.test)):
            texts = texts_of(pd.concat(part.table for part in parts), columns)
            each = [read_probabilities(one, name, names, columns, texts) for one in folders]
            found[name] = np.stack(each)
        rows = calibration_rows(data)
        if rows.sum() < ENOUGH_ROWS:
            rows[:] = True
        counts = select(found["eval"][:, rows], data.eval.label_ids[rows])
        weights = counts / counts.sum()
        for folder, weight in zip(folders, weights, strict=True):
            logger.info("weight %.2f: %s", weight, folder)
        used = {f: round(float(w), 6) for f, w in zip(folders, weights, strict=True) if w}
        model = {"backbone": ", ".join(used), "weights_sha256": None}
        model["method"] = f"ensemble of {len(used)} runs"
        settings |= {"output_dir": args.output_dir, "runs": list(folders), "weights": used}
        settings["runs_sha256"] = {one: sha256(Path(one) / FILES["eval"]) for one in folders}
        record = describe_run(settings, model, names, data.describe())
        output.start(record)

        logits = {
            name: to_logits(np.tensordot(weights, one, axes=1), multi_label)
            for name, one in found.items()
        }
        calibration, calibrated = calibrate(logits["eval"][None], data)
        results = data.count_rows() | calibrated
        rest = iter(calibration(logits["test"]))

        def classify(split: dataset.Split) -> torch.Tensor:
            if split is data.eval:
                return calibration(logits["eval"])
            return torch.stack([next(rest) for _ in range(len(split))])

        options = Options(args.safe_csv, args.reject_below)
        results |= score(classify, data, multi_label, output, options, explain=False)
        publish(output, record, results)


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    return run_and_report(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
