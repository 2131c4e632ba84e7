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
from pathlib import Path

import numpy as np
import pandas as pd

from arguments import READING, USES
from runtime.advice import row_list
from runtime.csv_reader import Table, text_key
from runtime.file_format import SETTINGS, FileFormat, SplitRecord
from runtime.files import UserError, name_list, plural, read_json, run_and_report, sha256
from runtime.flags import (
    DIR,
    FILE,
    INF,
    INT,
    MULTI_LABEL,
    NAME,
    SEED,
    STR,
    SWITCH,
    Parser,
    column_names,
    number,
    value,
)
from runtime.labels import label_counts, label_key, label_remarks, read_labels
from script import groups

FILES = tuple(USES.values())
LARGE_SHARE = 0.9  # of a label, beyond which a warning is printed
SHARE = value(number(float, 0, 1, open_low=True), "S")
RUN_FLAGS = (*READING, ("--seed", SEED, 42, "seed of the shuffle [42]"))  # as in main.py
OWN_FLAGS = (
    ("--output_dir", DIR, None, "[csv/split/ and the file's name without its ending]"),
    ("--group_by", value(column_names, "A,B"), [],
     "keep rows with an equal value in any of these columns in the same file"),
    ("--time_column", NAME, None, "train on the earliest rows and test on the latest"),
    ("--time_format", STR, None, "of --time_column, as in strptime [numbers or ISO 8601 dates]"),
    ("--folds", value(number(int, 2, INF)), None,
     "write a folder for each of N folds, which is its test file"),
    ("--min_label_count", INT, None, "drop labels with fewer distinct texts or groups [3]"),
    ("--merge_rare", value(str.strip, "NAME"), None, "rename such labels to NAME instead"),
    ("--val_share", SHARE, None, "share of the validation file [0.1]"),
    ("--test_share", SHARE, None, "share of the test file [0.1]"),
)  # fmt: skip
TASKS = (("--do_eval", SWITCH, True, ""), ("--do_predict", SWITCH, True, ""))  # of a run script


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse and check the arguments.

    With --within_run they are those of a run script: the file is --train_file, and the flags of
    main.py that do not matter here are ignored. A bad argument ends the program with exit status 2.
    """
    within_run = "--within_run" in argv
    parser = Parser("bash script/split.sh", __doc__)
    parser.add_argument("--train_file" if within_run else "file", **FILE)
    for name, kind, default, text in RUN_FLAGS + (TASKS if within_run else OWN_FLAGS):
        parser.add_argument(name, **kind, default=default, help=text)
    parser.set_defaults(within_run=within_run, **{row[0][2:]: row[2] for row in OWN_FLAGS})
    args = parser.parse_known_args(argv)[0] if within_run else parser.parse_args(argv)
    args.file = args.train_file if within_run else args.file
    check_args(parser, args)
    return args


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """Reject flags that would have no effect; determine the file's format and the shares."""
    several = args.problem_type == MULTI_LABEL or "," in (args.label_column_name or "")
    separable = args.problem_type == MULTI_LABEL
    for names, useless, reason in (
        ("time_format", not args.time_column, "needs --time_column"),
        ("time_column val_share test_share", args.folds, "cannot be used with --folds"),
        ("min_label_count merge_rare", several, "cannot be used with several labels per row"),
        ("label_separator", not separable, f"needs --problem_type {MULTI_LABEL}"),
    ):
        for name in names.split():
            if useless and getattr(args, name) and not args.within_run:
                parser.error(f"--{name} {reason}")
    if args.merge_rare == "":
        parser.error("--merge_rare: the name is blank")
    if several and args.problem_type is None:
        args.problem_type = MULTI_LABEL
    args.form = FileFormat.from_settings(vars(args)).in_encoding(args.csv_encoding)
    args.form.check()
    args.min_label_count = args.min_label_count or 3
    val_share, test_share = args.val_share or 0.1, args.test_share or 0.1
    args.shares = [1 - (val_share + test_share), val_share, test_share]
    if args.shares[0] <= 0:
        parser.error("--val_share and --test_share leave no training rows: lower their sum below 1")


