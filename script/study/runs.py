"""The runs of a study: which there are, how they are executed, and what each one predicted."""

import argparse
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

import arguments
from dataset import Split, read_split
from evaluation.predictions import FILES
from runtime.columns import split_settings
from runtime.file_format import FileFormat
from runtime.files import UserError, read_json, sha256
from runtime.labels import label_key
from runtime.processes import end_with_parent
from runtime.record import RUN_FILE, read_record

T = TypeVar("T")
TUNE = ["main.py", "--do_train", "--do_eval", "--do_predict", "--resume_from_checkpoint", "auto"]
BASELINES = {
    "majority": "majority",
    "look-up": "lookup",
    "TF-IDF, linear": "tfidf",
    "characters, linear": "characters",
    "embeddings, linear": "embeddings",
    "combined, linear": "combined",
    "characters, SVM": "characters-svm",
    "combined, SVM": "combined-svm",
}
METHODS = {
    **{
        title: ["-m", "script.baseline", name, "--overwrite_output_dir"]
        for title, name in BASELINES.items()
    },
    **{method: [*TUNE, "--tuning_method", method] for method in arguments.METHODS},
    "input prefix": [*TUNE, "--prefix", "--prefix_depth", "input"],
    "4 prefixes": [*TUNE, "--prefix", "--num_prefixes", "4"],
    "ensemble": ["-m", "script.ensemble"],  # of the runs of all other methods
}
NO_MEMBERS = ("majority", "look-up", "ensemble")
USE_BACKBONE = ("embeddings, linear", "combined, linear", "combined, SVM")  # baselines
QUICK = ["--num_train_epochs", "3"]


def is_tuned(method: str) -> bool:
    """Return whether a method of `METHODS` tunes BERT."""
    return METHODS[method][0] == TUNE[0]


def uses_seed(method: str, size: int | None) -> bool:
    """Return whether a run of a method on `size` rows (None: all) differs from seed to seed."""
    return is_tuned(method) or method == "ensemble" or size is not None


