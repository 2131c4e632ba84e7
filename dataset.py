"""Read CSV files into checked rows and labels, and audit them for leaks.

Independent of any model. N rows, C classes.
"""

import hashlib
import logging
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from arguments import LABEL_SEPARATOR
from runtime.batches import prefix_index
from runtime.columns import label_numbers, sort_labels
from runtime.csv_reader import read_labels, read_tables, row_list, text_key
from runtime.files import UserError

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

    def describe(self) -> dict:
        """Return the entry for run.json."""
        return {"path": self.path, "rows": len(self), "sha256": self.sha256}

    def sample(self, count: int | None, seed: int) -> "Split":
        """Draw `count` rows at random, in file order; all rows if `count` is None or too large."""
        if count is None or count >= len(self):
            return self
        return self.take(np.random.default_rng(seed).choice(len(self), count, replace=False))

    def take(self, chosen: np.ndarray) -> "Split":
        """Return the rows at these positions (from 0), in file order and without label ids."""
        chosen = np.sort(chosen)
        texts, labels, rows = (
            [values[i] for i in chosen] for values in (self.texts, self.labels, self.rows)
        )
        table = self.table.iloc[chosen]
        return replace(self, table=table, texts=texts, labels=labels, rows=rows, label_ids=None)

    def number_labels(self, names: list[str]) -> "Split":
        """Return the same rows with `label_ids` set, in the order of `names`, if they have labels.

        Raises: UserError naming the labels that are not in `names`, and their rows.
        """
        if self.labels is None:
            return self
        index = label_numbers(names)
        unknown = [
            (row, name)
            for row, labels in zip(self.rows, self.labels, strict=True)
            for name in labels
            if name not in index
        ]
        if unknown:
            strange = sorted({name for _, name in unknown})
            raise UserError(
                f"{self.path}: label {', '.join(map(repr, strange[:10]))} in "
                f"{row_list(sorted({row for row, _ in unknown}))} does not occur in the training "
                f"file, which has {', '.join(map(repr, names))}; correct or remove such rows"
            )
        if not self.multi_label:
            ids = np.array([index[labels[0]] for labels in self.labels], dtype=np.int64)
            return replace(self, label_ids=ids)
        one_hot = np.zeros((len(self), len(names)), dtype=np.float32)
        for row, labels in enumerate(self.labels):
            one_hot[row, [index[name] for name in labels]] = 1
        return replace(self, label_ids=one_hot)


def read_chunks(
    path: str | Path,
    *,
    size: int | None,
    text_columns: list[str],
    label_column: str | None = "label",
    delimiter: str = " ",
    encoding: str = "utf-8",
    multi_label: bool = False,
    drop_empty: bool = False,
    label_names: dict[str, str] | None = None,
    labels_required: bool = True,
    digest=None,
) -> Iterator[Split]:
    """Read and check a CSV file, `size` rows at a time or all at once.

    Several text columns are joined by `delimiter`. With `labels_required=False` the label column
    may be missing or all blank; without `label_column` labels are not read. At the end, `digest`
    (of hashlib) is that of the file.

    Raises: UserError that names the file, the rows and what to do.
    """
    wanted = [*text_columns, label_column] if labels_required else text_columns
    hint = ": see --text_column_names" + " and --label_column_name" * labels_required
    for table in read_tables(path, encoding, wanted, size=size, hint=hint, digest=digest):
        fields = list(zip(*(table[name] for name in text_columns), strict=True))
        kept = np.array([bool("".join(row).strip()) for row in fields])
        if not kept.all() and not drop_empty:
            raise UserError(
                f"{path}: the text is blank in {row_list(table.index[~kept].tolist())}; "
                "fill it in, or drop such rows with --drop_empty"
            )
        texts = [delimiter.join(row) for row, keep in zip(fields, kept, strict=True) if keep]
        rows = table.index[kept].tolist()
        dropped = len(table) - len(rows)
        table = table[kept].reset_index(drop=True)
        labels = read_labels(path, table, rows, label_column, multi_label, labels_required)
        if labels and label_names:
            labels = [[label_names.get(one, one) for one in row] for row in labels]
        yield Split(str(path), table, texts, labels, rows, multi_label, dropped)