def read_file(args: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """Read the file and apply the rules for rows without text, without label and of rare labels.

    Returns the kept rows as they are in the file, the same rows as `text`, `label`, `group` and
    `time`, and the counts of what was dropped or renamed.
    Raises: UserError, also if fewer than two labels or three groups are left.
    """
    form, counts = args.form, {}
    used = [*form.text_column_names, *form.label_column_name, *args.group_by]
    file = Table(args.file, form, [*used, *filter(None, [args.time_column])])
    table = next(file.frames())
    if args.column_names:  # no header tells the delimiter of other files
        args.delimiter = file.delimiter
    counts |= {"rows": len(table), "rows_malformed": file.malformed}
    warn(*file.remarks())
    texts = table[list(form.text_column_names)].agg(" ".join, axis=1)
    labels = table[form.label_column_name[0]]
    one_label = not form.multi_label and len(form.label_column_name) == 1
    has_label = labels.str.strip() != "" if one_label else labels.notna()  # others may be blank
    has_text = texts.str.strip() != ""
    table = table[drop(~has_text, counts, "rows_without_text", "without a text")]
    table = table[drop(~has_label[has_text], counts, "rows_without_label", "without a label")]
    if table.empty:
        raise UserError(f"{args.file}: no row has both a text and a label")
    rows = pd.DataFrame({"text": texts[table.index]})
    rows["label"] = one_spelling(read_labels(args.file, table, [*table.index], form, needed=True))
    keys = rows["text"].map(text_key)
    rows["group"] = groups.connected(keys, *(table[name] for name in args.group_by))
    rows["time"] = parse_times(table, args) if args.time_column else 0
    if (count := rows["group"].nunique()) < max(len(FILES), args.folds or 0):
        raise UserError(
            f"{args.file}: texts that must stay together form {plural(count, 'group')}, "
            "too few to split: add rows, or group by fewer columns"
        )
    if not form.multi_label:
        rows = handle_rare(rows, args, counts)
    several = rows.groupby(keys[rows.index])["label"].nunique() > 1
    counts["texts_with_several_labels"] = int(several.sum())
    if several.any():
        warn(f"kept {several.sum()} texts with more than one label, together")
    label_rows = groups.each_label(rows["label"]).value_counts().to_dict()
    if len(label_rows) < 2:
        raise UserError(
            f"{args.file}: fewer than two labels are left ({name_list(label_rows) or 'none'}): add "
            "rows, lower --min_label_count, or use --merge_rare"
        )
    table = table.loc[rows.index]
    if one_label:
        table[form.label_column_name[0]] = rows["label"]
    kept = f"{counts['rows']:,} rows"
    print(form.describe(args.file, kept, rows["text"].iloc[0], file.read_as()))
    print(f"labels: {label_counts(label_rows, int((rows['label'] == '').sum()))}")
    if not args.within_run:  # which says the same of the training file
        warn(*(f"{args.file}: {remark}" for remark in label_remarks(label_rows, form)))
    return table, rows, counts


def warn(*remarks: str) -> None:
    """Print warnings."""
    for remark in remarks:
        print(f"warning: {remark}")


def drop(rows: pd.Series, counts: dict[str, int], name: str, which: str) -> pd.Series:
    """Count and report the rows to drop, bool [N]; returns which rows to keep."""
    counts[name] = int(rows.sum())
    if rows.any():
        warn(f"dropped {rows.sum()} rows {which}")
    return ~rows


def one_spelling(labels: list[list[str]]) -> list[str]:
    """Return the labels of each row as one string, equal labels as they are first written."""
    first: dict[str, str] = {}
    return [
        groups.JOINS_LABELS.join(first.setdefault(label_key(label), label) for label in row)
        for row in labels
    ]


def parse_times(table: pd.DataFrame, args: argparse.Namespace) -> pd.Series:
    """Return each row's time as a number. Raises: UserError naming the rows without one."""
    text = table[args.time_column].str.strip()
    numbers = pd.to_numeric(text, errors="coerce").replace([np.inf, -np.inf], np.nan)
    form = args.time_format or "ISO8601"
    try:
        dates = pd.to_datetime(text, format=form, errors="coerce", utc=True)
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

    def find_rare() -> tuple[pd.Series, str]:
        sizes = rows.groupby("label")["group"].nunique()
        is_rare = rows["label"].isin(sizes.index[sizes < args.min_label_count])
        return is_rare, name_list(sorted(set(rows["label"][is_rare])))

    is_rare, names = find_rare()
    counts["rows_renamed"] = 0
    if args.merge_rare and names:
        counts["rows_renamed"] = int(is_rare.sum())
        warn(f"renamed {is_rare.sum()} rows to {args.merge_rare}, of rare labels: {names}")
        rows = rows.assign(label=rows["label"].mask(is_rare, args.merge_rare))
        is_rare, names = find_rare()
    which = f"of labels with fewer than {args.min_label_count} distinct texts: {names} "
    which += "(see --min_label_count, --merge_rare)"
    return rows[drop(is_rare, counts, "rows_with_rare_labels", which)]


def cut(rows: pd.DataFrame, args: argparse.Namespace) -> dict[str, dict[str, pd.Index]]:
    """Assign the rows to files; returns the index of each file's rows, by folder and file name."""
    strata = rows["label"]
    if args.form.multi_label:  # a row's label that is the most frequent in the file
        labels = groups.each_label(strata)
        sizes = labels.value_counts().sort_index().sort_values(ascending=False, kind="stable")
        rank = pd.Series(range(len(sizes)), sizes.index)
        first = labels.map(rank).groupby(level=0).min()
        strata = first.map(dict(enumerate(sizes.index))).reindex(rows.index).fillna("")
    members, index = rows["group"].to_numpy(), rows.index
    if not args.folds:
        order = rows["time"] if args.time_column else None
        part = groups.cut_groups(members, strata, args.shares, args.seed, order)
        return {".": {name: index[part == n] for n, name in enumerate(FILES)}}
    fold, folders = groups.cut_groups(members, strata, [1 / args.folds] * args.folds, args.seed), {}
    for test in range(args.folds):
        rest = fold != test
        is_val = groups.cut_groups(members[rest], strata[rest], [0.9, 0.1], args.seed + test) == 1
        parts = (index[rest][~is_val], index[rest][is_val], index[~rest])
        folders[str(test)] = dict(zip(FILES, parts, strict=True))
    return folders


def find_folder(args: argparse.Namespace, checksum: str) -> Path:
    """Return --output_dir or csv/split/NAME, if that has the split of this very content, or none.

    Otherwise return csv/split/NAME-CHECKSUM, so that runs can be resumed that used the other split.
    Raises: UserError if --output_dir has another split, or more folds: a study would read them.
    """
    folder = Path(args.output_dir or Path("csv/split", Path(args.file).stem))
    for path in (folder / "split.json", *folder.glob("[0-9]*/split.json")):
        record = read_json(path, SplitRecord) if path.exists() else {}
        if record.get("input_sha256", checksum) != checksum:
            what = f"{folder} has the split of another file or content"
            if args.output_dir:
                raise UserError(f"{what}: remove it, or choose another --output_dir")
            warn(f"{what}: it is kept")
            return folder.with_name(f"{folder.name}-{checksum[:8]}")
    others = {path.name for path in folder.glob("[0-9]*")} - {*map(str, range(args.folds or 0))}
    if args.folds and others:
        raise UserError(
            f"{folder} has other folds ({', '.join(sorted(others))}): remove them, or choose "
            "another --output_dir"
        )
    return folder


def warn_of_labels(train: dict, path: Path) -> None:
    """Warn of labels with few training rows, and of one that has nearly all of them."""
    for label, count in train["labels"].items():
        if count < groups.FEW_ROWS:
            warn(f"{path}: only {plural(count, 'training row')} of label {label}")
        if count > LARGE_SHARE * train["rows"]:
            share = f"{count / train['rows']:.0%}"
            warn(f"{path}: label {label} has {share} of the training rows")


def split_file(args: argparse.Namespace) -> None:
    """Split the file, write the files and print what was done. Raises: UserError."""
    table, rows, counts = read_file(args)
    checksum, form = sha256(args.file), args.form
    args.folder = find_folder(args, checksum)
    columns = {"text_column_names": [*form.text_column_names]}
    columns = vars(args) | columns | {"label_column_name": ",".join(form.label_column_name)}
    parameters = {name[2:]: getattr(args, name[2:]) for name, *_ in RUN_FLAGS + OWN_FLAGS}
    record = {
        "protocol": "own",
        "input": args.file,
        "input_sha256": checksum,
        "synthetic": Path(args.file).name == Path(groups.SAMPLE_FILE).name,
        "columns": {name: columns[name] for name in SETTINGS if columns.get(name)},
        "parameters": parameters | {"output_dir": None, "shares": args.shares},
    }
    folders, figures = {}, {}
    for name, parts in cut(rows, args).items():
        path = args.folder / name
        kept = groups.keep_training_labels({name: rows.loc[index] for name, index in parts.items()})
        lost = sum(map(len, parts.values())) - sum(map(len, kept.values()))
        figures[str(path)] = splits = groups.describe(kept)
        tables = {name: table.loc[split.index] for name, split in kept.items()}
        content = {"counts": counts | {"rows_with_labels_not_in_training": lost}, "splits": splits}
        folders[path] = tables, record | content
        warn_of_labels(splits["train"], path)
    groups.write_splits(folders)
    if args.within_run:
        print(f"split {args.file} into {args.folder}, equal texts together (seed {args.seed})")
    else:
        print(groups.format_figures(figures))
        name = shlex.quote(f"checkpoints/{args.folder.resolve().name}")
        print(f"next: {next_command(args)} --output_dir {name}")


def next_command(args: argparse.Namespace) -> str:
    """Return a command that uses the files."""
    if args.folds:
        folds = f"{shlex.quote(str(args.folder))}/[0-9]*"
        return f"bash script/compare.sh --original --unseen {folds}"
    flags = file_flags(args.folder, USES)
    flags += ["--problem_type", MULTI_LABEL] if args.form.multi_label else []
    return f"bash script/run_og.sh {shlex.join(flags)}"


def file_flags(folder: Path, uses: dict[str, str]) -> list[str]:
    """Return the flags of main.py that name the files in a folder."""
    files = ((f"--{use}_file", f"{folder}/{name}_simple.csv") for use, name in uses.items())
    return [word for flag in files for word in flag]


def run(argv: list[str]) -> None:
    """Split the file, and print what was done only if that worked. Raises: UserError."""
    args, held = parse_args(argv), io.StringIO()
    with contextlib.redirect_stdout(held):
        split_file(args)
    print(held.getvalue(), end="", file=sys.stderr if args.within_run else sys.stdout)
    if args.within_run:  # script/data.sh adds these flags to those of main.py
        used = {"train": True, "validation": args.do_eval, "test": args.do_predict}
        print(shlex.join(file_flags(args.folder, {u: n for u, n in USES.items() if used[u]})))


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    return run_and_report(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
