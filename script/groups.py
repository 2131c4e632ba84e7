"""Split rows into files, equal texts together: groups of rows, their parts, leaks, writing.

`script/split.py` and the notebook's protocols (`script/youtube.py`) use these functions.
"""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from runtime.csv_reader import text_key
from runtime.files import (
    UserError,
    name_list,
    read_json,
    sha256,
    to_json,
    write_text,
    writing,
)

SAMPLE_FILE = "csv/USvideos_sample.csv"
JOINS_LABELS = "\x1f"  # several labels of a row; ASCII's unit separator
FEW_ROWS = 10  # training rows of a label; with fewer a warning is printed


def connected(*keys: pd.Series) -> np.ndarray:
    """Number the groups [N] of rows that share a value of any key, directly or indirectly.

    keys: each N values; blank ones join no rows.
    """
    # a graph: rows and values are its nodes; an edge joins each row to its value of each key
    rows = size = len(keys[0])
    edges = []
    for key in keys:
        words = key.astype(str).str.strip()
        codes, values = pd.factorize(words.mask(words == ""))  # -1: blank
        filled = np.flatnonzero(codes >= 0)
        edges.append(np.stack([filled, size + codes[filled]]))
        size += len(values)
    start, end = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(start)), (start, end)), shape=(size, size))
    return connected_components(graph, directed=False)[1][:rows]


def most_frequent(values: np.ndarray | pd.Series, groups: np.ndarray | pd.Series) -> pd.Series:
    """Return the most frequent value in each group, the smallest if several are; index: groups."""
    table = pd.DataFrame({"group": np.asarray(groups), "value": np.asarray(values)})
    counts = table.groupby(["group", "value"]).size().rename("rows").reset_index()
    counts = counts.sort_values("rows", ascending=False, kind="stable").drop_duplicates("group")
    return counts.set_index("group")["value"].sort_index()


def cut_groups(
    groups: np.ndarray | pd.Series,
    strata: np.ndarray | pd.Series,
    shares: list[float],
    seed: int,
    order: pd.Series | None = None,
) -> np.ndarray:
    """Cut N rows into P parts, with whole groups and, stratum by stratum, the given shares of rows.

    groups, strata: each row's [N]. A group belongs to the most frequent stratum of its rows. The
    groups of a stratum are shuffled and lined up; each belongs to the part in which the midpoint of
    its rows lies. If there are P groups or more, each part has at least one.
    Equal shares (folds) take turns from stratum to stratum, so many small strata fill all parts.
    shares: [P], with the sum 1. order: each row's time [N]; all groups are then one stratum, sorted
    by their first time.

    Returns each row's part [N], counted from 0.
    """
    names, groups = np.unique(groups, return_inverse=True)
    sizes = np.bincount(groups)
    if order is None:
        stratum = pd.factorize(most_frequent(strata, groups), sort=True)[0]
        rank = np.random.default_rng(seed).permutation(len(names))
    else:
        stratum = np.zeros(len(names), dtype=int)
        rank = pd.Series(np.asarray(order)).groupby(groups).min().rank(method="first")
    line = np.lexsort((rank, stratum))
    part, parts, before = np.empty(len(names), dtype=int), len(shares), 0
    for members in np.split(line, np.flatnonzero(np.diff(stratum[line])) + 1):
        end = np.cumsum(sizes[members])
        cuts = np.searchsorted(end - sizes[members] / 2, np.cumsum(shares)[:-1] * end[-1])
        if len(members) >= parts:
            least = np.arange(1, parts)  # cuts at which each part has exactly one group
            cuts = np.maximum.accumulate(cuts - least).clip(0, len(members) - parts) + least
        part[members] = np.searchsorted(cuts, np.arange(len(members)), side="right")
        if len(set(shares)) == 1:
            part[members] = (part[members] + before) % parts
        before += len(members)
    return part[groups]


def each_label(labels: pd.Series) -> pd.Series:
    """Return every label of every row; the index repeats for rows with several labels."""
    names = labels.str.split(JOINS_LABELS).explode()
    return names[names != ""]


