"""Read CSV files into checked rows and labels, and audit them for leaks.

Independent of any model. N rows, C classes.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from pathlib import Path

import numpy as np
import pandas as pd

from runtime.advice import row_list
from runtime.csv_reader import Table, text_key
from runtime.file_format import FileFormat
from runtime.files import UserError, check_unchanged, name_list
from runtime.labels import (
    label_counts,
    label_key,
    label_numbers,
    label_remarks,
    read_labels,
    sort_labels,
)

logger = logging.getLogger(__name__)

CHUNK_ROWS = 20_000  # rows of a test file in memory at a time


@dataclass(frozen=True)
class Split:
    """A checked CSV file, or a chunk of one."""

    path: str
    table: pd.DataFrame  # every column as text, N rows
    texts: list[str]
    labels: list[list[str]] | None  # label names of each row; None if the file has no labels
    rows: list[int]  # each row's number in the file, from 1
    multi_label: bool = False  # whether a row may have several labels, or none
    dropped: int = 0  # rows without a text
    malformed: int = 0  # rows that were dropped, if the file was read as a whole
    read_as: str = ""  # if that is not usual
    label_ids: np.ndarray | None = None  # int64 [N], or float32 [N, C] of 0 and 1
    sha256: str = ""  # of the whole file, if it was read as a whole

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def columns(self) -> list[str]:
        """The columns of the file."""
        return list(self.table)

    @cached_property
    def keys(self) -> list[str]:
        """The `text_key` of each row."""
        return [text_key(text) for text in self.texts]

    def count_labels(self, names: list[str]) -> dict[str, int]:
        """Count the rows of each label, after `number_labels(names)`."""
        ids = self.label_ids
        counts = np.bincount(ids, minlength=len(names)) if ids.ndim == 1 else ids.sum(axis=0)
        return {name: int(count) for name, count in zip(names, counts, strict=True)}

    def sample(self, count: int | None, seed: int) -> "Split":
        """Draw `count` rows at random, in file order; all rows if `count` is None or too large."""
        if count is None or count >= len(self):
            return self
        return self.take(np.random.default_rng(seed).choice(len(self), count, replace=False))

    def take(self, chosen: np.ndarray) -> "Split":
        """Return the rows at these positions (from 0), in file order and without label ids."""
        chosen = np.sort(chosen)
        lists = {"texts": self.texts, "labels": self.labels, "rows": self.rows}
        lists = {name: [values[place] for place in chosen] for name, values in lists.items()}
        return replace(self, table=self.table.iloc[chosen], label_ids=None, **lists)

    def number_labels(self, names: list[str]) -> "Split":
        """Return the same rows with `label_ids` set, in the order of `names`, if they have labels.

        Raises: UserError naming the labels that are not in `names`, and their rows.
        """
        if self.labels is None:
            return self
        index = label_numbers(names)
        ids = [[index.get(label_key(name), -1) for name in labels] for labels in self.labels]
        unknown = [-1 in row for row in ids]
        if any(unknown):
            labels = {name for row in self.labels for name in row if label_key(name) not in index}
            raise UserError(
                f"{self.path}: label {name_list(map(repr, sorted(labels)))} in "
                f"{row_list([*compress(self.rows, unknown)])} does not occur in the training "
                f"file, which has {name_list(map(repr, names))}; correct or remove such rows"
            )
        if not self.multi_label:
            return replace(self, label_ids=np.array(ids, dtype=np.int64).reshape(-1))
        one_hot = np.zeros((len(self), len(names)), dtype=np.float32)
        for row, numbers in enumerate(ids):
            one_hot[row, numbers] = 1
        return replace(self, label_ids=one_hot)


@dataclass(frozen=True)
class RowPrefixes:
    """A column of a file that names the adapter folder to predict each row with."""

    column: str  # --prefix_column
    paths: list[str]  # --prefix_paths
    labels: list[list[str]]  # of each folder

    def index(self, split: Split) -> np.ndarray:
        """Return the index in `paths` of the folder that each row names: int64 [N].

        A row names the path as on the command line, or just the folder.
        Raises: UserError if the column is missing, or names an unknown or ambiguous folder.
        """
        if (count := split.columns.count(self.column)) != 1:
            what = "has no column" if count == 0 else "has more than once the column"
            raise UserError(f"{split.path} {what} '{self.column}' (--prefix_column)")
        numbers: dict[str, set[int]] = {}
        for number, path in enumerate(self.paths):
            for name in {path, path.rstrip("/"), Path(path).name}:
                numbers.setdefault(name, set()).add(number)
        matches = [numbers.get(cell.strip(), ()) for cell in split.table[self.column]]
        if bad := [row for row, ids in zip(split.rows, matches, strict=True) if len(ids) != 1]:
            raise UserError(
                f"{split.path}: '{self.column}' in {row_list(bad)} names none, or more than one, "
                f"of --prefix_paths {' '.join(self.paths)}"
            )
        return np.array([min(ids) for ids in matches], dtype=np.int64)

    def check_labels(self, split: Split) -> None:
        """Check that each row's folder knows its label. Raises: UserError, see also `index`."""
        index = self.index(split)
        for number, names in enumerate(self.labels if split.labels else ()):
            split.take(np.flatnonzero(index == number)).number_labels(names)


