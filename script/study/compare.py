"""Study: compare all methods over several seeds, on a split that leaks and on unseen texts only.

    bash script/compare.sh [--quick] [--original [DIR...]] [--unseen [DIR...]] [--seeds N...] \\
        [--train_sizes N... all] [--compare A:B...] [-- flags of main.py for every tuned run]

Each DIR contains {train,val,test}_simple.csv, with one label per row. Several folders, such as
those of `split.sh --folds`, use the seeds in turn; a flag without a folder skips its protocol.
Finished runs are not repeated, so a stopped study resumes. The results are a table, paired tests,
study.json, plots and report.html. Accuracies are means over distinct texts, one weight each;
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
import math
import shlex
import sys
from pathlib import Path

import arguments
from model.schedule import advice_after_collapse
from runtime.file_format import SETTINGS
from runtime.files import UserError, run_and_report
from runtime.flags import Parser
from script.study import pages, review, significance, summary
from script.study.runs import METHODS, QUICK, Run, execute, group, is_tuned, plan, read_file

STUDYS_OWN = set(  # flags that the study sets itself, or that would not reach the baselines
    "--problem_type --max_train_samples --output_dir --seed --train_file --validation_file "
    "--test_file --do_train --do_eval --do_predict --overwrite_output_dir --tuning_method --prefix "
    "--prefix_depth --resume_from_checkpoint".split()
) | {f"--{name}" for name in SETTINGS}


def caveats(runs: list[Run], quick: bool, size: int | None, named: bool) -> list[str]:
    """Return the caveats to show with the results.

    size: training rows of the main tables. named: see `name_comparisons`.
    """
    notes = []
    if any(run.record.get("synthetic") for run in runs):
        notes.append("The texts are the synthetic sample: the figures say nothing about real ones.")
    if quick:
        notes.append(f"Trained only briefly, to check that it works (--quick: {' '.join(QUICK)}).")
    if size:
        notes.append(f"Unseen protocol: trained on {size} random rows, not all (--train_sizes).")
    tuned = [run for run in runs if is_tuned(run.method)]
    for protocol, ours in group(tuned, lambda run: run.protocol).items():
        if len({(run.method, run.size, run.data) for run in ours}) == len(ours):
            notes.append(
                f"{protocol}: one seed per folder, so the intervals do not cover what other seeds "
                "would give; for that pass more --seeds than folders."
            )
    for run in tuned:
        if run.predictions["answer"].nunique() == 1:
            kind = "method and size" if run.size else "method"
            advice = advice_after_collapse(run.record["settings"])
            notes.append(
                f"{run.folder.name} predicts one label for every row: it learned nothing, so "
                f"the mean of its {kind} is meaningless: {advice}."
            )
    if len({run.record["commit"] for run in runs}) > 1:
        notes.append("The runs come from different commits of this program, see their run.json.")
    if not named:
        notes.append("The comparisons were named after the first runs: read them as exploratory.")
    return notes


def train_size(text: str) -> int | None:
    """Return a number of training rows, or None for `all`. Raises: ArgumentTypeError."""
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}': use positive numbers of rows, or all")
    return int(text)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the study's flags; invalid ones end the program with a one-line error.

    Raises: UserError for files that cannot be read.
    """
    parser = Parser("bash script/compare.sh", __doc__)
    add, many, named = parser.add_argument, {"nargs": "+"}, significance.COMPARISONS
    folders = arguments.DIR | {"nargs": "*"}
    add("--original", **folders, default=["csv"], help="splits that leak [csv]")
    add("--unseen", **folders, default=["csv/unseen"], help="splits by text [csv/unseen]")
    add("--seeds", **many, type=int, default=[42, 43, 44], help="[42 43 44]")
    add("--methods", **many, default=list(METHODS), choices=METHODS, help="[all]")
    what = "training rows of the unseen protocol, for a learning curve [all]"
    add("--train_sizes", **many, type=train_size, default=[None], metavar="N", help=what)
    what = f"comparisons to test [{', '.join(named)}]"
    look = {"default": named, "metavar": "A:B", "help": what}
    add("--compare", **many, type=significance.comparison, **look)
    add("--quick", action="store_true", help="few epochs, to check that it works")
    what = "[checkpoints/study or checkpoints/study-quick]"
    add("--output_dir", **arguments.DIR, help=what)
    add("flags", nargs="*", help="after --: flags of main.py for every tuned run")
    args = parser.parse_args(argv)
    check(parser, args)
    args.methods = [method for method in METHODS if method in args.methods]
    args.train_sizes = sorted(set(args.train_sizes), key=lambda size: size or math.inf)
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
    if args.compare is not significance.COMPARISONS:
        names = {name for text in args.compare for name in text.split(":")}
        if unknown := sorted(names - {*args.methods, *significance.BEST}):
            parser.error(f"--compare: '{unknown[0]}' is not run: add it to --methods, or omit it")
    if not (args.original or args.unseen):
        parser.error("nothing to study: pass a folder to --original or --unseen")
    if args.train_sizes != [None] and not args.unseen:
        parser.error("--train_sizes applies to the unseen protocol: pass a folder to --unseen")
    if tuned := [word for word in args.flags if (Path(word) / "adapter_config.json").exists()]:
        parser.error(f"{tuned[0]} is an adapter folder: use the backbone it was tuned on")
    for folder in (*args.original, *args.unseen):
        train, *_ = [read_file(folder, name) for name in arguments.USES.values()]
        sizes = args.train_sizes if folder in args.unseen else []
        if large := [size for size in sizes if size and size >= len(train)]:
            raise UserError(
                f"{train.path} has {len(train)} rows: --train_sizes {large[0]} leaves none out, "
                "use 'all' instead"
            )


