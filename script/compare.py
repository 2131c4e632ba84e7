"""The study: every way, over seeds, on a split that leaks and on texts that are all unseen.

    bash script/compare.sh [--quick] [--original [DIR...]] [--unseen [DIR...]] [--seeds N...] \\
        [-- flags of main.py for every tuned run]

A folder holds {train,val,test}_simple.csv, one label a row. Several folders of a protocol, such as
the folds of script/folds.py, take the seeds in turn; none leaves it out. What is finished is not
repeated, so that a study that was stopped goes on. Ends with a table, paired tests, study.json,
two pictures and report.html.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from dataset import text_key
from evaluation import pages, plots
from runtime.csv_reader import DataError, file_sha256, read_table
from runtime.record import RUN_FILE, read_record
from script.paired import exchange_test, predicted

TUNE = ["main.py", "--do_train", "--do_eval", "--do_predict", "--resume_from_checkpoint", "auto"]
METHODS = {
    "majority": ["-m", "script.baseline", "majority", "--overwrite_output_dir"],
    "look-up": ["-m", "script.baseline", "lookup", "--overwrite_output_dir"],
    "TF-IDF, linear": ["-m", "script.baseline", "tfidf", "--overwrite_output_dir"],
    "full": TUNE,
    "prefix": [*TUNE, "--prefix"],
    "input prefix": [*TUNE, "--prefix", "--prefix_depth", "input"],
}
STUDYS_OWN = {  # flags that the study sets itself, or that the baselines would have to share
    "--text_column_names", "--text_column_delimiter", "--label_column_name", "--csv_encoding",
    "--problem_type", "--drop_empty", "--max_train_samples", "--output_dir", "--seed",
    "--train_file", "--validation_file", "--test_file", "--do_train", "--do_eval", "--do_predict",
    "--overwrite_output_dir", "--resume_from_checkpoint", "--prefix", "--prefix_depth",
}  # fmt: skip
QUICK = ["--num_train_epochs", "6"]
COLUMNS = {  # of the table, by their names in all_results.json
    "accuracy": "test_accuracy",
    "seen": "test_seen_share",
    "on seen": "test_accuracy_seen",
    "on unseen": "test_accuracy_unseen",
    "macro F1": "test_macro_f1",
    "log loss": "test_loss",
    "ECE": "test_ece",
    "tuned": "trainable_parameters",
    "bytes": "stored_bytes",
    "seconds": "train_runtime",
    "rows/s": "predict_samples_per_second",
    "memory": "peak_memory_bytes",
}


def plan(args: argparse.Namespace) -> list[dict]:
    """All runs: protocol, method, folder of the data, seed, folder of the results, command."""
    runs = []
    for protocol, folders in (("original", args.original), ("unseen", args.unseen)):
        # whole passes over the folders, so that each weighs the same
        passes = -(-max(len(folders), len(args.seeds)) // len(folders)) if folders else 0
        for number in range(passes * len(folders)):
            data, seed = folders[number % len(folders)], args.seeds[number % len(args.seeds)]
            for method in args.methods:
                name = f"{protocol}-{method.replace(', ', '-').replace(' ', '-')}"
                folder = Path(args.output_dir) / f"{name}-{number}"
                files = [
                    word
                    for flag, file in (("train", "train"), ("validation", "val"), ("test", "test"))
                    for word in (f"--{flag}_file", f"{data}/{file}_simple.csv")
                ]
                command = [*METHODS[method], *files, "--output_dir", str(folder)]
                if TUNE[0] in command:
                    command += ["--seed", str(seed), *(QUICK if args.quick else []), *args.flags]
                elif number >= len(folders):  # a baseline depends on no seed
                    continue
                runs.append({"protocol": protocol, "method": method, "data": data, "seed": seed,
                             "folder": folder, "command": command,
                             "line": shlex.join(["python", *command])})  # fmt: skip
    return runs


def is_finished(run: dict) -> bool:
    """Whether its folder holds the results of the very command on the very files."""
    record = read_record(run["folder"] / RUN_FILE)
    if record.get("command") != run["line"]:
        return False
    files = record["data"].values()
    return all(Path(f["path"]).exists() and file_sha256(f["path"]) == f["sha256"] for f in files)


def work_through(runs: list[dict]) -> None:
    """Run what is not finished, one after the other; a log lies beside each folder."""
    left = [run for run in runs if not is_finished(run)]
    for run in left:
        if (run["folder"] / RUN_FILE).exists():
            sys.exit(f"error: {run['folder']} holds a run with other flags, data or seed: give "
                     "another --output_dir")  # fmt: skip
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished already", flush=True)
    took: dict[str, list[float]] = {}
    for number, run in enumerate(left):
        known = [np.mean(took[one["method"]]) for one in left[number:] if one["method"] in took]
        rest = f"{np.mean(known) * (len(left) - number) / 60:.0f} min left" if known else ""
        print(f"run {number + 1} of {len(left)}: {run['method']}, {run['data']}, seed "
              f"{run['seed']}  {rest}", flush=True)  # fmt: skip
        start = time.perf_counter()
        log = run["folder"].with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as file:
            process = subprocess.Popen([sys.executable, *run["command"]], stdout=file, stderr=file)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # which the run got too: it saves its step
            status = process.wait()
        if status:
            last = log.read_text(encoding="utf-8").strip().split("\n")[-1]
            sys.exit(f"{last}\nthe whole of it: {log}; the same command goes on from here")
        took.setdefault(run["method"], []).append(time.perf_counter() - start)


def read(run: dict) -> dict:
    """A run with its figures, records and predictions."""
    results = json.loads((run["folder"] / "all_results.json").read_text(encoding="utf-8"))
    weights = [run["folder"] / name for name in ("model.safetensors", "adapter_model.safetensors")]
    results["stored_bytes"] = sum(path.stat().st_size for path in weights if path.exists())
    records = run["folder"] / "metrics.jsonl"
    lines = records.read_text(encoding="utf-8").splitlines() if records.exists() else []
    about = read_record(run["folder"] / RUN_FILE)
    return run | {
        "results": results, "records": [json.loads(line) for line in lines],
        "commit": about["commit"], "synthetic": about.get("synthetic"),
        "predictions": predicted(run["folder"]),
    }  # fmt: skip


def notes(runs: list[dict], quick: bool) -> list[str]:
    """What one has to know before one believes the figures."""
    found = []
    if any(run["synthetic"] for run in runs):
        found.append(
            "The texts are made up, of the synthetic sample: the figures tell nothing of real ones."
        )
    if quick:
        found.append(f"Tuned to see it work only (--quick: {' '.join(QUICK)}).")
    for run in runs:
        if TUNE[0] in run["command"] and run["predictions"]["answer"].nunique() == 1:
            found.append(
                f"{run['folder'].name} gives every row the same label: it has learnt nothing, and "
                "the means of its method are worth as much; try another rate or more epochs."
            )
    return found


def summary(runs: list[dict]) -> list[dict]:
    """Mean and standard deviation of each column, by protocol and method."""
    rows = []
    for protocol, method in dict.fromkeys((run["protocol"], run["method"]) for run in runs):
        ours = [r["results"] for r in runs if (r["protocol"], r["method"]) == (protocol, method)]
        row = {"protocol": protocol, "method": method, "runs": len(ours)}
        for column, key in COLUMNS.items():
            values = [one[key] for one in ours if one.get(key) is not None]
            row[column] = float(np.mean(values)) if values else None
            row[f"{column} sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append(row)
    return rows


@cache
def known_texts(path: str) -> set[str]:
    """The keys of a training file's texts."""
    return set(read_table(path, "utf-8", ["text"])["text"].map(text_key))


