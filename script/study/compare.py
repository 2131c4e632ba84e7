"""Study: compare all methods over several seeds, on a split that leaks and on unseen texts only.

    bash script/compare.sh [--quick] [--original [DIR...]] [--unseen [DIR...]] [--seeds N...] \\
        [--train_sizes N... all] [--compare A:B...] [-- flags of main.py for every tuned run]

Each DIR contains {train,val,test}_simple.csv, with one label per row. Several folders, such as
those of `split.sh --folds`, use the seeds in turn; a flag without a folder skips its protocol.
Finished runs are not repeated, so a stopped study resumes. The results are a table, paired tests,
study.json, two plots and report.html. Accuracies are means over distinct texts, one weight each;
brackets hold their 95 % interval, over texts and, if a folder has several runs, seeds.

--compare names the few comparisons to test: A against B, where B may be "best free" (the best
baseline) or "best single" (the best method but the ensemble), chosen on the validation files.

--train_sizes 250 500 1000 all answers how much data is needed: each method is also trained on that
many rows of the unseen protocol, drawn at random with the run's seed, the same for all methods.
This adds a learning curve. Everything else uses the runs with the most rows. A size must be smaller
than every training file.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

import arguments
from dataset import Split, read_split
from evaluation.predictions import FILES
from evaluation.tables import schedule_name, switch_warning
from model.schedule import advice_after_collapse
from runtime.columns import split_settings
from runtime.file_format import SETTINGS, FileFormat
from runtime.files import UserError, read_json, run_and_report, sha256
from runtime.flags import Parser
from runtime.processes import end_with_parent
from runtime.record import RUN_FILE, read_record
from script.study import learning_curve, pages
from script.study.review import SHOWN, file_margins, least_plausible
from script.study.significance import answers, read_run
from script.study.study_table import COLUMNS, format_cell, summarise
from script.study.study_tests import (
    BEST,
    COMPARISONS,
    comparison,
    describe,
    format_tests,
    name_comparisons,
    test_named,
)

TUNE = ["main.py", "--do_train", "--do_eval", "--do_predict", "--resume_from_checkpoint", "auto"]
BASELINE = ["-m", "script.baseline"]
METHODS = {
    "majority": [*BASELINE, "majority", "--overwrite_output_dir"],
    "look-up": [*BASELINE, "lookup", "--overwrite_output_dir"],
    "TF-IDF, linear": [*BASELINE, "tfidf", "--overwrite_output_dir"],
    "characters, linear": [*BASELINE, "characters", "--overwrite_output_dir"],
    "embeddings, linear": [*BASELINE, "embeddings", "--overwrite_output_dir"],
    "combined, linear": [*BASELINE, "combined", "--overwrite_output_dir"],
    "characters, SVM": [*BASELINE, "characters-svm", "--overwrite_output_dir"],
    "combined, SVM": [*BASELINE, "combined-svm", "--overwrite_output_dir"],
    **{method: [*TUNE, "--tuning_method", method] for method in arguments.METHODS},
    "input prefix": [*TUNE, "--prefix", "--prefix_depth", "input"],
    "4 prefixes": [*TUNE, "--prefix", "--num_prefixes", "4"],
    "ensemble": ["-m", "script.ensemble"],  # of the runs of all other methods
}
NO_MEMBERS = ("majority", "look-up", "ensemble")
USE_BACKBONE = ("embeddings, linear", "combined, linear", "combined, SVM")  # baselines
STUDYS_OWN = set(  # flags that the study sets itself, or that would not reach the baselines
    "--problem_type --max_train_samples --output_dir --seed --train_file --validation_file "
    "--test_file --do_train --do_eval --do_predict --overwrite_output_dir --tuning_method --prefix "
    "--prefix_depth --resume_from_checkpoint".split()
) | {f"--{name}" for name in SETTINGS}
QUICK = ["--num_train_epochs", "3"]


def plan(args: argparse.Namespace) -> list[dict]:
    """List all runs: protocol, method, data folder, seed, size, output folder and command."""
    runs = []
    for protocol, folders in (("original", args.original), ("unseen", args.unseen)):
        # whole passes over the folders, so that each has the same weight
        passes = -(-max(len(folders), len(args.seeds)) // len(folders)) if folders else 0
        for number in range(passes * len(folders)):
            data, seed = folders[number % len(folders)], args.seeds[number % len(args.seeds)]
            sizes = args.train_sizes if protocol == "unseen" else [None]
            members: dict[int | None, list[str]] = {}  # folders of an ensemble, by size
            for method, size in product(args.methods, sizes):
                is_tuned = TUNE[0] in METHODS[method]
                uses_seed = is_tuned or size or method == "ensemble"
                if method == "ensemble" and not members.get(size):
                    continue
                name = method.replace(", ", "-").replace(" ", "-")
                name = f"{protocol}-{name}-{number if uses_seed else number % len(folders)}"
                folder = Path(args.output_dir) / (name + (f"-n{size}" if size else ""))
                if method not in NO_MEMBERS:
                    members.setdefault(size, []).append(str(folder))
                if not uses_seed and number >= len(folders):
                    continue
                command = [*METHODS[method], "--output_dir", str(folder)]
                for use, file in arguments.USES.items():
                    command += [f"--{use}_file", f"{data}/{file}_simple.csv"]
                if is_tuned or size:
                    command += ["--seed", str(seed)]
                if size:
                    command += ["--max_train_samples", str(size)]
                if method in USE_BACKBONE:
                    command += backbone_flags(args.flags)
                if is_tuned:
                    command += [*(QUICK if args.quick else []), *args.flags]
                if method == "ensemble":
                    command = [*METHODS[method], *members[size], "--output_dir", str(folder)]
                run = {"protocol": protocol, "method": method, "data": data, "seed": seed}
                run |= {"size": size, "folder": folder, "command": command, "tuned": is_tuned}
                runs.append(run | {"line": shlex.join(["python", *command])})
    return runs


def backbone_flags(flags: list[str]) -> list[str]:
    """Return those of the flags that name the backbone."""
    name = "--model_name_or_path"
    if name in flags:
        return flags[flags.index(name) :][:2]
    return [flag for flag in flags if flag.startswith(f"{name}=")]


def read_file(folder: str, name: str) -> Split:
    """Read a split file, with the columns that its split.json names. Raises: UserError."""
    form = FileFormat.from_settings(split_settings(f"{folder}/train_simple.csv"))
    return read_split(f"{folder}/{name}_simple.csv", form)


def is_finished(run: dict) -> bool:
    """Return whether the folder contains results of this exact command on unchanged files."""
    record = read_record(run["folder"] / RUN_FILE)
    if record.get("command") != run["line"]:
        return False
    files = {Path(one["path"]): one["sha256"] for one in record["data"].values()}
    runs = record["settings"].get("runs_sha256", {})  # of an ensemble
    files |= {Path(one) / FILES["eval"]: checksum for one, checksum in runs.items()}
    return all(path.exists() and sha256(path) == found for path, found in files.items())


def execute(runs: list[dict]) -> None:
    """Execute the unfinished runs one after the other, with a log file next to each folder.

    Raises: UserError for a folder with another run, and for a run that failed.
    """
    left = [run for run in runs if not is_finished(run)]
    for run in left:
        if (run["folder"] / RUN_FILE).exists():
            raise UserError(
                f"{run['folder']} contains a run with different flags, data or seed: choose "
                "another --output_dir"
            )
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them already finished", flush=True)
    took: dict[tuple, list[float]] = {}  # seconds, by method and size
    for number, run in enumerate(left):
        kinds = [(one["method"], one["size"]) for one in left[number:]]
        known = [np.mean(took[kind]) for kind in kinds if kind in took]
        rest = f"  {np.mean(known) * (len(left) - number) / 60:.0f} min left" if known else ""
        what = f"{run['method']}, {run['data']}, seed {run['seed']}"
        what += f", {run['size']} rows" if run["size"] else ""
        print(f"run {number + 1} of {len(left)}: {what}{rest}", flush=True)
        start = time.perf_counter()
        log = run["folder"].with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, *run["command"]],
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
        took.setdefault(kinds[0], []).append(time.perf_counter() - start)


def seen_keys(folder: str) -> set[str]:
    """Return the keys of a folder's texts that count as seen in its test file, see `Data.seen`."""
    return {key for name in ("train", "val") for key in read_file(folder, name).keys}


