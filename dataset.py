"""CSV files in; checked rows, labels, tokens, batches of like length and the leak audit out.

Nothing here knows of models. N rows, U distinct texts, C classes, B rows of a batch, T tokens.
"""

import logging
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from runtime.batches import Encoded
from runtime.csv_reader import DataError, file_sha256, read_tables, row_list

logger = logging.getLogger(__name__)

LABEL_SEPARATOR = "|"
CHUNK_ROWS = 20_000  # of a file to predict that are in memory at a time


@dataclass(frozen=True)
class Split:
    """A checked CSV file."""

    path: str
    sha256: str
    table: pd.DataFrame  # every column as text, N rows
    texts: list[str]
    labels: list[list[str]] | None  # one or more names a row; None: the file has no labels
    rows: list[int]  # each row's number in the file, from 1
    dropped: int = 0  # rows without a text

    def __len__(self) -> int:
        return len(self.texts)

    def describe(self) -> dict:
        """What a run writes down of it."""
        return {"path": self.path, "rows": len(self), "sha256": self.sha256}

    def sample(self, count: int, seed: int) -> "Split":
        """`count` rows drawn at random, in the file's order; all where there are no more."""
        if count >= len(self):
            return self
        return self.take(np.random.default_rng(seed).choice(len(self), count, replace=False))

    def take(self, chosen: np.ndarray) -> "Split":
        """The rows of these numbers, from 0, in the file's order."""
        chosen = np.sort(chosen)
        texts, labels, rows = (
            [values[i] for i in chosen] for values in (self.texts, self.labels, self.rows)
        )
        return replace(self, table=self.table.iloc[chosen], texts=texts, labels=labels, rows=rows)


# ---------------------------------------------------------------------------------- CSV files


def read_chunks(
    path: str | Path,
    *,
    size: int | None,
    text_columns: list[str],
    label_column: str = "label",
    delimiter: str = " ",
    encoding: str = "utf-8",
    multi_label: bool = False,
    drop_empty: bool = False,
    labels_required: bool = True,
) -> Iterator[Split]:
    """Read and check a split file, `size` rows at a time, or at once.

    Several text columns are joined by `delimiter`. With `labels_required=False` the label column
    may be missing or all blank.

    Raises: DataError, with the file, the rows and the way out.
    """
    wanted = [*text_columns, label_column] if labels_required else text_columns
    hint = ": see --text_column_names and --label_column_name"
    sha256 = None
    for table in read_tables(path, encoding, wanted, size=size, hint=hint):
        sha256 = sha256 or file_sha256(path)
        fields = list(zip(*(table[name] for name in text_columns), strict=True))
        kept = np.array([bool("".join(row).strip()) for row in fields])
        if not kept.all() and not drop_empty:
            raise DataError(
                f"{path}: the text is blank in {row_list(table.index[~kept].tolist())}; "
                "fill it in, or drop such rows with --drop_empty"
            )
        texts = [delimiter.join(row) for row, keep in zip(fields, kept, strict=True) if keep]
        rows = table.index[kept].tolist()
        table = table[kept].reset_index(drop=True)
        labels = read_labels(path, table, rows, label_column, multi_label, labels_required)
        yield Split(str(path), sha256, table, texts, labels, rows, dropped=int((~kept).sum()))


def read_split(path: str | Path, **options) -> Split:
    """Read and check one whole split file, see `read_chunks`."""
    split = next(read_chunks(path, size=None, **options))
    report_dropped(split.path, split.dropped, len(split))
    return split


def report_dropped(path: str, dropped: int, left: int) -> None:
    """Warn of rows without a text. Raises: DataError where no row has one."""
    if dropped:
        logger.warning("warning: %s: dropped %d rows without a text", path, dropped)
    if not left:
        raise DataError(f"{path}: every text is blank")


def reading(args: Namespace) -> dict:
    """How the arguments say that files are read: options of `read_chunks`."""
    return {
        "text_columns": args.text_column_names,
        "label_column": args.label_column_name,
        "delimiter": args.text_column_delimiter,
        "encoding": args.csv_encoding,
        "multi_label": args.problem_type == "multi_label_classification",
        "drop_empty": args.drop_empty,
    }


def read_splits(args: Namespace) -> dict[str, Split]:
    """The files that training and evaluation need, as `train` and `eval`."""
    wanted = {
        "train": args.do_train and args.train_file,
        "eval": args.do_eval and args.validation_file,
    }
    return {name: read_split(path, **reading(args)) for name, path in wanted.items() if path}


@dataclass(frozen=True)
class Stream:
    """A file to predict, of any size: checked as a whole, then read a chunk at a time."""

    path: str
    sha256: str
    rows: int
    columns: list[str]
    labelled: bool
    options: dict

    def __len__(self) -> int:
        return self.rows

    def describe(self) -> dict:
        """What a run writes down of it."""
        return {"path": self.path, "rows": self.rows, "sha256": self.sha256}

    def __iter__(self) -> Iterator[Split]:
        return iter(
            chunk
            for chunk in read_chunks(
                self.path, size=CHUNK_ROWS, labels_required=self.labelled, **self.options
            )
            if len(chunk)
        )


