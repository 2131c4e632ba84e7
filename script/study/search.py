"""Search: the same small search for every tuned method, on the validation files of new texts.

    .venv/bin/python -m script.study.search FOLD... [--methods NAME...] [--output_dir DIR]

Each FOLD contains {train,val}_simple.csv without common texts, and has one seed. A method is tuned
with its defaults, with each of a few changes, and with the changes that helped, all together.
Finished runs are not repeated. Prints the mean accuracy and log loss on the validation files, and
writes search.json. Test files are not read.
"""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd

from arguments import TUNING
from runtime.files import read_json, run_and_report, to_json, write_text
from runtime.flags import DIR, Parser
from script.study.runs import METHODS, Run, execute, is_tuned

SEARCHED = [name for name in METHODS if is_tuned(name) and name != "4 prefixes"]  # as one prefix
DEFAULTS, STARTED, TOGETHER = "defaults", "a contrastive start", "what helped"


def changes(method: str) -> dict[str, list[str]]:
    """Return the flags of each change of a method's defaults for new texts, by name.

    Without a start unless one is named, whatever the defaults are.
    """
    row = TUNING[method]
    rate, epochs = row.rates[0], row.new[0]
    start = ["--contrastive_steps", "100", "--learning_rate", f"{rate / 2:g}"]
    half = ["--num_train_epochs", f"{epochs // 2}"]
    starts = {STARTED: start, f"{STARTED}, half the epochs": [*start, *half]}
    others = {
        DEFAULTS: [],
        "half the epochs": half,
        "the other pooling": ["--pooling", "cls" if method == "probe" else "mean"],
        "half the rate": ["--learning_rate", f"{rate / 2:g}"],
    }
    others = {name: ["--contrastive_steps", "0", *flags] for name, flags in others.items()}
    return others | (starts if method != "probe" else {})


def helpful(table: dict[str, dict]) -> list[str]:
    """Return the changes with a higher accuracy than the defaults; of two starts the better one."""
    gain = {name: row["accuracy"] - table[DEFAULTS]["accuracy"] for name, row in table.items()}
    starts = sorted((name for name in gain if name.startswith(STARTED)), key=gain.get)
    return [name for name in gain if gain[name] > 0 and name not in starts[:-1]]


def tried(args: Namespace, method: str, name: str, flags: list[str]) -> dict:
    """Tune a method with these flags on each fold: the means of its figures."""
    runs = []
    for seed, data in enumerate(args.folds):
        words = [word for word in METHODS[method] if word != "--do_predict"]
        words += ["--train_file", f"{data}/train_simple.csv"]
        words += ["--validation_file", f"{data}/val_simple.csv", "--seed", str(seed), *flags]
        folder = Path(args.output_dir) / f"{method} {name} {seed}".replace(" ", "-")
        command = (*words, "--output_dir", str(folder))
        runs.append(Run("unseen", method, data, seed, None, folder, command))
    execute(runs)
    for run in runs:  # the figures are all that is read
        for weights in run.folder.glob("*model.safetensors"):
            weights.unlink()
    keys = {"accuracy": "eval_accuracy", "log loss": "eval_loss", "seconds": "train_runtime"}
    means = {name: float(np.mean([run.results[key] for run in runs])) for name, key in keys.items()}
    return {"flags": flags, **means, "commit": runs[-1].record["commit"]}


def search(args: Namespace) -> None:
    """Try everything, print the table and write it."""
    path = Path(args.output_dir) / "search.json"
    found: dict[str, dict[str, dict]] = read_json(path) if path.exists() else {}
    for method in args.methods:
        table, options = {}, changes(method)
        for name, flags in options.items():
            table[name] = tried(args, method, name, flags)
        if len(names := helpful(table)) > 1:
            flags = [word for name in names for word in options[name]]
            table[TOGETHER] = tried(args, method, TOGETHER, flags)
        found[method] = table
        best = max(table, key=lambda name: table[name]["accuracy"])
        columns = ["accuracy", "log loss", "seconds", "flags"]
        shown = pd.DataFrame.from_dict(table, orient="index")[columns].round(4)
        print(f"\n{method}: {best}", shown.to_string(), sep="\n", flush=True)
        write_text(path, to_json(found))


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    parser = Parser("python -m script.study.search", __doc__)
    parser.add_argument("folds", **(DIR | {"nargs": "+"}), help="folders of split files")
    parser.add_argument("--methods", nargs="+", default=SEARCHED, choices=SEARCHED, help="[all]")
    parser.add_argument("--output_dir", **DIR, default="checkpoints/search", help="[%(default)s]")
    return run_and_report(search, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
