"""The output folder: results appear in it whole, and only what the program wrote is removed.

A run writes into the subfolder `unfinished` and moves its files up at the very end, `run.json`,
which lists them, last. A run that fails leaves the results of an earlier one as they were.
"""

import json
import os
import shutil
from itertools import compress
from pathlib import Path

import pandas as pd
import torch

from dataset import LABEL_SEPARATOR, Split
from model.metrics import confidence, predictions, probabilities

RUN_FILE = "run.json"


class OutputError(ValueError):
    """An output folder that cannot be used: its message names it and the way out."""


class OutputFolder:
    """Collects the files of one run; `publish` makes them the folder's results."""

    def __init__(self, path: str, overwrite: bool) -> None:
        """Raises: OutputError where the folder holds results, or cannot be written to."""
        self.path = Path(path)
        self.staging = self.path / "unfinished"
        self.overwrite = overwrite
        if (self.path / RUN_FILE).exists() and not overwrite:
            raise OutputError(
                f"{path} holds the results of an earlier run: give another --output_dir, "
                "or --overwrite_output_dir to replace them"
            )
        try:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"--output_dir {path}: {error.strerror}") from None

    def write_json(self, name: str, content: dict) -> None:
        """Write a JSON file, indented."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        (self.staging / name).write_text(text, encoding="utf-8")

    def append_json(self, name: str, content: dict) -> None:
        """Add a line to a JSON-lines file."""
        with open(self.staging / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")

    def check_columns(self, splits: dict[str, Split], names: list[str]) -> None:
        """Raises: OutputError where the test file has a column that the predictions add."""
        added = {"predicted", "confidence", *(f"probability_{name}" for name in names)}
        for name in splits["test"].table.columns if "test" in splits else ():
            if name in added:
                raise OutputError(
                    f"{splits['test'].path} has a column '{name}', which the predictions add: "
                    "rename it"
                )

    def write_predictions(
        self, table: pd.DataFrame, names: list[str], logits: torch.Tensor, problem_type: str
    ) -> None:
        """Write predictions.csv: one row per input row, in its order.

        The input's columns, `predicted`, `confidence` (see `model.metrics.confidence`), and one
        column `probability_LABEL` for each label. logits: [N, C].
        """
        multi_label = problem_type == "multi_label_classification"
        probability = probabilities(logits, multi_label)
        found = predictions(probability, multi_label)
        if multi_label:
            label = [LABEL_SEPARATOR.join(compress(names, row)) for row in found]
        else:
            label = [names[number] for number in found]
        added = {"predicted": label, "confidence": confidence(probability, multi_label)}
        added |= {f"probability_{name}": probability[:, i] for i, name in enumerate(names)}
        result = pd.concat([table, pd.DataFrame(added, index=table.index)], axis=1)
        result.to_csv(self.staging / "predictions.csv", index=False, float_format="%.6f")

    def publish(self, run: dict) -> None:
        """Replace the earlier run's files by this one's; `run` becomes run.json."""
        if self.overwrite:
            self.remove_earlier()
        names = {entry.name for entry in self.staging.iterdir()}
        self.write_json(RUN_FILE, {**run, "files": sorted(names)})
        for name in [*sorted(names - {RUN_FILE}), RUN_FILE]:
            os.replace(self.staging / name, self.path / name)
        self.staging.rmdir()

    def remove_earlier(self) -> None:
        """Remove what an earlier run listed as its own, and nothing else."""
        try:
            files = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError, TypeError):
            return  # no earlier run, or not ours
        for name in files:
            entry = self.path / Path(name).name
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