def open_stream(
    args: Namespace, names: list[str], known: set[str] | None, served: list[list[str]] = ()
) -> Stream:
    """Check the whole test file, a chunk at a time; its labels may be missing.

    names: the labels that it may hold. known: `text_keys` of the training file, to log how much
    of it is seen. served: the labels of each of `--prefix_paths`, for the rows that name it.
    Raises: DataError, also where a part of the rows has labels.
    """
    rows, dropped, seen = 0, 0, 0
    multi_label = args.problem_type == "multi_label_classification"
    labelled: dict[bool, list[int]] = {True: [], False: []}
    chunks = read_chunks(args.test_file, size=CHUNK_ROWS, labels_required=False, **reading(args))
    for chunk in chunks:
        rows, dropped = rows + len(chunk), dropped + chunk.dropped
        if len(chunk):
            labelled[chunk.labels is not None] += chunk.rows[:1]
        numbers = numbers_of(chunk, args.prefix_column, args.prefix_paths) if served else None
        if chunk.labels is not None:
            parts = [(chunk, names)]  # rows, and the labels that they may have
            if served:
                chosen = [np.flatnonzero(numbers == number) for number in range(len(served))]
                parts = zip(map(chunk.take, chosen), served, strict=True)
            for part, its in parts:
                label_ids(part, its, multi_label)
        if known is not None:
            seen += seen_texts(known, text_keys(chunk)).sum()
    report_dropped(args.test_file, dropped, rows)
    if labelled[True] and labelled[False] and not multi_label:  # there a blank is no label
        raise DataError(
            f"{args.test_file}: no '{args.label_column_name}' from row {labelled[False][0]} on, "
            "while others have one"
        )
    if known is not None:
        log_seen(args.test_file, rows, seen)
    return Stream(
        args.test_file, chunk.sha256, rows, list(chunk.table), bool(labelled[True]), reading(args)
    )


# ------------------------------------------------------------------------------------- labels


def canonical_label(text: str) -> str:
    """One spelling of a label: `1`, ` 1` and `1.0` (pandas writes it so) are the same."""
    text = text.strip()
    return re.sub(r"^([+-]?\d+)\.0*$", r"\1", text)


def read_labels(
    path: str | Path,
    table: pd.DataFrame,
    rows: list[int],
    column: str,
    multi_label: bool,
    required: bool,
) -> list[list[str]] | None:
    """The labels of each row; None where they are not required and not there.

    Raises: DataError for a row without a label (with several labels a row, a blank cell means
        that none applies).
    """
    if column not in table or (not required and not table[column].str.strip().any()):
        return None
    if multi_label:
        cells = (cell.split(LABEL_SEPARATOR) if cell.strip() else [] for cell in table[column])
        labels = [list(dict.fromkeys(canonical_label(part) for part in cell)) for cell in cells]
    else:
        labels = [[canonical_label(cell)] for cell in table[column]]
    missing = [row for row, names in zip(rows, labels, strict=True) if "" in names]
    if missing:
        raise DataError(
            f"{path}: no '{column}' in {row_list(missing)}; fill it in, leave such rows out, or, "
            "where a row may have several or none, give --problem_type multi_label_classification"
        )
    return labels


def label_names(train: Split) -> list[str]:
    """The C labels of the training file, sorted: numbers as numbers, before words.

    Raises: DataError where there are fewer than two.
    """

    def key(name: str) -> tuple:
        number = re.fullmatch(r"[+-]?\d+(\.\d+)?", name)
        return (0, float(name), name) if number else (1, 0.0, name)

    names = sorted({name for row in train.labels for name in row}, key=key)
    if len(names) < 2:
        raise DataError(f"{train.path} has one label only ({names}): there is nothing to learn")
    return names


def words_to_start_from(names: list[str], train: Split, seed: int) -> str:
    """What a prefix starts from: the label names; where these are numbers, training texts.

    Numbers are no words of the language; 64 texts drawn at random are more than a prefix takes.
    """
    if any(letter.isalpha() for name in names for letter in name):
        return " ".join(names)
    drawn = np.random.default_rng(seed).permutation(len(train))[:64]
    return " ".join(train.texts[row] for row in drawn)


def label_ids(split: Split, names: list[str], multi_label: bool) -> np.ndarray:
    """Labels as numbers: int64 [N], or for several labels a row float32 [N, C] of 0 and 1.

    Raises: DataError naming the labels, and their rows, that the training file lacks.
    """
    index = {name: number for number, name in enumerate(names)}
    unknown = [
        (row, name)
        for row, labels in zip(split.rows, split.labels, strict=True)
        for name in labels
        if name not in index
    ]
    if unknown:
        strange = sorted({name for _, name in unknown})
        raise DataError(
            f"{split.path}: label {', '.join(map(repr, strange[:10]))} in "
            f"{row_list(sorted({row for row, _ in unknown}))} is none of the training "
            f"file's: {', '.join(map(repr, names))}; correct or leave out such rows"
        )
    if not multi_label:
        return np.array([index[labels[0]] for labels in split.labels], dtype=np.int64)
    hot = np.zeros((len(split), len(names)), dtype=np.float32)
    for row, labels in enumerate(split.labels):
        hot[row, [index[name] for name in labels]] = 1
    return hot


