"""Reproduce: all figures of the README that come from a study, on several data sets.

    bash script/reproduce.sh SOURCE [--only DATA...] [--output_dir DIR]

SOURCE: a folder with the files that script/study/data.py lists. First every data set has a run of
each method, then more seeds. What has finished is written to results/ at once: the predictions of
all runs, and tables and plots of them. Runs that are there are not repeated, if the code is the
same; so a stopped study resumes, on another machine, too.
"""

import argparse
import gzip
import os
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from runtime.files import UserError, read_json, run_and_report, to_json, write_text
from runtime.flags import DIR, Parser
from runtime.labels import label_key
from script.study import compare, data, pages, significance, summary
from script.study.runs import BASELINES, METHODS, Run, execute, group, plan, uses_seed

TUNED = ("full", "prefix", "4 prefixes", "lora")
SMALL = ("bias", "probe", "input prefix")
ALL = (*BASELINES, *TUNED, "ensemble")
MOST = tuple(method for method in ALL if method != "4 prefixes")  # they take half of the time
FEW = ("combined, linear", "combined, SVM", "full", "prefix", "lora")
SIZES = ("250", "500", "1000", "all")
# Named before the runs, on these data; Holm's correction is over all of them.
COMPARISONS = ["full:best free", "prefix:full", "lora:full", "4 prefixes:full"]
COMPARISONS += ["ensemble:best single"]
TESTED = ("raw", "emotion", "banking77", "published", "cleaned")
PLOTTED = ("published", "raw")  # a panel each
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
# What the predictions depend on; the tables are computed anew from them.
CODE = "arguments.py dataset.py main.py trainer.py requirements.txt model runtime".split()
CODE += ["evaluation", "script/baseline.py", "script/ensemble.py", "script/split.py"]
CODE += ["script/groups.py", "script/study/data.py", "script/study/runs.py", ":!*.md"]
DIGITS = 12  # of a text's hash
KEY = ["data", "protocol", "method", "rows", "seed", "fold"]  # of a run


class Part(NamedTuple):
    """Runs on one data set: `folder` of the data, how many seeds, and which methods."""

    folder: str
    seeds: int
    methods: tuple[str, ...]
    folds: int = 0  # 0: the folder itself
    protocol: str = "unseen"
    sizes: tuple[str, ...] = ("all",)  # training rows

    def plan(self, output_dir: str) -> list[Run]:
        """Return the runs; parts with the same folder share them."""
        place = f"{output_dir}/data/{self.folder}"
        folders = [f"{place}/{fold}" for fold in range(self.folds)] or [place]
        skipped = {"original": "--unseen", "unseen": "--original"}[self.protocol]
        argv = [skipped, f"--{self.protocol}", *folders, "--methods", *self.methods]
        argv += ["--seeds", *map(str, range(self.seeds)), "--train_sizes", *self.sizes]
        return plan(compare.parse_args([*argv, "--output_dir", f"{output_dir}/{self.folder}"]))


PARTS = (  # in order of importance
    Part("raw", 5, ALL, folds=data.FOLDS),
    Part("emotion", 3, ALL),
    Part("banking77", 3, MOST),
    Part("published", 3, MOST, protocol="original"),
    Part("cleaned", 5, ALL, folds=data.FOLDS),
    Part("time", 3, ALL),
    Part("channel", 5, ALL, folds=data.FOLDS),
    *(Part(f"emotion-{size}", 5, FEW, folds=data.DRAWS) for size in data.FEW),
    Part("raw", 5, (*FEW, "TF-IDF, linear"), folds=data.FOLDS, sizes=SIZES),
    Part("banking77", 1, ("4 prefixes",)),
    Part("published", 1, ("4 prefixes",), protocol="original"),
    Part("raw", 5, SMALL, folds=data.FOLDS),
    Part("emotion", 3, SMALL),
)


@dataclass(frozen=True)
class Recorded:
    """A finished run as results/ has it, with what the tables of a study read."""

    protocol: str
    method: str
    size: int | None
    results: dict
    predictions: pd.DataFrame  # as `Run.predictions`


def key_of(part: Part, run: Run) -> tuple[str, ...]:
    """Return the `KEY` of a run."""
    seed = str(run.seed) if uses_seed(run.method, run.size) else ""
    fold = Path(run.data).name if part.folds else ""
    return part.folder, run.protocol, run.method, str(run.size or "all"), seed, fold


def rows_of(key: tuple[str, ...], run: Run) -> pd.DataFrame:
    """Return the predictions of a run as they are published: the text as a hash."""
    table = run.predictions
    columns = {
        "text": [sha256(text.encode()).hexdigest()[:DIGITS] for text in table["text"]],
        "label": [label_key(label) for (label,) in run.rows.labels],
        "predicted": table["answer"].map(label_key),
        "confidence": table["confidence"].map("{:.4f}".format),
        "seen": table["seen"].map({True: "1", False: "0"}),
    }
    rows = pd.DataFrame(dict(zip(KEY, key, strict=True)) | columns)
    return rows.sort_values("text", kind="stable")


