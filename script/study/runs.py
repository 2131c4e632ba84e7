"""The runs of a study: which there are, how they are executed, and what each one found."""

import argparse
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

import arguments
from dataset import Split, read_split
from evaluation.predictions import FILES
from runtime.columns import split_settings
from runtime.file_format import FileFormat
from runtime.files import UserError, read_json, sha256
from runtime.processes import end_with_parent
from runtime.record import RUN_FILE, read_record
from script.study.significance import Scores, answers, group, read_run

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
    title: ["-m", "script.baseline", name, "--overwrite_output_dir"]
    for title, name in BASELINES.items()
}
METHODS |= {method: [*TUNE, "--tuning_method", method] for method in arguments.METHODS}
METHODS |= {
    "input prefix": [*TUNE, "--prefix", "--prefix_depth", "input"],
    "4 prefixes": [*TUNE, "--prefix", "--num_prefixes", "4"],
    "ensemble": ["-m", "script.ensemble"],  # of the runs of all other methods
}
NO_MEMBERS = ("majority", "look-up", "ensemble")
USE_BACKBONE = ("embeddings, linear", "combined, linear", "combined, SVM")  # baselines
QUICK = ["--num_train_epochs", "3"]


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
    """A run of a study. What it found is read from its folder when it is first used."""

    protocol: str  # original or unseen
    method: str  # a key of `METHODS`
    data: str  # folder of the split files
    seed: int
    size: int | None  # training rows, drawn at random; None: all
    folder: Path
    command: tuple[str, ...]  # without the interpreter

    @property
    def tuned(self) -> bool:
        """Whether BERT is tuned."""
        return TUNE[0] in METHODS[self.method]

    @property
    def line(self) -> str:
        """The command as run.json records it."""
        return shlex.join(["python", *self.command])

    def entry(self) -> dict:
        """Return what study.json says about this run alone."""
        entry = {"folder": self.folder.name, "command": self.line}
        return entry | {"commit": self.scored[0]["commit"], "results": self.results}

    def is_finished(self) -> bool:
        """Return whether the folder contains results of this exact command on unchanged files."""
        record = read_record(self.folder / RUN_FILE)
        if record.get("command") != self.line:
            return False
        files = {Path(file["path"]): file["sha256"] for file in record["data"].values()}
        members = record["settings"].get("runs_sha256", {})  # of an ensemble
        files |= {Path(folder) / FILES["eval"]: checksum for folder, checksum in members.items()}
        return all(path.exists() and sha256(path) == checksum for path, checksum in files.items())

    @cached_property
    def scored(self) -> tuple[dict, Split]:
        """The record and the rows of the test file, see `read_run`."""
        return read_run(self.folder)

    @cached_property
    def results(self) -> dict:
        """all_results.json, with the size of the stored weights."""
        weights = self.folder.rglob("*model.safetensors")  # an ensemble of prefixes has several
        size = sum(path.stat().st_size for path in weights)
        return read_json(self.folder / "all_results.json") | {"stored_bytes": size}

    @cached_property
    def records(self) -> list[dict]:
        """The lines of metrics.jsonl; none of a baseline."""
        return read_json(self.folder / "metrics.jsonl", lines=True)

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """The `answers` to the test rows, with the columns confidence, run and seen."""
        table = answers(self.scored[1])
        confidence = self.scored[1].table["confidence"].to_numpy(dtype=float)
        seen = table["text"].isin(seen_keys(self.data))
        return table.assign(confidence=confidence, run=self.folder.name, seen=seen)


def scores_of(runs: list[Run], seen: tuple[bool, ...] = (True, False)) -> Scores | None:
    """Return the scores of all runs of a method on the texts of these `seen`, if there are any."""
    table = pd.concat(run.predictions for run in runs)
    table = table[table["seen"].isin(seen)]
    return Scores(table) if len(table) else None


def plan(args: argparse.Namespace) -> list[Run]:
    """List all runs that the arguments of `script.study.compare` ask for."""
    runs = []
    for protocol, folders, sizes in (
        ("original", args.original, [None]),
        ("unseen", args.unseen, args.train_sizes),
    ):
        # whole passes over the folders, so that each has the same weight
        passes = max(1, math.ceil(len(args.seeds) / max(1, len(folders))))
        for number in range(passes * len(folders)):
            data, seed = folders[number % len(folders)], args.seeds[number % len(args.seeds)]
            members: dict[int | None, list[str]] = {}  # folders of an ensemble, by size
            for method, size in product(args.methods, sizes):
                is_tuned, is_ensemble = TUNE[0] in METHODS[method], method == "ensemble"
                uses_seed = is_tuned or size or is_ensemble
                name = method.replace(", ", "-").replace(" ", "-")
                name = f"{protocol}-{name}-{number if uses_seed else number % len(folders)}"
                folder = Path(args.output_dir) / (name + (f"-n{size}" if size else ""))
                if method not in NO_MEMBERS:
                    members.setdefault(size, []).append(str(folder))
                if not uses_seed and number >= len(folders):
                    continue
                if is_ensemble:
                    if size not in members:
                        continue
                    flags = [*members[size], "--output_dir", str(folder)]
                else:
                    flags = ["--output_dir", str(folder)]
                    for use, file in arguments.USES.items():
                        flags += [f"--{use}_file", f"{data}/{file}_simple.csv"]
                    flags += ["--seed", str(seed)] if uses_seed else []
                    flags += ["--max_train_samples", str(size)] if size else []
                    flags += backbone_flags(args.flags) if method in USE_BACKBONE else []
                    flags += [*(QUICK if args.quick else []), *args.flags] if is_tuned else []
                command = (*METHODS[method], *flags)
                runs.append(Run(protocol, method, data, seed, size, folder, command))
    return runs


def backbone_flags(flags: list[str]) -> list[str]:
    """Return those of the flags that name the backbone."""
    name = "--model_name_or_path"
    if name in flags:
        return flags[flags.index(name) :][:2]
    return [flag for flag in flags if flag.startswith(f"{name}=")]


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


def largest(runs: list[Run]) -> list[Run]:
    """Return the runs of each protocol with its largest size, the ones for the main tables."""
    largest = {
        protocol: max((run.size for run in ours), key=lambda size: size or math.inf)
        for protocol, ours in group(runs, lambda run: run.protocol).items()
    }
    return [run for run in runs if run.size == largest[run.protocol]]