# ---------------------------------------------------------------------------------- leak audit


def text_key(text: str) -> str:
    """What makes two texts the same for the audit: letters' case and white space do not count."""
    return " ".join(text.split()).casefold()


def text_keys(split: Split) -> list[str]:
    """Of each row's text."""
    return [text_key(text) for text in split.texts]


def seen_texts(known: set[str], keys: list[str]) -> np.ndarray:
    """Whether each row's key is among the training file's, both `text_keys`: bool [N]."""
    return np.array([key in known for key in keys], dtype=bool)


def log_seen(path: str, rows: int, seen: int) -> None:
    """Say how much of a file a model has seen in training."""
    logger.info(
        "%s: %d rows, of which %.1f %% have a text that stands in the training file",
        path, rows, 100 * seen / rows,
    )  # fmt: skip


def audit(train: Split) -> set[str]:
    """Log what in the training file weakens the numbers to come; nothing is dropped.

    Returns its `text_keys`.
    """
    known = set(text_keys(train))
    logger.info("%s: %d rows, %d distinct texts", train.path, len(train), len(known))
    counts = Counter(name for names in train.labels for name in names)
    single = [name for name, count in counts.items() if count == 1]
    if joined := [name for name in counts if LABEL_SEPARATOR in name]:
        logger.warning(
            "warning: %s: '%s' is one label; if it is several, give --problem_type "
            "multi_label_classification", train.path, joined[0],
        )  # fmt: skip
    if single:
        logger.warning("warning: %s: only one row of label %s", train.path, ", ".join(single))
    if doubtful := contradictions(train):
        logger.warning(
            "warning: %s: %d texts stand under more than one label", train.path, doubtful
        )
    return known


def contradictions(split: Split) -> int:
    """How many distinct texts carry more than one set of labels."""
    labels: dict[str, set] = {}
    for text, names in zip(split.texts, split.labels, strict=True):
        labels.setdefault(text_key(text), set()).add(tuple(sorted(names)))
    return sum(len(found) > 1 for found in labels.values())


# ---------------------------------------------------------------------------- tokens, batches


def numbers_of(split: Split, column: str, paths: list[str]) -> np.ndarray:
    """Which of the tuned folders `paths` each row names in a column: int64 [N].

    A row may give a path as it stands on the command line, or the folder's own name.
    Raises: DataError where the column is missing, or names another or an ambiguous folder.
    """
    if column not in split.table:
        raise DataError(f"{split.path} has no column '{column}' (--prefix_column)")
    known: dict[str, set[int]] = {}
    for number, path in enumerate(paths):
        for name in {path, path.rstrip("/"), Path(path).name}:
            known.setdefault(name, set()).add(number)
    found = [known.get(cell.strip(), set()) for cell in split.table[column]]
    if strange := [
        row for row, numbers in zip(split.rows, found, strict=True) if len(numbers) != 1
    ]:
        raise DataError(
            f"{split.path}: '{column}' in {row_list(strange)} names none, or more than one, of "
            f"--prefix_paths {' '.join(paths)}"
        )
    return np.array([min(numbers) for numbers in found], dtype=np.int64)


def encode(
    tokenizer,
    split: Split,
    labels: np.ndarray | None,
    max_length: int,
    served_by: np.ndarray | None = None,
) -> Encoded:
    """Tokenize each distinct text of a split once, cut to `max_length` tokens.

    served_by: of each row, int64 [N], see `numbers_of`; a text counts once for each model.
    """
    keys = pd.Series(split.texts, dtype=object)
    if served_by is not None:
        keys = pd.Series(list(zip(split.texts, served_by.tolist(), strict=True)), dtype=object)
    text_of_row, distinct = pd.factorize(keys)
    if served_by is not None:
        distinct, served_by = zip(*distinct, strict=True)
    tokens = tokenizer(
        list(distinct),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    cut = np.array([bool(encoding.overflowing) for encoding in tokens.encodings])[text_of_row]
    if cut.any():
        logger.warning(
            "%s: %d of %d texts are longer than %d tokens and were cut (--max_seq_length)",
            split.path, cut.sum(), len(split), max_length,
        )  # fmt: skip
    return Encoded(
        token_ids=tokens["input_ids"],
        text_of_row=text_of_row,
        labels=labels,
        rows=split.rows,
        pad_token_id=tokenizer.pad_token_id,
        served_by=None if served_by is None else np.array(served_by),
    )
