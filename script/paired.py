"""Is one way of tuning better than another on the same rows? A paired test of finished runs.

    .venv/bin/python -m script.paired ONE... --against OTHER...

Folders of finished runs; the n-th one is compared with the n-th other, such as two methods on the
same folds. Row by row both have predicted the same labels; their texts may differ, as where one
was tuned on cleaned titles.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import permutation_test

from dataset import LABEL_SEPARATOR, read_split, reading, text_keys
from runtime.csv_reader import DataError
from runtime.record import RUN_FILE, OutputError, read_record

RESAMPLES = 9999


def predicted(folder: str | Path) -> pd.DataFrame:
    """Of each row of a run's test file: key of its text, its labels, what was predicted as they
    are written, and whether it is right.

    Raises: OutputError for a folder without a run, DataError for one without labelled predictions.
    """
    path = Path(folder) / "predictions.csv"
    settings = read_record(Path(folder) / RUN_FILE).get("settings")
    if not settings:
        raise OutputError(f"{folder} holds no finished run")
    options = reading(argparse.Namespace(**settings)) | {"encoding": "utf-8"}
    split = read_split(path, **options)
    labels = [frozenset(names) for names in split.labels]
    answers = split.table["predicted"]
    found = [
        set(filter(None, answer.split(LABEL_SEPARATOR))) if options["multi_label"] else {answer}
        for answer in answers
    ]
    right = [names == answer for names, answer in zip(labels, found, strict=True)]
    return pd.DataFrame(
        {"text": text_keys(split), "labels": labels, "answer": answers, "right": right}
    )


def exchange_test(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean of `other - one`, each [N], and its two-sided p-value, 0.0002 at the least.

    A permutation test: were both alike, the two values of each of the N could as well be exchanged.
    """
    test = permutation_test(
        (one, other), lambda a, b, axis: np.mean(b - a, axis=axis), vectorized=True,
        permutation_type="samples", n_resamples=RESAMPLES, batch=200, rng=0,
    )  # fmt: skip
    return float(test.statistic), float(test.pvalue)


def compare(ones: list[str | Path], others: list[str | Path]) -> str:
    """A line: accuracies over rows, difference and its spread over the pairs of runs, p-value.

    The p-value is over distinct texts of `ones`, each with its share of right rows: it knows
    nothing of what other seeds would give.

    Raises: OutputError, DataError for runs that are none, or not of the same rows.
    """
    pairs = []
    for one, other in zip(ones, others, strict=True):
        left, right = predicted(one), predicted(other)
        if left["labels"].tolist() != right["labels"].tolist():
            raise DataError(f"{one} and {other} have not predicted the same rows")
        pairs.append(left.assign(other=right["right"]))
    rows = pd.concat(pairs)
    shares = rows.groupby("text")[["other", "right"]].mean()
    _, p = exchange_test(shares["other"].to_numpy(), shares["right"].to_numpy())
    means = np.array([100 * pair[["right", "other"]].mean() for pair in pairs])
    points = means[:, 0] - means[:, 1]
    spread = f" ± {points.std(ddof=1):.2f}" if len(points) > 1 else ""
    return (
        f"{means[:, 0].mean():.2f} % against {means[:, 1].mean():.2f} %: {points.mean():+.2f}"
        f"{spread} points, p = {p:.4f} (pairs of runs: {len(pairs)}, {len(rows):,} rows, "
        f"{len(shares):,} distinct texts)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("one", nargs="+")
    parser.add_argument("--against", nargs="+", required=True, metavar="OTHER")
    args = parser.parse_args()
    if len(args.one) != len(args.against):
        parser.error(f"{len(args.one)} folders against {len(args.against)}: give as many")
    try:
        print(compare(args.one, args.against))
    except (DataError, OutputError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
