"""The output folder: results appear in it whole, and only what the program wrote is removed.

A run writes into the subfolder `unfinished` and moves its files up at the very end, `run.json`,
which lists them, last. A run that fails leaves the results of an earlier one as they were.
"""

import csv
import json
import os
import re
import shutil
from itertools import compress
from pathlib import Path

import pandas as pd
import torch

from model.metrics import confidence, predictions, probabilities

RUN_FILE = "run.json"
# All that a run may leave in its folder.
OWN_FILE = re.compile(
    r"README\.md|(adapter_)?config\.json|(adapter_)?model\.safetensors|tokenizer(_config)?\.json|"
    r"(run|all_results)\.json|metrics\.jsonl|predictions\.csv|checkpoint-\d+"
)
LABEL_SEPARATOR = "|"


class OutputError(ValueError):
    """An output folder that cannot be used: its message names it and the way out."""


class OutputFolder:
    """Collects the files of one run; `publish` makes them the folder's results."""

    def __init__(self, path: str, overwrite: bool) -> None:
        """Raises: OutputError where the folder holds results, or cannot be written to."""
        self.path = Path(path)
        self.staging = self.path / "unfinished"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.earlier = self.read_earlier()
            if self.earlier and not overwrite:
                raise OutputError(
                    f"{path} holds the results of an earlier run: give another --output_dir, "
                    "or --overwrite_output_dir to replace them"
                )
            here = {entry.name for entry in self.path.iterdir()}
            if foreign := sorted(filter(OWN_FILE.fullmatch, here - self.earlier)):
                raise OutputError(
                    f"{path} holds {', '.join(foreign)}, which no run listed as its own: "
                    "give another --output_dir"
                )
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir()
        except OSError as error:
            raise OutputError(f"--output_dir {path}: {error.strerror}") from None

    def read_earlier(self) -> set[str]:
        """The files that an earlier run listed as its own; names that none could have are left."""
        if not (self.path / RUN_FILE).exists():
            return set()
        try:
            files = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))["files"]
            return {name for name in files if OWN_FILE.fullmatch(name)}
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"{self.path / RUN_FILE} is not a run's: move it away") from None

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        (self.staging / name).write_text(text, encoding="utf-8")

    def write_json(self, name: str, content: dict) -> None:
        """Write a JSON file, indented."""
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_text(name, text + "\n")

    def append_json(self, name: str, content: dict) -> None:
        """Add a line to a JSON-lines file."""
        with open(self.staging / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(content, allow_nan=False) + "\n")

    def check_columns(self, path: str, columns: list[str], names: list[str]) -> None:
        """Raises: OutputError where a file to predict has a column that the predictions add."""
        added = {"predicted", "confidence", *(f"probability_{name}" for name in names)}
        for name in columns:
            if name in added:
                raise OutputError(f"{path} has a column '{name}', as the predictions: rename it")

    def write_predictions(
        self, table: pd.DataFrame, names: list[str], logits: torch.Tensor, problem_type: str
    ) -> None:
        """Write predictions.csv: one row per input row, in its order.

        The input's columns, `predicted`, `confidence` (see `model.metrics.confidence`), and one
        column `probability_LABEL` for each label. logits: [N, C]. Words are quoted, so that any
        text comes back as it was.
        """
        multi_label = problem_type == "multi_label_classification"
        probability = probabilities(logits, multi_label)
        found = predictions(probability, multi_label)
        if multi_label:
            label = [LABEL_SEPARATOR.join(compress(names, row)) for row in found]
        else:
            label = [names[number] for number in found]
        figures = torch.tensor(confidence(probability, multi_label))[:, None].tolist()
        figures = [one + each for one, each in zip(figures, probability.tolist(), strict=True)]
        header = [*table.columns, "predicted", "confidence", *(f"probability_{n}" for n in names)]
        with open(self.staging / "predictions.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
            writer.writerow(header)
            for row, name, values in zip(table.to_numpy(), label, figures, strict=True):
                writer.writerow([*row, name, *(round(value, 6) for value in values)])

    def publish(self, run: dict) -> None:
        """Replace the earlier run's files by this one's; `run` becomes run.json.

        Raises: OutputError where the folder cannot be written to; the new files stay in
            `unfinished`.
        """
        names = {entry.name for entry in self.staging.iterdir()} | {RUN_FILE}
        self.write_json(RUN_FILE, {**run, "files": sorted(names)})
        try:
            for name in sorted(names - {RUN_FILE}):
                if (self.path / name).is_dir():  # a rename replaces files only
                    shutil.rmtree(self.path / name)
                os.replace(self.staging / name, self.path / name)
            for name in self.earlier - names:
                entry = self.path / name
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
            os.replace(self.staging / RUN_FILE, self.path / RUN_FILE)
            self.staging.rmdir()
        except OSError as error:
            raise OutputError(f"--output_dir {self.path}: {error}") from None