def hits(run: dict) -> pd.DataFrame:
    """Of each distinct test text that is unseen in training: its rows, and how many are right."""
    table = run["predictions"]
    unseen = table[~table["text"].isin(known_texts(f"{run['data']}/train_simple.csv"))]
    return unseen.assign(rows=1).groupby("text")[["rows", "right"]].sum()


def paired_tests(runs: list[dict]) -> list[dict]:
    """Each two methods on the same unseen texts: difference of accuracy, and its p-value.

    Over distinct texts, each with its share of right predictions over rows and seeds: the test
    knows nothing of what other seeds would give.
    """
    found = []
    for protocol in dict.fromkeys(run["protocol"] for run in runs):
        tables = {}
        for method in METHODS:
            ours = [hits(r) for r in runs if (r["protocol"], r["method"]) == (protocol, method)]
            if ours:
                together = pd.concat(ours).groupby(level=0).sum()
                tables[method] = together["right"] / together["rows"]
        for one, other in combinations(tables, 2):
            if tables[one].index.equals(tables[other].index) and len(tables[one]) > 1:
                pair = (tables[one].to_numpy(), tables[other].to_numpy())
                difference, p = exchange_test(*pair)
                found.append({"protocol": protocol, "one": one, "other": other,
                              "texts": len(pair[0]), "difference": difference,
                              "p": p})  # fmt: skip
    return found