def open_table(path: str | Path, form: FileFormat, needs_labels: bool) -> Table:
    """Open a file, which needs the text columns and perhaps the label columns."""
    labels = form.label_column_name if needs_labels else ()
    return Table(path, form, [*form.text_column_names, *labels])


def read_chunks(table: Table, size: int | None, needs_labels: bool = True) -> Iterator[Split]:
    """Read and check the rows of a file, `size` rows at a time or all at once.

    needs_labels: else the label column may be missing or all blank.
    Raises: UserError that names the file, the rows and what to do.
    """
    form, path, join = table.form, str(table.path), table.form.text_column_delimiter.join
    for frame in table.frames(size):
        fields = zip(*(frame[name] for name in form.text_column_names), strict=True)
        texts = [join(row) if any(map(str.strip, row)) else "" for row in fields]
        blank = np.array([not text for text in texts])
        if blank.any() and not form.drop_empty:
            raise UserError(
                f"{path}: the text is blank in {row_list(frame.index[blank].tolist())}; "
                f"fill it in, or drop such rows with {form.flag('drop_empty')}"
            )
        rows, texts = frame.index[~blank].tolist(), [*filter(None, texts)]
        frame = frame[~blank].reset_index(drop=True)
        labels = read_labels(path, frame, rows, form, needs_labels)
        yield Split(path, frame, texts, labels, rows, form.multi_label, int(blank.sum()))


def read_split(path: str | Path, form: FileFormat, needs_labels: bool = True) -> Split:
    """Read and check a whole file, see `read_chunks`, and log what may be wrong with it."""
    table = open_table(path, form, needs_labels)
    split = next(read_chunks(table, None, needs_labels))
    log_remarks(table, split.dropped, len(split))
    check_unchanged(path, table.sha256)
    facts = {"malformed": table.malformed, "read_as": table.read_as(), "sha256": table.sha256}
    return replace(split, **facts)


def log_remarks(table: Table, dropped: int, left: int) -> None:
    """Log what may be wrong with a file. Raises: UserError if no row has a text."""
    for remark in table.remarks():
        logger.warning("warning: %s", remark)
    if dropped:
        logger.warning("warning: %s: dropped %d rows without a text", table.path, dropped)
    if not left:
        raise UserError(
            f"{table.path}: every text is blank; name another column with "
            f"{table.form.flag('text_column_names', 'NAME')}"
        )


