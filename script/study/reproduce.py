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

from runtime.files import UserError, read_json, run_and_report, to_json, write_text
from runtime.flags import DIR, Parser
from script.study import compare, data, significance, summary
from script.study.runs import BASELINES, Run, execute, plan, uses_seed

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
PREDICTIONS = "predictions.csv.gz"
ROW, RUN = ["data", "fold", "text"], ["data", "protocol", "method", "rows", "seed", "fold"]


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


def figures(name: str, runs: list[Run]) -> dict[str, list[dict]]:
    """Compute the rows that a finished part adds to each table."""
    part, tables = PARTS[name], {"methods": [], "tests": [], "curve": []}
    if part.sizes != ("all",):
        tables["curve"] = summary.learning_curve(runs)
    else:
        tables["methods"] = summary.summarise(runs)
        tables["tests"] = significance.compare_named(runs, COMPARISONS)
    tables["runs"] = [run.entry() for run in runs]
    return {
        title: [{"part": name, "data": part.folder} | row for row in rows]
        for title, rows in tables.items()
    }


def collect(name: str, runs: list[Run]) -> None:
    """Add the rows of a finished part to the tables in results/, and the predictions of its runs.

    Those of other parts are kept if they come from the same code, of whatever machine.
    """
    tables, code = figures(name, runs), code_commits(runs)
    file, parts = RESULTS / "parts.json", RESULTS / PREDICTIONS
    old = read_json(file) if file.exists() else {}
    kept = (
        [part for part in old.get("parts", []) if part != name] if old.get("code") == code else []
    )
    order = [*PARTS].index
    for title, rows in tables.items():
        path = RESULTS / f"{title}.json"
        rows += [row for row in read_json(path, list) if row["part"] in kept] if kept else []
        rows.sort(key=lambda row: order(row["part"]))
        if title == "tests":
            significance.correct(rows)
        write_text(path, to_json(rows))
    predictions = pd.concat(rows_of(PARTS[name], run) for run in runs).astype(str)
    if kept:
        earlier = pd.read_csv(parts, dtype=str, keep_default_na=False)
        new = predictions[RUN].agg("\n".join, axis=1).unique()
        known = earlier[RUN].agg("\n".join, axis=1).isin(new)
        predictions = pd.concat([earlier[~known], predictions])
    predictions = predictions.sort_values([*ROW, *RUN], kind="stable")  # equal hashes compress
    packed = gzip.compress(predictions.to_csv(index=False).encode(), mtime=0)  # always equal bytes
    parts.write_bytes(packed)
    write_text(file, to_json({"parts": sorted([*kept, name], key=order), "code": code}))


def reproduce(args: argparse.Namespace) -> None:
    """Run the parts, and collect after each. Raises: UserError."""
    if git("status", "--porcelain", "--", *CODE):
        raise UserError("files were changed since the last commit: commit them, or run git stash")
    data.prepare(Path(args.source), Path(args.output_dir) / "data")
    for name in (name for name in PARTS if name in args.only):
        print(f"\n{name}", flush=True)
        runs = PARTS[name].plan(args.output_dir)
        execute(runs)
        collect(name, runs)


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