def read(run: dict, seen: set[str]) -> dict:
    """Return the run with its results, metrics and predictions added; seen: see `seen_keys`."""
    results = read_json(run["folder"] / "all_results.json")
    weights = run["folder"].rglob("*model.safetensors")  # an ensemble of prefixes has several
    results["stored_bytes"] = sum(path.stat().st_size for path in weights)
    record, split = read_run(run["folder"])
    predictions = answers(split).assign(run=run["folder"].name)
    return run | {
        "results": results,
        "records": read_json(run["folder"] / "metrics.jsonl", lines=True),
        "commit": record["commit"],
        "synthetic": record.get("synthetic"),
        "scored": (record, split),
        "predictions": predictions.assign(seen=predictions["text"].isin(seen)),
    }


def is_reviewer(run: dict, data: str) -> bool:
    """Whether a run's test predictions are used to find wrong labels in the folder `data`."""
    return (run["protocol"], run["data"]) == ("unseen", data) and run["method"] not in NO_MEMBERS


def caveats(runs: list[dict], quick: bool, size: int | None = None) -> list[str]:
    """Return the caveats to show with the results; size: training rows of the main tables."""
    found = []
    if any(run["synthetic"] for run in runs):
        found.append("The texts are the synthetic sample: the figures say nothing about real ones.")
    if quick:
        found.append(f"Trained only briefly, to check that it works (--quick: {' '.join(QUICK)}).")
    if size:
        found.append(f"Unseen protocol: trained on {size} random rows, not all (--train_sizes).")
    for protocol in dict.fromkeys(run["protocol"] for run in runs):
        tuned = [run for run in runs if run["tuned"] and run["protocol"] == protocol]
        kinds = [(run["method"], run["size"], run["data"]) for run in tuned]
        if len(set(kinds)) == len(kinds) > 0:
            found.append(
                f"{protocol}: one seed per folder, so the intervals do not cover what other seeds "
                "would give; for that pass more --seeds than folders."
            )
        for share in sorted({run["results"].get("schedule_seen_share", 0) for run in tuned}):
            if warning := switch_warning(share):
                found.append(f"{protocol}: {schedule_name(share)}{warning}.")
    for run in runs:
        if run["tuned"] and run["predictions"]["answer"].nunique() == 1:
            kind = "method and size" if run["size"] else "method"
            settings = argparse.Namespace(**run["scored"][0]["settings"])
            found.append(
                f"{run['folder'].name} predicts one label for every row: it learned nothing, so "
                f"the mean of its {kind} is meaningless: {advice_after_collapse(settings)}."
            )
    return found


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the study's flags; invalid ones end the program with a one-line error.

    Raises: UserError for files that cannot be read.
    """
    parser = Parser("bash script/compare.sh", __doc__)
    folders = arguments.DIR | {"nargs": "*"}
    parser.add_argument("--original", **folders, default=["csv"], help="splits that leak [csv]")
    parser.add_argument(
        "--unseen", **folders, default=["csv/unseen"], help="splits by text [csv/unseen]"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44], help="[42 43 44]")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=METHODS, help="[all]"
    )
    parser.add_argument(
        "--train_sizes",
        nargs="+",
        type=learning_curve.parse_size,
        default=[None],
        metavar="N",
        help="training rows of the unseen protocol, for a learning curve [all]",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=comparison,
        default=COMPARISONS,
        metavar="A:B",
        help=f"comparisons to test [{', '.join(COMPARISONS)}]",
    )
    parser.add_argument("--quick", action="store_true", help="few epochs, to check that it works")
    parser.add_argument(
        "--output_dir", **arguments.DIR, help="[checkpoints/study or checkpoints/study-quick]"
    )
    parser.add_argument("flags", nargs="*", help="after --: flags of main.py for every tuned run")
    args = parser.parse_args(argv)
    check(parser, args)
    args.methods = [method for method in METHODS if method in args.methods]
    args.train_sizes = learning_curve.in_order(args.train_sizes)
    args.output_dir = args.output_dir or f"checkpoints/study{'-quick' * args.quick}"
    return args


def check(parser: Parser, args: argparse.Namespace) -> None:
    """Check the flags, and that the split files can be read. Raises: UserError if they cannot."""
    if own := sorted({word.partition("=")[0] for word in args.flags} & STUDYS_OWN):
        parser.error(
            f"{own[0]}: the study sets it (use --methods, --seeds, --original, --unseen, "
            "--train_sizes, --output_dir), or it would not reach the baselines (use UTF-8 files "
            "with the columns text and label, or those of script/split.sh)"
        )
    if args.compare is not COMPARISONS:
        names = {name for text in args.compare for name in text.split(":")}
        if unknown := sorted(names - {*args.methods, *BEST}):
            parser.error(f"--compare: '{unknown[0]}' is not run: add it to --methods, or omit it")
    if not (args.original or args.unseen):
        parser.error("nothing to study: pass a folder to --original or --unseen")
    if args.train_sizes != [None] and not args.unseen:
        parser.error("--train_sizes applies to the unseen protocol: pass a folder to --unseen")
    if tuned := [word for word in args.flags if (Path(word) / "adapter_config.json").exists()]:
        parser.error(f"{tuned[0]} is an adapter folder: use the backbone it was tuned on")
    for folder in (*args.original, *args.unseen):
        train, *_ = [read_file(folder, name) for name in arguments.USES.values()]
        if folder in args.unseen:
            learning_curve.check_sizes(args.train_sizes, train.path, len(train))


def run(argv: list[str]) -> None:
    """Execute the study's runs, and write its table, tests, plots and page. Raises: UserError."""
    args = parse_args(argv)
    runs = plan(args)
    named = name_comparisons(args.compare, Path(args.output_dir), runs)
    execute(runs)
    keys = {data: seen_keys(data) for data in {run["data"] for run in runs}}
    runs = [read(run, keys[run["data"]]) for run in runs]
    if len({run["commit"] for run in runs}) > 1:
        print("warning: the runs come from different commits of this program, see their run.json")
    main_runs = learning_curve.largest(runs)
    rows, tests = summarise(main_runs), test_named(main_runs, args.compare)
    review = least_plausible(
        file_margins([run["scored"] for run in main_runs if is_reviewer(run, data)], keys[data])
        for data in args.unseen
    )
    notes = caveats(runs, args.quick, args.train_sizes[-1])
    if not named:
        notes.append("The comparisons were named after the first runs: read them as exploratory.")
    points = learning_curve.summarise(runs) if args.train_sizes != [None] else []
    sizes, sentences = learning_curve.table(points), learning_curve.sentences(points)
    table = [
        [row["protocol"], row["method"], *(format_cell(row, c) for c in COLUMNS)] for row in rows
    ]
    singles = [
        {"folder": run["folder"].name, "command": run["line"]}
        | {name: run[name] for name in ("commit", "results")}
        for run in runs
    ]
    study = {"summary": rows, "tests": tests, "runs": singles}
    study |= {"sizes": points} if points else {}
    page = pages.render_study(
        main_runs,
        rows,
        points,
        runs=runs,
        table=table,
        columns=list(COLUMNS),
        tests=[test | {"sentence": describe(test)} for test in tests],
        sizes=sizes,
        sentences=sentences,
        command=shlex.join(["bash", "script/compare.sh", *argv]),
        notes=notes,
        review=review.head(SHOWN).to_dict("records"),
    )
    pictures = pages.study_pictures(main_runs, rows, points)
    files = {"study.json": json.dumps(study, indent=1), "report.html": page}
    files |= {"label_review.csv": review.to_csv(index=False)} if len(review) else {}
    files |= {f"{name}.svg": text for name, text in pictures.items()}
    for name, text in files.items():
        path = Path(args.output_dir) / name
        path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    frame = pd.DataFrame(table, columns=["protocol", "method", *COLUMNS])
    frame.insert(2, "runs", [row["runs"] for row in rows])
    learned = [learning_curve.format_curve(sizes, sentences)] if points else []
    print(frame.to_string(index=False), format_tests(tests), *learned, *notes, sep="\n\n")
    print(f"in {args.output_dir}: {', '.join(files)}, and each run's folder with its own report")


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    return run_and_report(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