def run(argv: list[str]) -> None:
    """Execute the study's runs, and write its table, tests, plots and page. Raises: UserError."""
    args = parse_args(argv)
    runs, folder = plan(args), Path(args.output_dir)
    named = significance.name_comparisons(args.compare, folder, runs)
    execute(runs)
    sizes = {"original": None, "unseen": args.train_sizes[-1]}  # the largest
    main_runs = [run for run in runs if run.size == sizes[run.protocol]]
    rows, tests = summary.summarise(main_runs), significance.compare_named(main_runs, args.compare)
    points = summary.learning_curve(runs) if args.train_sizes != [None] else []
    labels = review.least_plausible(main_runs)
    notes = caveats(runs, args.quick, args.train_sizes[-1], named)
    table, curve = summary.format_summary(rows), summary.format_curve(points)
    learned = summary.doublings(points)
    study = {"summary": rows, "tests": tests, "runs": [run.entry() for run in runs]}
    study |= {"sizes": points} if points else {}
    files = {"study.json": json.dumps(study, indent=1)}
    files |= pages.render_study(
        rows,
        points,
        runs=study["runs"],
        table=table,
        tests=tests,
        sentence=significance.sentence,
        sizes=curve,
        learned=learned,
        command=shlex.join(["bash", "script/compare.sh", *argv]),
        notes=notes,
        review=labels.head(review.SHOWN).to_dict("records"),
        folds=len({run.data for run in main_runs if run.protocol == "unseen"}),
    )
    files |= {"label_review.csv": labels.to_csv(index=False)} if len(labels) else {}
    for name, text in files.items():
        (folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    print(table.to_string(index=False), end="\n\n")
    if tests:
        print("comparisons on unseen texts:")
    for test in tests:
        print(f"{test['protocol']:9} {significance.sentence(test)} ({test['texts']:,} texts)")
    if points:
        print("\naccuracy on unseen texts by number of training texts (95 % interval):")
        print(curve.to_string(index=False), *learned, sep="\n")
    for note in notes:
        print(f"\n{note}")
    print(f"in {folder}: {', '.join(files)}, and each run's folder with its own report")


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    return run_and_report(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