def keep_training_labels(
    splits: dict[str, pd.DataFrame],
) -> dict[str, pd.DataFrame]:
    """Drop rows with a label that does not occur in training, with a warning.

    Raises: UserError if a split has no row left, or if fewer than two labels are left.
    """
    known, kept = set(each_label(splits["train"]["label"])), {}
    for name, split in splits.items():
        labels = each_label(split["label"])
        labels = labels[~labels.isin(known)]
        kept[name] = split[~split.index.isin(labels.index)]
        if count := len(split) - len(kept[name]):
            shown = name_list(sorted(set(labels)))
            print(f"warning: {name}: dropped {count} rows with labels not in training: {shown}")
        if kept[name].empty:
            raise UserError(
                f"too few rows for these shares and labels: none is left for {name}; add rows, or "
                "choose other shares or fewer folds"
            )
    if len(known) < 2:
        raise UserError(f"too few labels: {', '.join(known)} is the only one in the training file")
    return kept


def describe(splits: dict[str, pd.DataFrame]) -> dict[str, dict]:
    """Count rows, distinct texts and labels, and measure how much the training file gives away.

    `share_in_train` is the share of rows with a seen text. `lookup_accuracy` is the accuracy of a
    dictionary that predicts the training file's (most frequent) label of a seen text, otherwise
    the most frequent label of training and validation file (training may be balanced).
    """
    train, figures = splits["train"], {}
    label_of = most_frequent(train["label"], train["text"].map(text_key))
    common = pd.concat([train["label"], splits["val"]["label"]]).mode()[0]
    for name, split in splits.items():
        keys = split["text"].map(text_key)
        found = keys.map(label_of)
        labels = each_label(split["label"])
        figures[name] = {
            "rows": len(split),
            "distinct_texts": keys.nunique(),
            "share_in_train": round(float(found.notna().mean()), 6),
            "lookup_accuracy": round(float((found.fillna(common) == split["label"]).mean()), 6),
            "labels": labels.value_counts().sort_index().to_dict(),
        }
    return figures


def format_figures(figures: dict[str, dict[str, dict]]) -> str:
    """Format the figures of `describe` as a table; figures: title of a block to its figures."""
    table = pd.concat(
        {title: pd.DataFrame(one).T.drop(columns="labels") for title, one in figures.items()}
    )
    percent = "{:.1%}".format
    return table.to_string(formatters={"share_in_train": percent, "lookup_accuracy": percent})


def write_splits(folders: dict[Path, tuple[dict[str, pd.DataFrame], dict]]) -> None:
    """Write each folder's `{train,val,test}_simple.csv` and split.json, each file atomically.

    folders: the tables by name, and the record: split.json contains it and the checksums of the
    CSV files. Equal content gives equal bytes.

    Raises: UserError, before anything is written, if a file was not written by this function; also
        if a folder cannot be written.
    """
    files: dict[Path, str] = {}
    for folder, (tables, record) in folders.items():
        split_file, checksums = folder / "split.json", {}
        written = read_json(split_file).get("files") if split_file.exists() else {}
        foreign = [] if isinstance(written, dict) else [split_file]
        for name, table in tables.items():
            text = table.to_csv(index=False, lineterminator="\n")
            if "\r" in text:  # which Python 3.11 leaves unquoted
                text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_ALL)
            path = folder / f"{name}_simple.csv"
            files[path] = text
            checksums[path.name] = new = hashlib.sha256(text.encode()).hexdigest()
            # the new content is there if an earlier call was killed
            if not foreign and path.exists() and sha256(path) not in (new, written.get(path.name)):
                foreign.append(path)
        if foreign:
            problem = f"{foreign[0]} was not written by split.sh or preprocess.sh"
            raise UserError(f"{problem}: move it or choose another output_dir")
        files[split_file] = to_json({**record, "files": checksums})
    for path, text in files.items():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
