"""Split a CSV file into training, validation and test files, equal texts in the same file.

    bash script/split.sh mine.csv
    bash script/split.sh posts.csv --text_column_names title,body --label_column_name topic \\
        --group_by author --folds 5

Rows with the same text (up to case and whitespace) are in the same file, and so are rows with an
equal value of a --group_by column. Each label has its share of every file. Each rule that drops or
renames rows prints one line, and split.json counts them. The files have all columns of the input.
"""

import argparse
import contextlib
import io
import shlex
import sys
from itertools import filterfalse
from pathlib import Path

import numpy as np
import pandas as pd

from arguments import (
    DIR,
    FILE,
    INF,
    INT,
    NAME,
    READING,
    SEED,
    STR,
    USES,
    Parser,
    column_names,
    number,
    value,
)
from runtime.advice import row_list
from runtime.csv_reader import Table, text_key
from runtime.file_format import MULTI_LABEL, SETTINGS, FileFormat
from runtime.files import UserError, name_list, plural, run_and_report, sha256
from runtime.labels import label_counts, label_key, label_remarks, read_labels
from script.groups import (
    FEW_ROWS,
    JOINS_LABELS,
    SAMPLE_FILE,
    connected,
    cut_groups,
    describe,
    each_label,
    earlier_splits,
    format_figures,
    keep_earlier,
    keep_training_labels,
    write_splits,
)