@dataclass(frozen=True)
class TestFile:
    """A test file of any size: first checked as a whole, then read chunk by chunk."""

    path: str
    sha256: str
    rows: int
    columns: list[str]
    labelled: bool
    names: list[str]  # the labels, in the order of their numbers
    form: FileFormat
    malformed: int = 0  # rows that were dropped

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[Split]:
        table = open_table(self.path, self.form, self.labelled)
        for chunk in read_chunks(table, CHUNK_ROWS, self.labelled):
            if len(chunk):
                yield chunk.number_labels(self.names)
        check_unchanged(self.path, self.sha256)


@dataclass(frozen=True)
class Data:
    """The files that the tasks of a run need."""

    names: list[str]  # the labels, in the order of their numbers
    train: Split | None
    eval: Split | None
    test: TestFile | None
    training_keys: frozenset[str] | None  # of the training texts; None without a training file
    prefixes: RowPrefixes | None = None

    @cached_property
    def seen_share(self) -> float:
        """The share of validation rows with a training text.

        Without a validation file: the share of training rows that repeat the text of another row.
        """
        if self.eval is None:
            return 1 - len(self.training_keys) / len(self.train)
        return float(seen_texts(self.training_keys, self.eval.keys).mean())

    def seen(self, name: str, keys: list[str]) -> np.ndarray | None:
        """Whether each text, given by its key, was seen: bool [N]; None without a training file.

        name: the file of the texts. A text of "eval" was seen if it is in the training file; one of
        "test" also if it is in the validation file, which chooses epoch, calibration and weights.
        """
        if self.training_keys is None:
            return None
        return seen_texts(self.all_keys if name == "test" else self.training_keys, keys)

    @cached_property
    def all_keys(self) -> frozenset[str]:
        """The keys of the training and validation texts."""
        return self.training_keys.union(self.eval.keys if self.eval else ())

    def describe(self) -> dict[str, dict]:
        """Return path, number of rows and checksum of each file, for run.json."""
        return {name: described(file) for name, file in self.files().items()}

    def count_rows(self) -> dict[str, int]:
        """Count the rows of each file, as `train_rows` and so on."""
        return {f"{name}_rows": len(file) for name, file in self.files().items()}

    def to_predict(self) -> Iterator[Split]:
        """Yield the validation file and the test file's chunks, in the order of `score`."""
        if self.eval is not None:
            yield self.eval
        if self.test is not None:
            yield from self.test

    def files(self) -> dict[str, Split | TestFile]:
        """Return the files of this run by their names: train, eval, test."""
        files = {"train": self.train, "eval": self.eval, "test": self.test}
        return {name: file for name, file in files.items() if file is not None}


def described(file: "Split | TestFile") -> dict:
    """Return a file's entry for run.json."""
    malformed = {"malformed": file.malformed} if file.malformed else {}
    return {"path": file.path, "rows": len(file), "sha256": file.sha256} | malformed


def read_splits(paths: dict[str, str], form: FileFormat) -> dict[str, Split]:
    """Read the training and validation files, whose `paths` are under "train" and "eval"."""
    return {name: read_split(path, form) for name, path in paths.items()}


def prepare(
    form: FileFormat,
    splits: dict[str, Split],
    names: list[str],
    test_file: str | None = None,
    prefixes: RowPrefixes | None = None,
    max_train_samples: int | None = None,
    seed: int = 0,
) -> Data:
    """Number the labels of all files, check the test file, and log leaks.

    names: all labels. seed: of the choice of `max_train_samples` rows.
    Raises: UserError for an unknown label, and for an unusable test file.
    """
    train, validation, keys = splits.get("train"), splits.get("eval"), None
    known: dict[str, frozenset[str]] = {}  # the keys of each file, without those of earlier ones
    if train is not None:
        train = train.sample(max_train_samples, seed).number_labels(names)
        keys = known["training file"] = audit(train, names, form)
    if validation is not None:
        validation = validation.number_labels(names)
        if keys is not None:
            seen = {"training file": seen_texts(keys, validation.keys).sum()}
            log_seen(f"{validation.path}{validation.read_as}", len(validation), seen)
            known["validation file alone"] = frozenset(validation.keys) - keys
    test = open_test_file(test_file, form, names, known, prefixes) if test_file else None
    return Data(names, train, validation, test, keys, prefixes)