def group(things: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    """Group things by a key, in the order in which the keys occur first."""
    groups: dict[Hashable, list[T]] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return groups


def read_file(folder: str, name: str) -> Split:
    """Read a split file, with the columns that its split.json names. Raises: UserError."""
    form = FileFormat.from_settings(split_settings(f"{folder}/train_simple.csv"))
    return read_split(f"{folder}/{name}_simple.csv", form)


@cache
def seen_keys(folder: str) -> set[str]:
    """Return the keys of a folder's texts that count as seen in its test file, see `Data.seen`."""
    return {key for name in ("train", "val") for key in read_file(folder, name).keys}


@dataclass(frozen=True)
class Run:
    """A run of a study. Its results are read from its folder when they are first used."""

    protocol: str  # original or unseen
    method: str  # a key of `METHODS`
    data: str  # folder of the split files
    seed: int
    size: int | None  # training rows, drawn at random; None: all
    folder: Path
    command: tuple[str, ...]  # without the interpreter

    @property
    def line(self) -> str:
        """The command as run.json records it."""
        return shlex.join(["python", *self.command])

    def is_finished(self) -> bool:
        """Return whether the folder contains results of this exact command on unchanged files."""
        record = read_record(self.folder / RUN_FILE)  # not cached: a run may be executed later
        if record.get("command") != self.line:
            return False
        files = {Path(file["path"]): file["sha256"] for file in record["data"].values()}
        members = record["settings"].get("runs_sha256", {})  # of an ensemble
        files |= {Path(folder) / FILES["eval"]: checksum for folder, checksum in members.items()}
        return all(path.exists() and sha256(path) == checksum for path, checksum in files.items())

    @cached_property
    def record(self) -> dict:
        """The content of run.json."""
        return read_record(self.folder / RUN_FILE)

    @cached_property
    def results(self) -> dict:
        """all_results.json, with the size of the stored weights."""
        weights = self.folder.rglob("*model.safetensors")  # an ensemble of prefixes has several
        size = sum(path.stat().st_size for path in weights)
        return read_json(self.folder / "all_results.json") | {"stored_bytes": size}

    def entry(self) -> dict:
        """Return what study.json says about this run alone."""
        entry = {"folder": self.folder.name, "command": self.line}
        return entry | {"commit": self.record["commit"], "results": self.results}

    @cached_property
    def rows(self) -> Split:
        """The rows of the test file, with what was predicted for them. Raises: UserError."""
        form = FileFormat.from_settings(self.record["settings"]).written_here()
        return read_split(self.folder / "predictions.csv", form)

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """The predictions as columns text (key), answer, right, confidence, run and seen."""
        keys, table = self.rows.keys, self.rows.table
        labels = [label_key(label) for (label,) in self.rows.labels]
        return pd.DataFrame(
            {
                "text": keys,
                "answer": table["predicted"],
                "right": table["predicted"].map(label_key) == labels,
                "confidence": table["confidence"].astype(float),
                "run": self.folder.name,
                "seen": [key in seen_keys(self.data) for key in keys],
            }
        )


def plan(args: argparse.Namespace) -> list[Run]:
    """List all runs that the arguments of `script.study.compare` ask for."""
    runs = []
    for protocol, folders, sizes in (
        ("original", args.original, [None]),
        ("unseen", args.unseen, args.train_sizes),
    ):
        # whole passes over the folders, so that each has the same weight
        passes = math.ceil(len(args.seeds) / max(1, len(folders)))
        for number, data in enumerate(passes * folders):
            seed = args.seeds[number % len(args.seeds)]
            members: dict[int | None, list[str]] = {}  # folders of an ensemble, by size
            for method, size in product(args.methods, sizes):
                varies = uses_seed(method, size)
                name = method.replace(", ", "-").replace(" ", "-")
                name = f"{protocol}-{name}-{number if varies else number % len(folders)}"
                folder = Path(args.output_dir) / (name + (f"-n{size}" if size else ""))
                if method not in NO_MEMBERS:
                    members.setdefault(size, []).append(str(folder))
                flags = ["--output_dir", str(folder)]
                if method == "ensemble":
                    flags = [*members.get(size, []), *flags]
                else:
                    flags += run_flags(args, method, data, seed if varies else None, size)
                # a baseline runs once for each folder; an ensemble needs members
                if (varies or number < len(folders)) and (method != "ensemble" or members):
                    command = (*METHODS[method], *flags)
                    runs.append(Run(protocol, method, data, seed, size, folder, command))
    return runs


def run_flags(
    args: argparse.Namespace, method: str, data: str, seed: int | None, size: int | None
) -> list[str]:
    """Return the flags of a run but for its output folder."""
    flags = []
    for use, file in arguments.USES.items():
        flags += [f"--{use}_file", f"{data}/{file}_simple.csv"]
    flags += ["--seed", str(seed)] if seed is not None else []
    flags += ["--max_train_samples", str(size)] if size else []
    if is_tuned(method):
        return [*flags, *(QUICK if args.quick else []), *args.flags]
    if method in USE_BACKBONE:
        name = "--model_name_or_path"
        flags += [flag for flag in args.flags if flag.startswith(f"{name}=")]
        flags += args.flags[args.flags.index(name) :][:2] if name in args.flags else []
    return flags


def execute(runs: list[Run]) -> None:
    """Execute the unfinished runs one after the other, with a log file next to each folder.

    Raises: UserError for a folder with another run, and for a run that failed.
    """
    left = [run for run in runs if not run.is_finished()]
    for run in left:
        if (run.folder / RUN_FILE).exists():
            raise UserError(
                f"{run.folder} contains a run with different flags, data or seed: choose "
                "another --output_dir"
            )
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them already finished", flush=True)
    seconds: dict[tuple, float] = {}  # of the last run, by method and size
    for number, run in enumerate(left):
        known = [seconds[key] for r in left[number:] if (key := (r.method, r.size)) in seconds]
        rest = f"  {np.mean(known) * (len(left) - number) / 60:.0f} min left" if known else ""
        what = f"{run.method}, {run.data}, seed {run.seed}"
        what += f", {run.size} rows" if run.size else ""
        print(f"run {number + 1} of {len(left)}: {what}{rest}", flush=True)
        start = time.perf_counter()
        log = run.folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, *run.command],
                stdout=file,
                stderr=file,
                preexec_fn=partial(end_with_parent, os.getpid()),
            )
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the run received it too and saves a checkpoint
            status = process.wait()
        if status:
            last = log.read_text(encoding="utf-8").strip().split("\n")[-1]
            raise UserError(
                f"{last.removeprefix('error: ')[:200]} (the end of {log}); then repeat the command "
                "to resume the study"
            )
        seconds[run.method, run.size] = time.perf_counter() - start