FILES = tuple(USES.values())
LARGE_SHARE = 0.9  # of a label, beyond which a warning is printed
SHARE = value(number(float, 0, 1, open_low=True), "S")
FOLDS = value(number(int, 2, INF))
RUN_FLAGS = (*READING, ("--seed", SEED, 42, "seed of the shuffle [42]"))  # as in main.py
OWN_FLAGS = (
    ("--output_dir", DIR, None, "[csv/split/ and the file's name without its ending]"),
    ("--group_by", value(column_names, "A,B"), [],
     "keep rows with an equal value in any of these columns in the same file"),
    ("--time_column", NAME, None, "train on the earliest rows and test on the latest"),
    ("--time_format", STR, None, "of --time_column, as in strptime [numbers or ISO 8601 dates]"),
    ("--folds", FOLDS, None, "write a folder for each of N folds, which is its test file"),
    ("--min_label_count", INT, None, "drop labels with fewer distinct texts or groups [3]"),
    ("--merge_rare", NAME, None, "rename such labels to NAME instead"),
    ("--val_share", SHARE, None, "share of the validation file [0.1]"),
    ("--test_share", SHARE, None, "share of the test file [0.1]"),
)  # fmt: skip


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse and check the arguments.

    With --within_run they are those of main.py: the file is --train_file, and only the flags that
    both programs have are used. A bad argument ends the program with one line and exit status 2.
    """
    within_run = "--within_run" in argv
    parser = Parser("bash script/split.sh", __doc__)
    parser.add_argument("--train_file" if within_run else "file", **FILE)
    for name, kind, default, text in RUN_FLAGS if within_run else RUN_FLAGS + OWN_FLAGS:
        parser.add_argument(name, **kind, default=default, help=text)
    if not within_run:
        args = parser.parse_args(argv)
        check_args(parser, args)
    else:
        args, _ = parser.parse_known_args(argv)
        args.file = args.train_file
        vars(args).update({name[2:]: default for name, _, default, _ in OWN_FLAGS})
    if "," in (args.label_column_name or "") and args.problem_type is None:
        args.problem_type = MULTI_LABEL
    args.form = form = FileFormat.from_settings(vars(args)).in_encoding(args.csv_encoding)
    args.within_run, args.multi_label = within_run, form.multi_label
    try:
        form.check()
    except UserError as error:
        parser.error(str(error))
    args.output_dir = args.output_dir and Path(args.output_dir)  # None: see `find_folder`
    args.min_label_count = args.min_label_count or 3
    args.shares = [args.val_share or 0.1, args.test_share or 0.1]
    if sum(args.shares) >= 1:
        parser.error(
            "--val_share and --test_share leave no training rows: their sum must be below 1"
        )
    args.shares.insert(0, 1 - sum(args.shares))
    return args


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """Reject flags that would have no effect."""
    if args.time_format and not args.time_column:
        parser.error("--time_format needs --time_column")
    for name in ("time_column", "val_share", "test_share"):
        if args.folds and getattr(args, name):
            parser.error(f"--{name} cannot be used with --folds")
    for name in ("min_label_count", "merge_rare"):
        several = args.problem_type == MULTI_LABEL or "," in (args.label_column_name or "")
        if several and getattr(args, name):
            parser.error(f"--{name} cannot be used with labels of which a row may have several")
    if args.label_separator and args.problem_type != MULTI_LABEL:
        parser.error(f"--label_separator needs --problem_type {MULTI_LABEL}")
    if args.merge_rare is not None:
        args.merge_rare = args.merge_rare.strip()
        if not args.merge_rare:
            parser.error("--merge_rare: the name is blank")


def read_file(args: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """Read the file and apply the rules for rows without text, without label and of rare labels.

    Returns the kept rows as they are in the file, the same rows as `text`, `label`, `group` and
    `time`, and the counts of what was dropped or renamed.
    Raises: UserError, also if fewer than two labels or three groups are left.
    """
    times, form = [args.time_column] if args.time_column else [], args.form
    named = [*form.text_column_names, *form.label_column_name]
    file = Table(args.file, form, [*named, *args.group_by, *times])
    table = next(file.frames())
    if args.column_names:  # no header tells the delimiter of other files
        args.delimiter = file.delimiter
    counts = {"rows": len(table), "rows_malformed": file.malformed}
    for remark in file.remarks():
        print(f"warning: {remark}")
    cells = table[list(form.text_column_names)].agg(" ".join, axis=1)
    table = drop_blank(table, cells, "text", counts)
    one_column = not form.multi_label and len(form.label_column_name) == 1
    if one_column:
        table = drop_blank(table, table[form.label_column_name[0]], "label", counts)
    else:
        counts["rows_without_label"] = 0
    rows = pd.DataFrame({"text": cells[table.index]})
    labels = read_labels(args.file, table, [*table.index], form, required=True)
    rows["label"] = one_spelling(labels)
    if rows.empty:
        raise UserError(f"{args.file}: no row has both a text and a label")
    keys = rows["text"].map(text_key)
    rows["group"] = connected(keys, *(table.loc[rows.index, name] for name in args.group_by))
    rows["time"] = parse_times(table.loc[rows.index], args) if times else 0
    if (groups := rows["group"].nunique()) < max(len(FILES), args.folds or 0):
        raise UserError(
            f"{args.file}: texts that must stay together form {plural(groups, 'group')}, "
            "too few to split: add rows, or group by fewer columns"
        )
    if not args.multi_label:
        rows = handle_rare(rows, args, counts)
    several = rows.groupby(keys[rows.index])["label"].nunique() > 1
    counts["texts_with_several_labels"] = int(several.sum())
    say(several, "kept {} with more than one label, together", "texts")
    if (labels := each_label(rows["label"])).nunique() < 2:
        few = name_list(sorted(set(labels))) or "none"
        raise UserError(
            f"{args.file}: fewer than two labels are left ({few}): add rows, lower "
            "--min_label_count, or use --merge_rare"
        )
    table = table.loc[rows.index]
    if one_column:
        table[form.label_column_name[0]] = rows["label"]
    each, first = labels.value_counts().to_dict(), rows["text"].iloc[0]
    line = form.describe(args.file, f"{counts['rows']:,} rows", first, file.read_as())
    args.was_read = [line, f"labels: {label_counts(each, int((rows['label'] == '').sum()))}"]
    if not args.within_run:  # which says the same of the training file
        for remark in label_remarks(each, form):
            print(f"warning: {args.file}: {remark}")
    return table, rows, counts


def drop_blank(table: pd.DataFrame, cells: pd.Series, what: str, counts: dict) -> pd.DataFrame:
    """Drop, count and report the rows whose cell, a text or a label, is blank."""
    blank = cells.str.strip() == ""
    counts[f"rows_without_{what}"] = int(blank.sum())
    say(blank, f"dropped {{}} without a {what}")
    return table[~blank]


def one_spelling(labels: list[list[str]]) -> list[str]:
    """Return the labels of each row as one string, equal labels as they are first written."""
    first: dict[str, str] = {}
    return [
        JOINS_LABELS.join(first.setdefault(label_key(one), one) for one in row) for row in labels
    ]


def say(affected: pd.Series, message: str, noun: str = "rows") -> None:
    """Print how many rows a rule affects, if any; message: with {} for the number and noun."""
    if count := int(affected.sum()):
        print("warning: " + message.format(f"{count} {noun}"))


def parse_times(table: pd.DataFrame, args: argparse.Namespace) -> pd.Series:
    """Return each row's time as a number. Raises: UserError naming the rows without one."""
    text = table[args.time_column].str.strip()
    numbers = pd.to_numeric(text, errors="coerce").replace([np.inf, -np.inf], np.nan)
    try:
        dates = pd.to_datetime(
            text, format=args.time_format or "ISO8601", errors="coerce", utc=True
        )
    except ValueError as error:
        raise UserError(f"--time_format {args.time_format}: {error}") from None
    is_date = args.time_format or dates.count() > numbers.count()
    times = dates if is_date else numbers
    if (bad := times.isna()).any():
        raise UserError(
            f"{args.file}: '{args.time_column}' is not a time in "
            f"{row_list(table.index[bad].tolist())}, such as {text[bad].iloc[0]!r}: see "
            "--time_format"
        )
    return times.astype("int64") if is_date else times