class Results:
    """The finished runs in a folder: runs.json, predictions.csv.gz and tables of both."""

    def __init__(self, folder: Path, code: str) -> None:
        """code: the commit of the code; runs of another one are left out."""
        self.folder, self.code, self.runs = folder, code, {}
        self.rows: dict[tuple[str, ...], pd.DataFrame] = {}
        path = folder / "runs.json"
        found = read_json(path) if path.exists() else {}
        if found.get("code") == code:
            self.runs = {tuple(run[name] for name in KEY): run for run in found["runs"]}
            table = pd.read_csv(folder / "predictions.csv.gz", dtype=str, keep_default_na=False)
            self.rows = dict(iter(table.groupby(KEY, sort=False)))
        elif found:
            print(f"the runs in {folder} are of other code: they will be replaced", file=sys.stderr)

    def recorded(self, folder: str) -> list[Recorded]:
        """Return the runs on one data set, always in the same order."""
        found, order = [], [*METHODS]
        for key in sorted(self.runs, key=lambda key: (order.index(key[2]), key)):
            run = self.runs[key]
            if run["data"] == folder:
                rows = self.rows[key]
                columns = {"answer": rows["predicted"], "right": rows["predicted"] == rows["label"]}
                columns |= {"confidence": rows["confidence"].astype(float), "run": " ".join(key)}
                table = rows[["text"]].assign(**columns, seen=rows["seen"] == "1")
                size = None if run["rows"] == "all" else int(run["rows"])
                found.append(Recorded(*key[1:3], size, run["results"], table))
        return found

    def add(self, runs: dict[tuple[str, ...], Run]) -> None:
        """Add finished runs by key, and write all files."""
        for key, run in runs.items():
            self.runs[key] = dict(zip(KEY, key, strict=True)) | run.entry()
            self.rows[key] = rows_of(key, run)
        self.write()

    def write(self) -> None:
        """Write all files."""
        order = sorted(self.runs)  # after a kill, the predictions may have one more
        # texts one after the other, with all that was predicted for them: so they compress
        table = pd.concat(self.rows[key] for key in order)
        table = table.sort_values(["data", "text"], kind="stable")
        packed = gzip.compress(table.to_csv(index=False).encode(), mtime=0)  # always equal bytes
        new = self.folder / "predictions.csv.gz.new"
        new.write_bytes(packed)
        os.replace(new, self.folder / "predictions.csv.gz")  # whole or not at all
        content = {"code": self.code, "runs": [self.runs[key] for key in order]}
        write_text(self.folder / "runs.json", to_json(content))
        tables = self.tables()
        for name, rows in tables.items():
            write_text(self.folder / f"{name}.json", to_json(rows))
        if rows := [row for row in tables["methods"] if row["data"] in PLOTTED]:
            for name, text in pages.plot_files(pages.draw_plots(rows, tables["curve"])).items():
                write_text(self.folder / name, text)

    def tables(self) -> dict[str, list[dict]]:
        """Compute the tables: figures of the methods, tests, and learning curves."""
        methods, tests, curve = [], [], []
        for folder in dict.fromkeys(part.folder for part in PARTS):
            runs = self.recorded(folder)
            whole = [run for run in runs if run.size is None]
            for ours in group(whole, lambda run: run.method).values():
                row = {"data": folder, "validation": significance.validation_accuracy(ours)}
                methods += [row | each for each in summary.summarise(ours)]
            if folder in TESTED:
                found = significance.compare_named(whole, COMPARISONS)
                tests += [{"data": folder} | test for test in found]
            sized = {run.method for run in runs if run.size}
            points = summary.learning_curve([run for run in runs if run.method in sized])
            curve += [{"data": folder} | point for point in points]
        significance.correct(tests)
        return {"methods": methods, "tests": tests, "curve": curve}


def git(*arguments: str) -> str:
    """Return the output of a git command in this repository. Raises: UserError if it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {arguments[0]} failed: {done.stderr.strip()}; use a clone with git")
    return done.stdout.strip()


def reproduce(args: argparse.Namespace) -> None:
    """Run what is missing in results/, and add it. Raises: UserError."""
    if git("status", "--porcelain", "--", *CODE):
        raise UserError("files were changed since the last commit: commit them, or run git stash")
    results = Results(RESULTS, git("log", "-1", "--format=%H", "--", *CODE))
    data.prepare(Path(args.source), Path(args.output_dir) / "data")
    steps: list[tuple[int, Part, list[Run]]] = []
    for part in (part for part in PARTS if part.folder in args.only):
        runs = part.plan(args.output_dir)
        once = [run for run in runs if not uses_seed(run.method, run.size)]
        seeded = [run for run in runs if uses_seed(run.method, run.size)]
        groups = group(seeded, lambda run: (run.data, run.seed))
        for number, ((folder, _), ours) in enumerate(groups.items()):
            needed = [run for run in once if run.data == folder]
            steps.append((number // max(1, part.folds), part, [*needed, *ours]))
    for _, part, runs in sorted(steps, key=lambda step: step[0]):
        missing = {key_of(part, run): run for run in runs if key_of(part, run) not in results.runs}
        if missing:
            print(f"\n{part.folder}", flush=True)
            # an average reads the files of its members, which this machine may not have
            averages = any(run.method == "ensemble" for run in missing.values())
            execute(runs if averages else [*missing.values()])
            results.add(missing)
            for weights in (path for run in runs for path in run.folder.rglob("*.safetensors")):
                weights.unlink()  # a hundred megabytes for each run of full tuning
    results.write()  # tables, whose code may have changed


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    parser = Parser("bash script/reproduce.sh", __doc__)
    add, names = parser.add_argument, [*dict.fromkeys(part.folder for part in PARTS)]
    add("source", **DIR, help="folder of the source files")
    add("--only", nargs="+", default=names, choices=names, metavar="DATA", help="[all]")
    add("--output_dir", **DIR, default="checkpoints/reproduce", help="[%(default)s]")
    return run_and_report(reproduce, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
