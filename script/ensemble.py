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
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from arguments import parse_args
from dataset import Data, Split
from evaluation.calibration import ENOUGH_ROWS, calibration_rows, figures
from evaluation.predictions import FILES
from model.predictions import to_logits
from runtime.csv_reader import Table
from runtime.file_format import SETTINGS, FileFormat
from runtime.files import UserError, help_or_run, sha256
from runtime.flags import contains, unused_flag
from runtime.record import RUN_FILE, differences, read_record
from script.baseline import Built, score_and_publish

logger = logging.getLogger(__name__)

ROUNDS = 50  # so a weight is a multiple of 2 % or more
SMALLEST = 1e-6  # predictions have 6 decimals, so 0 means less than this
DATA_SETTINGS = (  # of a run: how its files are read
    *SETTINGS,
    *"label_names problem_type train_file validation_file test_file max_train_samples seed".split(),
)


def read_runs(folders: Sequence[str]) -> dict:
    """Check the records of finished runs, and return the first.

    Raises: UserError if one is not finished or cannot be combined with the first.
    """
    if not folders:
        raise UserError("no runs: pass their output folders before the flags")
    records = [read_record(Path(folder) / RUN_FILE) for folder in folders]
    for folder, record in zip(folders, records, strict=True):
        missing = [name for name in FILES.values() if not (Path(folder) / name).is_file()]
        if not record or missing:
            what = f"lacks {missing[0]}" if record else "contains no finished run"
            raise UserError(f"{folder} {what}: pass folders of runs that evaluated and predicted")
        if missing := {"train", "eval", "test"} - record["data"].keys():
            raise UserError(f"{folder} used no {missing.pop()} file: pass a run that trained")
        if other := differences(comparable(records[0]), comparable(record)):
            raise UserError(
                f"{folder} and {folders[0]} have different {', '.join(other)}: pass runs on the "
                "same files"
            )
    return records[0]


def comparable(record: dict) -> dict:
    """Return what the records of an ensemble's runs must have in common."""
    names = set(DATA_SETTINGS) - {"train_file", "validation_file", "test_file", "seed"}
    if record["settings"].get("max_train_samples") is not None:
        names.add("seed")  # it draws the rows
    settings = {name: record["settings"].get(name) or None for name in names}
    if len(settings["text_column_names"]) == 1:
        settings["text_column_delimiter"] = None  # joins nothing
    data = {name: file["sha256"] for name, file in record["data"].items()}
    return {"settings": settings, "data": data, "labels": sorted(record["labels"])}


def read_probabilities(
    folders: list[str], name: str, labels: list[str], columns: Sequence[str], parts: Iterable[Split]
) -> np.ndarray:
    """Read the runs' predictions of a file: probabilities [K, N, C], in the order of `labels`.

    columns: of texts. parts: of the file. Raises: UserError if the predictions were changed.
    """

    def texts(table: pd.DataFrame) -> list[list[str]]:  # --safe_csv may have added apostrophes
        return [[cell.lstrip("'") for cell in table[column]] for column in columns]

    expected = texts(pd.concat(part.table for part in parts))
    probability, names = [], [f"probability_{label}" for label in labels]
    for path in (Path(folder) / FILES[name] for folder in folders):
        table = next(Table(path, FileFormat().written_here(), [*columns, *names]).frames())
        if texts(table) != expected:
            raise UserError(f"{path} has other rows than the file it predicts: repeat that run")
        try:
            probability.append(table[names].to_numpy(dtype=float))
        except ValueError:
            message = f"{path} has a probability that is no number: repeat that run"
            raise UserError(message) from None
    return np.clip(np.stack(probability), SMALLEST, 1 - SMALLEST)


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
    """Choose the weights, score the average and publish the results. Raises: UserError."""
    folders, args = parse(argv)
    first = read_runs(folders)
    settings = {name: first["settings"].get(name) for name in DATA_SETTINGS}
    vars(args).update(settings)
    for folder in folders:
        if contains(args.output_dir, folder):
            raise UserError(f"--output_dir contains the run {folder}: choose another one")
    form = FileFormat.from_settings(settings)

    def build(data: Data) -> Built:
        for name, file in data.describe().items():
            if file["sha256"] != first["data"][name]["sha256"]:
                raise UserError(f"{file['path']} has changed since {folders[0]} used it")
        probability = {
            name: read_probabilities(folders, name, data.names, form.text_column_names, parts)
            for name, parts in (("eval", [data.eval]), ("test", data.test))
        }
        rows = calibration_rows(data)
        if rows.sum() < ENOUGH_ROWS:
            rows[:] = True
        counts = select(probability["eval"][:, rows], data.eval.label_ids[rows])
        weights = counts / counts.sum()
        for folder, weight in zip(folders, weights, strict=True):
            logger.info("weight %.2f: %s", weight, folder)
        used = {f: round(float(w), 6) for f, w in zip(folders, weights, strict=True) if w}
        about = {"output_dir": args.output_dir, "runs": folders, "weights": used}
        about["runs_sha256"] = {f: sha256(Path(f) / FILES["eval"]) for f in folders}
        model = {"backbone": ", ".join(used), "weights_sha256": None}
        model["method"] = f"ensemble of {len(used)} runs"
        logits = {
            name: to_logits(np.tensordot(weights, runs, axes=1), form.multi_label)
            for name, runs in probability.items()
        }
        test_rows = iter(logits["test"])

        def classify(split: Split) -> torch.Tensor:
            if split is data.eval:
                return logits["eval"]
            return torch.stack([next(test_rows) for _ in range(len(split))])

        return settings | about, model, classify, {}

    score_and_publish(args, form, build, first["labels"], explain=False)


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    return help_or_run(__doc__, run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
