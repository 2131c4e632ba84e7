"""The output folder: results appear in it whole, and only what the program wrote is removed.

A run writes into the subfolder `unfinished` and moves its files up at the very end, `run.json`,
which lists them, last. A run that fails leaves the results of an earlier one as they were.
"""

import csv
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import compress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError

from dataset import LABEL_SEPARATOR
from evaluation.metrics import confidence, predictions, probabilities
from runtime import checkpoint
from runtime.record import RUN_FILE, OutputError, decisive, differences, read_record

RECORDS = "metrics.jsonl"
PROCESS = "process"  # holds the number of the process at work, for messages
# All that a run may leave in its folder.
OWN_FILE = re.compile(
    r"README\.md|report\.html|(adapter_)?config\.json|(adapter_)?model\.safetensors|tokenizer(_config)?\.json|"
    r"(run|all_results|evaluation)\.json|metrics\.jsonl|predictions\.csv|tensorboard|checkpoint-\d+"
)
# And what a killed one may leave in its subfolder.
PARTIAL_FILE = re.compile(
    r"saving-checkpoint-\d+|[a-z_]+\.(json|html)\.new|README\.md\.new|process"
)
os.umask(UMASK := os.umask(0o022))  # it can only be read by setting it

logger = logging.getLogger(__name__)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into an OutputError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written: {error}") from None