def open_test_file(
    path: str,
    form: FileFormat,
    names: list[str],
    known: dict[str, frozenset[str]] | None = None,
    prefixes: RowPrefixes | None = None,
) -> TestFile:
    """Check the whole test file, chunk by chunk, and log leaks; it may have no labels.

    known: the keys of the texts of other files, by the names of the files.
    Raises: UserError for a bad file, also if only some of its rows have labels.
    """
    rows, dropped, text, seen = 0, 0, "", dict.fromkeys(known or {}, 0)
    first: dict[bool, int] = {}  # the first row of a chunk with labels (True), and without
    table = open_table(path, form, needs_labels=False)
    for chunk in read_chunks(table, CHUNK_ROWS, needs_labels=False):
        rows, dropped = rows + len(chunk), dropped + chunk.dropped
        if len(chunk):
            text = text or chunk.texts[0]
            first.setdefault(chunk.labels is not None, chunk.rows[0])
        if prefixes is None:
            chunk.number_labels(names)
        else:
            prefixes.check_labels(chunk)
        for file in seen:
            seen[file] += seen_texts(known[file], chunk.keys).sum()
    log_remarks(table, dropped, rows)
    if len(first) > 1 and not form.multi_label:  # multi-label: a blank is valid
        raise UserError(
            f"{path}: no '{','.join(form.label_column_name)}' from row {first[False]} on, but "
            "other rows have one: fill it in, or leave it blank in all rows"
        )
    labelled = True in first
    if seen:
        log_seen(f"{path}{table.read_as()}", rows, seen)
    else:
        used = form if labelled else replace(form, label_column_name=())
        logger.info(used.describe(path, f"{rows:,} rows", text, table.read_as()))
    return TestFile(path, table.sha256, rows, table.header, labelled, names, form, table.malformed)


def label_names(train: Split, order: dict[str, str] | None = None) -> list[str]:
    """Return the C labels of the training file, see `sort_labels`.

    Raises: UserError if there are fewer than two, see also `sort_labels`.
    """
    names = sort_labels((name for row in train.labels for name in row), order, train.multi_label)
    if len(names) < 2:
        shown = name_list(map(repr, names))
        raise UserError(f"{train.path} has only one label ({shown}): there is nothing to learn")
    return names


def seen_texts(known: frozenset[str], keys: list[str]) -> np.ndarray:
    """Whether each key is among the known ones: bool [N]."""
    return np.array([key in known for key in keys], dtype=bool)


def log_seen(file: str, rows: int, seen: dict[str, int]) -> None:
    """Log what share of a file's rows has a text from each other file."""
    parts = (f"{100 * n / rows:.1f} % of them with a text from the {f}" for f, n in seen.items())
    logger.info("%s: %d rows, %s", file, rows, ", ".join(parts))


def audit(train: Split, names: list[str], form: FileFormat) -> frozenset[str]:
    """Log what the training file has, and what makes results less reliable; drop nothing.

    names: the labels, in the order of their numbers. Returns the keys of the training texts.
    """
    keys = frozenset(train.keys)
    counts = {name: count for name, count in train.count_labels(names).items() if count}
    rows = f"{len(train):,} rows, {len(keys):,} distinct texts"
    logger.info(form.describe(train.path, rows, train.texts[0], train.read_as))
    logger.info("labels: %s", label_counts(counts, sum(not labels for labels in train.labels)))
    for remark in label_remarks(counts, form):
        logger.warning("warning: %s: %s", train.path, remark)
    pairs = {(key, ids.tobytes()) for key, ids in zip(train.keys, train.label_ids, strict=True)}
    if count := sum(count > 1 for count in Counter(key for key, _ in pairs).values()):
        logger.warning("warning: %s: %d texts occur with more than one label", train.path, count)
    return keys
