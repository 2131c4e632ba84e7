"""Reproduce: all figures of the README that come from a study, on several data sets.

    bash script/reproduce.sh SOURCE [--only PART...] [--output_dir DIR]

SOURCE: a folder with the files that script/study/data.py lists. The parts run in order of
importance, about eight hours on two idle cores; a stopped one resumes, and finished runs are not
repeated. The tables of the finished parts, and the predictions behind them, go to results/.
"""

import argparse
import gzip
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from evaluation.intervals import BINS
from evaluation.metrics import calibration_error, confidence_counts
from runtime.files import UserError, run_and_report, to_json, write_text
from runtime.flags import DIR, Parser
from script.study import compare, data, significance, summary
from script.study.runs import BASELINES, Run, execute, group, plan, uses_seed

FREE = (*BASELINES,)
TUNED = ("full", "prefix", "4 prefixes", "lora")
SMALL = ("bias", "probe", "input prefix")
CURVE = ("TF-IDF, linear", "combined, linear", "combined, SVM", "full", "prefix", "lora")
FEWEST = ("combined, linear", "combined, SVM", "full", "prefix", "lora")
SIZES = ("250", "500", "1000", "all")
# Named before the runs; Holm's correction is over all data sets.
COMPARISONS = ["full:best free", "prefix:full", "lora:full", "4 prefixes:full"]
COMPARISONS += ["ensemble:best single"]
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
CODE = (".", ":!results", ":!tests", ":!*.md", ":!.ci")  # what the figures depend on, and more
DIGITS = 12  # of a text's hash


class Part(NamedTuple):
    """A study: `folder` of the data, how many seeds, and which methods."""

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


ALL = (*FREE, *TUNED, "ensemble")
PARTS = {
    "raw": Part("raw", 15, ALL, folds=data.FOLDS),
    "emotion": Part("emotion", 3, ALL),
    "banking77": Part("banking77", 3, ALL),
    "published": Part("published", 3, ALL, protocol="original"),
    "cleaned": Part("cleaned", 5, ALL, folds=data.FOLDS),
    "time": Part("time", 3, ALL),
    "channel": Part("channel", 5, ALL, folds=data.FOLDS),
    **{
        f"emotion-{size}": Part(f"emotion-{size}", 5, FEWEST, folds=data.DRAWS) for size in data.FEW
    },
    "raw, small methods": Part("raw", 5, SMALL, folds=data.FOLDS),
    "emotion, small methods": Part("emotion", 3, SMALL),
    "raw, curve": Part("raw", 5, CURVE, folds=data.FOLDS, sizes=SIZES),
}


def git(*arguments: str) -> str:
    """Return the output of a git command in this repository. Raises: UserError if it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {arguments[0]} failed: {done.stderr.strip()}; use a clone with git")
    return done.stdout.strip()


def code_commits(runs: list[Run]) -> list[str]:
    """Return the last commits that changed code before the runs: one, if all have the same code."""
    commits = {run.record["commit"] for run in runs}
    return sorted({git("log", "-1", "--format=%H", commit, "--", *CODE) for commit in commits})


def rows_of(part: Part, run: Run) -> pd.DataFrame:
    """Return the predictions of a run as they are published: the text as a hash."""
    table, fold = run.predictions, Path(run.data).name
    hashes = [sha256(text.encode()).hexdigest()[:DIGITS] for text in table["text"]]
    return pd.DataFrame(
        {
            "text": hashes,
            "data": part.folder,
            "protocol": run.protocol,
            "method": run.method,
            "rows": run.results["train_rows"] if run.size else "all",
            "seed": run.seed if uses_seed(run.method, run.size) else "",
            "fold": fold if part.folds else "",
            "label": [label for (label,) in run.rows.labels],
            "predicted": table["answer"],
            "confidence": table["confidence"].round(4),
            "seen": table["seen"].astype(int),
        }
    )


def calibration(runs: list[Run]) -> dict[str, float]:
    """Return the calibration error of all rows of some runs, and of seen and unseen ones."""
    table, errors = pd.concat(run.predictions for run in runs), {}
    for name, chosen in {"all": table, **dict(iter(table.groupby("seen")))}.items():
        confidence, right = chosen[["confidence", "right"]].to_numpy(float).T
        kind = {True: "seen", False: "unseen"}.get(name, name)
        errors[kind] = calibration_error(confidence_counts(confidence, right, BINS))
    return errors


def collect(finished: dict[str, list[Run]]) -> None:
    """Write the tables of the finished parts, and the predictions of their runs, to results/."""
    methods, tests, curve, tables = [], [], [], {}
    for name, runs in finished.items():
        part = PARTS[name]
        if part.sizes != ("all",):
            curve += summary.learning_curve(runs)
        else:
            whole = group(runs, lambda run: run.method)
            for row in summary.summarise(runs):
                row |= {"data": part.folder, "calibration": calibration(whole[row["method"]])}
                methods.append(row)
            for test in significance.compare_named(runs, COMPARISONS):
                tests.append({"data": part.folder} | test)
        for run in runs:
            tables.setdefault(run.folder, rows_of(part, run))
    significance.correct(tests)
    runs = list({run.folder: run for each in finished.values() for run in each}.values())
    files = {"methods": methods, "tests": tests, "curve": curve}
    files["runs"] = [run.entry() for run in runs]
    files["parts"] = {"parts": list(finished), "code": code_commits(runs)}
    for name, content in files.items():
        write_text(RESULTS / f"{name}.json", to_json(content))
    text = pd.concat(tables.values()).to_csv(index=False)
    packed = gzip.compress(text.encode(), mtime=0)  # the same predictions, the same bytes
    (RESULTS / "predictions.csv.gz").write_bytes(packed)


def reproduce(args: argparse.Namespace) -> None:
    """Run the parts, and collect after each. Raises: UserError."""
    if git("status", "--porcelain", "--", *CODE):
        raise UserError("files were changed since the last commit: commit them, or run git stash")
    data.prepare(Path(args.source), Path(args.output_dir) / "data")
    finished = {}
    for name, part in PARTS.items():
        runs = part.plan(args.output_dir)
        if name in args.only:
            print(f"\n{name}", flush=True)
            execute(runs)
        if all(run.is_finished() for run in runs):
            finished[name] = runs
            if name in args.only:
                collect(finished)


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    parser = Parser("bash script/reproduce.sh", __doc__)
    add = parser.add_argument
    add("source", **DIR, help="folder of the source files")
    add("--only", nargs="+", default=[*PARTS], choices=PARTS, metavar="PART", help="[all]")
    add("--output_dir", **DIR, default="checkpoints/reproduce", help="[%(default)s]")
    return run_and_report(reproduce, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