class OutputFolder:
    """Collects the files of one run; `publish` makes them the folder's results."""

    def __init__(self, path: str, overwrite: bool, resume: str | None = None) -> None:
        """Take the folder for this process; nothing in it changes before `start`.

        Raises: OutputError where it is in use, holds results, an unfinished run or files of others
            that are not to be replaced, or cannot be written to.
        """
        self.path, self.overwrite = Path(path), overwrite
        self.staging = self.path / "unfinished"
        inside = resume and Path(resume).resolve().parent == self.staging.resolve()
        self.auto, self.goes_on = resume == "auto", bool(resume == "auto" or inside)
        try:
            self.made = not self.path.exists()
            self.staging.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise OutputError(f"--output_dir {path}: {error.strerror}") from None
        try:
            self.take()
        except OutputError:
            os.close(self.lock)
            raise
        try:
            (self.staging / PROCESS).write_text(str(os.getpid()))
            self.check()
        except (OSError, OutputError) as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise OutputError(f"--output_dir {path}: {error.strerror}") from None
            raise

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):  # read-only; or the folder is gone, or not empty
            (self.staging / PROCESS).unlink(missing_ok=True)
            self.staging.rmdir()
            if self.made:  # and has come to nothing
                self.path.rmdir()
        os.close(self.lock)

    def take(self) -> None:
        """Lock the folder; the kernel frees it, however the process ends."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                holder = f"process {(self.staging / PROCESS).read_text()}"
            except OSError:
                holder = "another process"
            raise OutputError(
                f"{self.path} is in use by {holder}: wait for it, or give another --output_dir"
            ) from None
        except OSError as error:  # a file system without locks
            raise OutputError(f"{self.path} cannot be locked: {error.strerror}") from None

    def check(self) -> None:
        """Refuse what is not to be replaced."""
        self.finished = read_record(self.path / RUN_FILE)
        # a run that was killed while it published listed its files in the staging folder
        self.begun = read_record(self.staging / RUN_FILE)
        listed = {n for run in (self.finished, self.begun) for n in run.get("files", ())}
        self.earlier = set(filter(OWN_FILE.fullmatch, listed))
        if not self.auto:  # what is finished may be what is wanted: see `is_finished`
            self.refuse_earlier()
        here = {entry.name for entry in self.path.iterdir()}
        foreign = sorted(filter(OWN_FILE.fullmatch, here - self.earlier))
        foreign += [
            f"unfinished/{entry.name}"
            for entry in self.staging.iterdir()
            if not (OWN_FILE.fullmatch(entry.name) or PARTIAL_FILE.fullmatch(entry.name))
        ]
        if foreign:
            raise OutputError(
                f"{self.path} holds {', '.join(foreign)}, which no run listed as its own: "
                "give another --output_dir"
            )
        if checkpoint.steps(self.staging) and not (self.overwrite or self.goes_on):
            raise OutputError(
                f"{self.path} holds an unfinished run: --resume_from_checkpoint auto goes on with "
                "it, --overwrite_output_dir starts anew"
            )

    def is_finished(self, run: dict) -> bool:
        """Whether the folder's results are those of this very run, whole; then left-overs go.

        What another run has not finished stays where it is.
        Raises: OutputError where they are another's and not to be replaced.
        """
        others = self.begun and differences(decisive(self.begun), decisive(run))
        if self.finished and not differences(decisive(self.finished), decisive(run)):
            if not self.begun:  # it may have been killed while it published
                self.move_checkpoints(self.finished["files"])
            if all((self.path / name).exists() for name in self.finished["files"]):
                if not others:
                    shutil.rmtree(self.staging)
                return True
        if not self.begun or others:
            self.refuse_earlier()
        return False

    def move_checkpoints(self, names: Iterable[str]) -> None:
        """Move up those of `names` that are checkpoints and still staged."""
        with writing(self.path):
            for name in names:
                if checkpoint.NAME.fullmatch(name) and (self.staging / name).exists():
                    os.replace(self.staging / name, self.path / name)

    def refuse_earlier(self) -> None:
        """Raises: OutputError where there are results that are not to be replaced."""
        if self.earlier and not self.overwrite:
            raise OutputError(
                f"{self.path} holds the results of an earlier run: give another --output_dir, "
                "or --overwrite_output_dir to replace them"
            )

    def start(self, run: dict, begun: tuple[Path, int] | None = None) -> None:
        """Clear away what killed runs left, and write what this run is.

        begun: the checkpoint to go on from and its step; its records are taken, and checkpoints
        after it go: they are damaged, or it was chosen by hand.
        """
        with writing(self.staging):
            if not begun and (lost := checkpoint.steps(self.staging)):
                logger.warning(
                    "warning: an unfinished run was in %s, saved up to step %d: it is removed; "
                    "--resume_from_checkpoint auto would have gone on with it",
                    self.path, max(lost),
                )  # fmt: skip
            records = begun[0] / RECORDS if begun else None
            text = records.read_bytes() if records and records.exists() else None
            for entry in list(self.staging.iterdir()):
                match = checkpoint.NAME.fullmatch(entry.name)
                kept = match and self.goes_on and begun and int(match[1]) <= begun[1]
                if not kept and entry.name not in (RUN_FILE, PROCESS):
                    if match and begun:
                        logger.warning(
                            "warning: %s, after the one to go on from, is removed", entry
                        )
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if text is not None:
                (self.staging / RECORDS).write_bytes(text)
        self.write_json(RUN_FILE, {**run, "files": sorted(self.earlier)})

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        new = self.staging / f"{name}.new"
        with writing(self.staging / name):
            new.write_text(text, encoding="utf-8")
            os.replace(new, self.staging / name)

    def write_json(self, name: str, content: dict) -> None:
        """Write a JSON file, indented."""
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_text(name, text + "\n")

    def append_json(self, name: str, content: dict) -> None:
        """Add a line to a JSON-lines file."""
        path = self.staging / name
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(content, allow_nan=False) + "\n")

    def copy_records(self, folder: Path) -> None:
        """Put the records so far into a checkpoint."""
        if (self.staging / RECORDS).exists():
            shutil.copyfile(self.staging / RECORDS, folder / RECORDS)

    def staged(self, name: str) -> list[dict]:
        """What this run wrote into a JSON file, or into each line of a JSON-lines file, so far."""
        path = self.staging / name
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8")
        return [json.loads(part) for part in (text.splitlines() if name == RECORDS else [text])]

    def read_results(self) -> dict:
        """The all_results.json of a finished run."""
        return json.loads((self.path / "all_results.json").read_text(encoding="utf-8"))

    def check_columns(self, path: str, columns: list[str], names: list[str]) -> None:
        """Raises: OutputError where a file to predict has a column that the predictions add."""
        added = {"predicted", "confidence", *(f"probability_{name}" for name in names)}
        for name in columns:
            if name in added:
                raise OutputError(f"{path} has a column '{name}', as the predictions: rename it")

    @contextmanager
    def predictions(
        self, columns: list[str], names: list[str], multi_label: bool
    ) -> Iterator[Callable[[pd.DataFrame, torch.Tensor], None]]:
        """Open predictions.csv: one row per input row, in its order. Yields what adds a chunk.

        The input's `columns`, `predicted`, `confidence` (see `metrics.confidence`), and one column
        `probability_LABEL` for each label. A chunk is a table and its logits [N, C]. Words are
        quoted, so that any text comes back as it was.
        """
        path = self.staging / "predictions.csv"
        header = [*columns, "predicted", "confidence", *(f"probability_{name}" for name in names)]
        with writing(path), open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
            writer.writerow(header)

            def add(table: pd.DataFrame, logits: torch.Tensor) -> None:
                probability = probabilities(logits, multi_label)
                found = predictions(probability, multi_label)
                if multi_label:
                    label = [LABEL_SEPARATOR.join(compress(names, row)) for row in found]
                else:
                    label = [names[number] for number in found]
                sure = confidence(probability, multi_label)[:, None]
                figures = np.round(np.hstack([sure, probability]).astype(float), 6).tolist()
                for row, name, values in zip(table.to_numpy(), label, figures, strict=True):
                    writer.writerow([*row, name, *values])

            yield add

    def publish(self, run: dict, keep_checkpoints: bool = False) -> None:
        """Replace the earlier run's files by this one's; `run` becomes run.json.

        Killed meanwhile, it can be done again, or by `is_finished` to its end: the list of files
        stands before the first of them moves, and the checkpoints move or go when all else is on
        the disk itself.
        Raises: OutputError where the folder cannot be written to; the new files stay in
            `unfinished`.
        """
        names = {entry.name for entry in self.staging.iterdir()} - {PROCESS} | {RUN_FILE}
        checkpoints = {name for name in names if checkpoint.NAME.fullmatch(name)}
        names -= set() if keep_checkpoints else checkpoints
        self.write_json(RUN_FILE, {**run, "files": sorted(names | self.earlier)})
        now = names - checkpoints - {RUN_FILE}
        with writing(self.path):
            for staged in map(self.staging.joinpath, now):
                for path in (staged, *staged.rglob("*")):
                    # safetensors makes files that nobody else may read
                    if path.is_file() and not path.stat().st_mode & 0o077:
                        path.chmod(0o666 & ~UMASK)
                    checkpoint.sync(path)
            for name in sorted(now):
                if (self.path / name).is_dir():  # a rename replaces files only
                    shutil.rmtree(self.path / name)
                os.replace(self.staging / name, self.path / name)
            for name in self.earlier - now - {RUN_FILE}:
                entry = self.path / name
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
            self.write_json(RUN_FILE, {**run, "files": sorted(names)})
            checkpoint.sync(self.staging / RUN_FILE)
            os.replace(self.staging / RUN_FILE, self.path / RUN_FILE)
            checkpoint.sync(self.path)
        self.move_checkpoints(sorted(names))
        with writing(self.path):
            shutil.rmtree(self.staging)
            checkpoint.sync(self.path)