def read_split(path: str | Path, **options) -> Split:
    """Read and check a whole CSV file, see `read_chunks`."""
    digest = hashlib.sha256()
    split = next(read_chunks(path, size=None, digest=digest, **options))
    report_dropped(split.path, split.dropped, len(split))
    return replace(split, sha256=digest.hexdigest())


def report_dropped(path: str, dropped: int, left: int) -> None:
    """Warn about rows without a text. Raises: UserError if no row has a text."""
    if dropped:
        logger.warning("warning: %s: dropped %d rows without a text", path, dropped)
    if not left:
        raise UserError(f"{path}: every text is blank: see --text_column_names")


def reading_options(settings: dict) -> dict:
    """Return the options of `read_chunks` for a run with these settings."""
    return {
        "text_columns": settings["text_column_names"],
        "label_column": settings["label_column_name"],
        "delimiter": settings["text_column_delimiter"],
        "encoding": settings["csv_encoding"],
        "multi_label": settings["problem_type"] == "multi_label_classification",
        "drop_empty": settings["drop_empty"],
        "label_names": settings.get("label_names"),
    }


@dataclass(frozen=True)
class Stream:
    """A test file of any size: first checked as a whole, then read chunk by chunk."""

    path: str
    sha256: str
    rows: int
    columns: list[str]
    labelled: bool
    names: list[str]  # the labels, in the order of their numbers
    options: dict  # for read_chunks

    def __len__(self) -> int:
        return self.rows

    def describe(self) -> dict:
        """Return the entry for run.json."""
        return {"path": self.path, "rows": self.rows, "sha256": self.sha256}

    def __iter__(self) -> Iterator[Split]:
        digest = hashlib.sha256()
        options = {"size": CHUNK_ROWS, "labels_required": self.labelled, **self.options}
        for chunk in read_chunks(self.path, digest=digest, **options):
            if len(chunk):
                yield chunk.number_labels(self.names)
        if digest.hexdigest() != self.sha256:
            raise UserError(f"{self.path} changed while it was read: start the command again")


@dataclass(frozen=True)
class Data:
    """The files that the tasks of a run need."""

    names: list[str]  # the labels, in the order of their numbers
    train: Split | None
    eval: Split | None
    test: Stream | None
    training_keys: frozenset[str] | None  # of the training texts; None without a training file

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
        return {name: file.describe() for name, file in self.files()}

    def count_rows(self) -> dict[str, int]:
        """Count the rows of each file, as `train_rows` and so on."""
        return {f"{name}_rows": len(file) for name, file in self.files()}

    def to_predict(self) -> Iterator[Split]:
        """Yield the validation file and the chunks of the test file."""
        if self.eval is not None:
            yield self.eval
        if self.test is not None:
            yield from self.test

    def files(self) -> list[tuple[str, Split | Stream]]:
        """List the files of this run with their names: train, eval, test."""
        files = (("train", self.train), ("eval", self.eval), ("test", self.test))
        return [(name, file) for name, file in files if file is not None]


def read_splits(args: Namespace, settings: dict) -> dict[str, Split]:
    """Read the training and validation files, if needed, as `train` and `eval`."""
    wanted = [("train", args.do_train, args.train_file)]
    wanted += [("eval", args.do_eval, args.validation_file)]
    options = reading_options(settings)
    return {name: read_split(path, **options) for name, needed, path in wanted if needed}


def prepare(
    args: Namespace,
    settings: dict,
    splits: dict[str, Split],
    names: list[str],
    labels_by_prefix: list[list[str]] | None = None,
) -> Data:
    """Number the labels of all files, check the test file, and log leaks.

    names: all labels. labels_by_prefix: the labels of each folder in `--prefix_paths`.
    Raises: UserError for an unknown label, and for an unusable test file.
    """
    train, validation, test, keys = splits.get("train"), splits.get("eval"), None, None
    known: dict[str, frozenset[str]] = {}  # the keys of each file, without those of earlier ones
    if train is not None:
        train = train.sample(args.max_train_samples, args.seed).number_labels(names)
        keys = known["training file"] = audit(train)
    if validation is not None:
        validation = validation.number_labels(names)
        if keys is not None:
            share = seen_texts(keys, validation.keys).mean()
            log_seen(validation.path, len(validation), {"training file": share})
            known["validation file alone"] = frozenset(validation.keys) - keys
    if args.do_predict:
        test = open_stream(args, settings, names, known, labels_by_prefix)
    return Data(names, train, validation, test, keys)


