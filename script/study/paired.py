"""Test whether one method is better than another on the same rows, from finished runs.

    .venv/bin/python -m script.study.paired ONE... --against OTHER...

ONE and OTHER are folders of finished runs. The n-th ONE is compared with the n-th OTHER, for
instance two methods on the same folds; their test files must have the same labels row by row. The
texts may differ, for instance if one method was tuned on cleaned titles. The 95 %
interval is over texts and, if several ONEs or OTHERs have the same test file, seeds; p ignores
seeds.
"""

import pandas as pd

from runtime.files import UserError
from runtime.flags import Parser
from script.study.significance import paired_test, read_predictions


def compare(ones: list[str], others: list[str]) -> str:
    """Return a line with both accuracies over distinct texts, their difference, its 95 % interval
    and its p-value.

    Raises: UserError if a folder has no finished run, or two runs predicted different rows.
    """
    tables = []
    for one, other in zip(ones, others, strict=True):
        left, right = read_predictions(one), read_predictions(other)
        if left["labels"].tolist() != right["labels"].tolist():
            raise UserError(f"{one} and {other} did not predict the same rows: pair other runs")
        tables.append((left, right.assign(text=left["text"])))
    lefts, rights = (pd.concat(column) for column in zip(*tables, strict=True))
    test = paired_test(rights, lefts)
    if test is None:
        raise UserError("the runs share fewer than two distinct texts: use larger test files")
    return (
        f"{100 * test.other:.2f} % against {100 * test.one:.2f} %: {100 * test.difference:+.2f} "
        f"points ({100 * test.low:+.2f} to {100 * test.high:+.2f}), p = {test.p:.4f} "
        f"({test.texts:,} distinct texts, {len(lefts):,} rows, {len(ones)} pairs of runs)"
    )


def main() -> None:
    parser = Parser("python -m script.study.paired", __doc__)
    parser.add_argument("one", nargs="+")
    parser.add_argument("--against", nargs="+", required=True, metavar="OTHER")
    args = parser.parse_args()
    if len(args.one) != len(args.against):
        parser.error(f"{len(args.one)} folders against {len(args.against)}: pass equal numbers")
    try:
        print(compare(args.one, args.against))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