def shown(row: dict, column: str) -> str:
    """A cell of the table."""
    value, spread = row[column], row[f"{column} sd"]
    if value is None or (column in ("tuned", "bytes") and not value):
        return "-"
    if column == "memory":
        return f"{value / 2**30:.2f} GiB"
    if column == "bytes":
        return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.0f} kB"
    if column in ("tuned", "seconds", "rows/s"):
        return f"{value:,.0f}"
    return f"{value:.4f}" + (f" ±{spread:.4f}" if spread is not None else "")


def text_table(rows: list[dict], tests: list[dict]) -> str:
    """What the terminal shows in the end."""
    frame = pd.DataFrame(
        [[row["protocol"], row["method"], row["runs"], *(shown(row, c) for c in COLUMNS)]
         for row in rows],
        columns=["protocol", "method", "runs", *COLUMNS],
    )  # fmt: skip
    lines = [frame.to_string(index=False), "", "paired on unseen texts, p by permutation of texts:"]
    lines += [
        f"{test['protocol']:9} {test['other']} against {test['one']}: "
        f"{100 * test['difference']:+.2f} points, p = {test['p']:.4f} ({test['texts']:,} texts)"
        for test in tests
    ]
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    """The study's flags; what cannot be studied ends the program with one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--original", nargs="*", default=["csv"], metavar="DIR", help="splits that leak [csv]"
    )
    parser.add_argument(
        "--unseen", nargs="*", default=["csv/unseen"], metavar="DIR", help="[csv/unseen]"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44], help="[42 43 44]")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=METHODS, help="[all]"
    )
    parser.add_argument("--quick", action="store_true", help="few epochs, to see it work")
    parser.add_argument("--output_dir", help="[checkpoints/study, or with --quick study-quick]")
    parser.add_argument("flags", nargs="*", help="after --: of main.py, for every tuned run")
    args = parser.parse_args()
    if own := sorted({word.partition("=")[0] for word in args.flags} & STUDYS_OWN):
        parser.error(
            f"{own[0]}: the study sets it (--methods, --seeds, --original, --unseen, "
            "--output_dir), or its baselines would not share it: files are UTF-8, with columns "
            "text and label"
        )
    if not (args.original or args.unseen):
        parser.error("give at least one folder for --original or --unseen")
    if tuned := [word for word in args.flags if (Path(word) / "adapter_config.json").exists()]:
        parser.error(f"{tuned[0]} is a tuned prefix: a study starts from a backbone")
    try:
        for folder in (*args.original, *args.unseen):
            for file in ("train", "val", "test"):
                read_table(f"{folder}/{file}_simple.csv", "utf-8", ["text", "label"])
    except DataError as error:
        parser.error(str(error))
    args.output_dir = args.output_dir or f"checkpoints/study{'-quick' * args.quick}"
    return args


def main() -> None:
    args = parse_args()
    runs = plan(args)
    work_through(runs)
    runs = [read(run) for run in runs]
    if len({run["commit"] for run in runs}) > 1:
        print("warning: the runs are of several commits of this program, see their run.json")
    rows, tests = summary(runs), paired_tests(runs)
    folder = Path(args.output_dir)
    singles = [
        {"folder": run["folder"].name, "command": run["line"], "commit": run["commit"],
         "results": run["results"]}
        for run in runs
    ]  # fmt: skip
    files = {
        "study.json": json.dumps({"summary": rows, "tests": tests, "runs": singles}, indent=1),
        **{f"{name}.svg": x for name, x in plots.study_pictures(runs, rows).items()},
    }
    warnings = notes(runs, args.quick)
    command = shlex.join(["bash", "script/compare.sh", *sys.argv[1:]])
    table = [[row["protocol"], row["method"], *(shown(row, c) for c in COLUMNS)] for row in rows]
    files["report.html"] = pages.render_study(
        runs, rows, table, list(COLUMNS), tests, command, warnings
    )
    for name, text in files.items():
        (folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    print(text_table(rows, tests))
    print(*warnings, sep="\n")
    print(f"in {folder}: {', '.join(files)}, and each run's folder with a report of its own")


if __name__ == "__main__":
    main()