def open_stream(
    args: Namespace,
    settings: dict,
    names: list[str],
    known: dict[str, frozenset[str]] | None = None,
    labels_by_prefix: list[list[str]] | None = None,
) -> Stream:
    """Check the whole test file, chunk by chunk, and log leaks; it may have no labels.

    known: the keys of the texts of other files, by the names of the files.
    Raises: UserError for a bad file, also if only some of its rows have labels.
    """
    path, options = args.test_file, reading_options(settings)
    rows, dropped, seen = 0, 0, dict.fromkeys(known or {}, 0)
    first: dict[bool, list[int]] = {True: [], False: []}  # first rows of chunks, labelled or not
    digest = hashlib.sha256()
    for chunk in read_chunks(
        path, size=CHUNK_ROWS, labels_required=False, digest=digest, **options
    ):
        rows, dropped = rows + len(chunk), dropped + chunk.dropped
        if len(chunk):
            first[chunk.labels is not None] += chunk.rows[:1]
        check_labels(
            chunk,
            names,
            prefix_index(chunk, args.prefix_column, args.prefix_paths),
            labels_by_prefix,
        )
        for file in seen:
            seen[file] += seen_texts(known[file], chunk.keys).sum()
    report_dropped(path, dropped, rows)
    if first[True] and first[False] and not chunk.multi_label:  # multi-label: a blank is valid
        raise UserError(
            f"{path}: no '{args.label_column_name}' from row {first[False][0]} on, but other rows "
            "have one: fill it in, or leave it blank in all rows"
        )
    if seen:
        log_seen(path, rows, {file: count / rows for file, count in seen.items()})
    return Stream(path, digest.hexdigest(), rows, chunk.columns, bool(first[True]), names, options)


def check_labels(
    chunk: Split,
    names: list[str],
    index: np.ndarray | None,
    labels_by_prefix: list[list[str]] | None,
) -> None:
    """Check labels. Raises: UserError for one not in `names`, or unknown to its row's prefix."""
    if chunk.labels is None or labels_by_prefix is None:
        chunk.number_labels(names)
        return
    for number, known in enumerate(labels_by_prefix):
        chunk.take(np.flatnonzero(index == number)).number_labels(known)


def label_names(train: Split, order: dict[str, str] | None = None) -> list[str]:
    """Return the C labels of the training file, see `sort_labels`.

    Raises: UserError if there are fewer than two.
    """
    names = sort_labels({name for row in train.labels for name in row}, order)
    if len(names) < 2:
        raise UserError(f"{train.path} has only one label ({names}): there is nothing to learn")
    return names


def seen_texts(known: frozenset[str], keys: list[str]) -> np.ndarray:
    """Whether each key is among the known ones: bool [N]."""
    return np.array([key in known for key in keys], dtype=bool)


def log_seen(path: str, rows: int, shares: dict[str, float]) -> None:
    """Log what share of a file's rows has a text from each other file."""
    parts = [f"{100 * share:.1f} % of them with a text from the {n}" for n, share in shares.items()]
    logger.info("%s: %d rows, %s", path, rows, ", ".join(parts))


def audit(train: Split) -> frozenset[str]:
    """Warn about training data that makes the results less reliable; drop nothing.

    Returns the keys of the training texts.
    """
    keys = frozenset(train.keys)
    logger.info("%s: %d rows, %d distinct texts", train.path, len(train), len(keys))
    counts = Counter(name for names in train.labels for name in names)
    if joined := [name for name in counts if LABEL_SEPARATOR in name]:
        advice = "if it is several, pass --problem_type multi_label_classification"
        logger.warning("warning: %s: '%s' is one label; %s", train.path, joined[0], advice)
    if single := [name for name, count in counts.items() if count == 1]:
        logger.warning("warning: %s: only one row of label %s", train.path, ", ".join(single))
    if doubtful := contradictions(train):
        message = "warning: %s: %d texts occur with more than one label"
        logger.warning(message, train.path, doubtful)
    return keys


def contradictions(split: Split) -> int:
    """Count the distinct texts that occur with more than one set of labels."""
    labels: dict[str, set] = {}
    for key, names in zip(split.keys, split.labels, strict=True):
        labels.setdefault(key, set()).add(tuple(sorted(names)))
    return sum(len(found) > 1 for found in labels.values())