def handle_rare(rows: pd.DataFrame, args: argparse.Namespace, counts: dict) -> pd.DataFrame:
    """Drop or rename the labels with fewer than `args.min_label_count` distinct groups."""

    def rare() -> pd.Series:
        sizes = rows.groupby("label")["group"].nunique()
        return rows["label"].isin(sizes.index[sizes < args.min_label_count])

    found = rare()
    counts["rows_renamed"] = 0
    if args.merge_rare and found.any():
        names = sorted(set(rows["label"][found]))
        counts["rows_renamed"] = int(found.sum())
        say(found, f"renamed {{}} to {args.merge_rare}, of rare labels: {name_list(names)}")
        rows = rows.assign(label=rows["label"].mask(found, args.merge_rare))
        found = rare()
    counts["rows_with_rare_labels"] = int(found.sum())
    names = name_list(sorted(set(rows["label"][found])))
    say(
        found,
        f"dropped {{}} of labels with fewer than {args.min_label_count} distinct texts: {names} "
        "(see --min_label_count, --merge_rare)",
    )
    return rows[~found]


def cut(rows: pd.DataFrame, args: argparse.Namespace) -> dict[str, dict[str, pd.Index]]:
    """Assign the rows to files; returns the index of each file's rows, by folder and file name."""
    strata = rows["label"]
    if args.multi_label:  # a row's label that is the most frequent in the file
        each = each_label(strata)
        each = pd.DataFrame({"row": each.index, "label": each.to_numpy()})
        each["count"] = each.groupby("label")["row"].transform("size")
        each = each.sort_values(["count", "label"], ascending=[False, True])
        first = each.drop_duplicates("row").set_index("row")["label"]
        strata = first.reindex(rows.index).fillna("")
    groups, index = rows["group"].to_numpy(), rows.index
    if not args.folds:
        order = rows["time"] if args.time_column else None
        part = cut_groups(groups, strata, args.shares, args.seed, order)
        return {".": {name: index[part == n] for n, name in enumerate(FILES)}}
    fold = cut_groups(groups, strata, [1 / args.folds] * args.folds, args.seed)
    folders = {}
    for test in range(args.folds):
        rest = fold != test
        is_val = cut_groups(groups[rest], strata[rest], [0.9, 0.1], args.seed + test) == 1
        parts = (index[rest][~is_val], index[rest][is_val], index[~rest])
        folders[str(test)] = dict(zip(FILES, parts, strict=True))
    return folders


def run(args: argparse.Namespace) -> None:
    """Split the file, write the files and print what was done and what to type next."""
    table, rows, counts = read_file(args)
    checksum = sha256(args.file)
    args.output_dir = find_folder(args, checksum)
    parameters = {name[2:]: getattr(args, name[2:]) for name, *_ in RUN_FLAGS + OWN_FLAGS}
    parameters |= {"output_dir": None, "shares": args.shares}
    record = {"protocol": "own", "input": args.file, "input_sha256": checksum}
    record |= {"synthetic": Path(args.file).name == Path(SAMPLE_FILE).name}
    settings = {name: getattr(args, name, None) for name in SETTINGS}
    settings |= {"text_column_names": [*args.form.text_column_names]}
    settings |= {"label_column_name": ",".join(args.form.label_column_name)}
    settings |= {"delimiter": args.delimiter}
    record |= {"columns": {name: one for name, one in settings.items() if one}}
    record |= {"parameters": parameters}
    if args.folds:
        check_folder(args)
    folders, figures = {}, {}
    for folder, parts in cut(rows, args).items():
        path = args.output_dir / folder
        kept = {name: rows.loc[index] for name, index in parts.items()}
        before = sum(map(len, kept.values()))
        kept = keep_training_labels(kept)
        counts["rows_with_labels_not_in_training"] = before - sum(map(len, kept.values()))
        figures[str(path)] = describe(kept)
        tables = {name: table.loc[split.index] for name, split in kept.items()}
        folders[path] = tables, record | {"counts": {**counts}, "splits": figures[str(path)]}
        warn_of_labels(figures[str(path)]["train"], path)
    if kept := keep_earlier(args.output_dir, checksum):
        print(
            f"warning: {args.file} has changed since it was split into {args.output_dir}: its "
            f"earlier split is kept in {kept}, for runs that used it"
        )
    write_splits(folders)
    if args.within_run:
        print(f"split {args.file} into {args.output_dir}, equal texts together (seed {args.seed})")
        return
    print(format_figures(figures))
    name, paths = args.output_dir.resolve().name, shlex.quote(str(args.output_dir))
    if args.folds:
        command = f"bash script/compare.sh --original --unseen {paths}/[0-9]*"
    else:
        files = " ".join(f"--{use}_file {paths}/{n}_simple.csv" for use, n in USES.items())
        command = f"bash script/run_og.sh {files}"
        command += f" --problem_type {MULTI_LABEL}" * args.multi_label
    print(f"next: {command} --output_dir {shlex.quote(f'checkpoints/{name}')}")


def find_folder(args: argparse.Namespace, checksum: str) -> Path:
    """Return --output_dir, or csv/split/NAME.

    If that has the split of another file, a run takes csv/split/PARENT-NAME instead, with the names
    of as many parent folders as needed. checksum: of the file.
    Raises: UserError if the folder has the split of another file.
    """
    file = Path(args.file).resolve()

    def others(folder: Path) -> list[str]:
        inputs = earlier_splits(folder, checksum).values()
        return [name for name in inputs if Path(name).resolve() != file]

    parts = [*file.parts[1:-1], file.stem]
    folders = [Path("csv/split", "-".join(parts[at:])) for at in reversed(range(len(parts)))]
    free = next(filterfalse(others, folders), folders[-1])
    folder = args.output_dir or (free if args.within_run else folders[0])
    if found := others(folder):
        raise UserError(
            f"{folder} has the split of {found[0]}: choose another --output_dir, such as {free}"
        )
    return folder


def check_folder(args: argparse.Namespace) -> None:
    """Reject a folder with more folds than are written now: a study would read all of them."""
    left = {path.name for path in args.output_dir.glob("[0-9]*")} - {*map(str, range(args.folds))}
    if left:
        shown = ", ".join(sorted(left))
        raise UserError(
            f"{args.output_dir} has other folds ({shown}): remove them, or choose another "
            "--output_dir"
        )


def warn_of_labels(train: dict, path: Path) -> None:
    """Warn of labels with few training rows, and of one that has nearly all of them."""
    for label, count in train["labels"].items():
        if count < FEW_ROWS:
            print(f"warning: {path}: only {plural(count, 'training row')} of label {label}")
        if count > LARGE_SHARE * train["rows"]:
            share = f"{count / train['rows']:.0%}"
            print(f"warning: {path}: label {label} has {share} of the training rows")


def run_and_print(args: argparse.Namespace) -> None:
    """Split the file, and print what was done only if that worked. Raises: UserError."""
    held = io.StringIO()
    with contextlib.redirect_stdout(held):
        run(args)
    out = sys.stderr if args.within_run else sys.stdout
    print(*args.was_read, sep="\n", file=out)
    print(held.getvalue(), end="", file=out)
    if args.within_run:  # for script/data.sh
        print(args.output_dir)


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    return run_and_report(run_and_print, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
