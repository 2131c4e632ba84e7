"""The tables of the project's pages, written from results/.

    .venv/bin/python -m script.study.front_page

A page has a table of `TABLES` between the lines <!-- NAME --> and <!-- end -->. Accuracies are
means over distinct texts, in percent, with 95 % intervals; the best figure of a column is bold.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

from runtime.files import read_json, write_text
from script.study.reproduce import RESULTS, ROOT, TESTED, TUNED
from script.study.runs import BASELINES
from script.study.summary import FORMATS

PAGES = (ROOT / "README.md", RESULTS / "README.md")
FREE = "best free baseline"
METHODS = {
    "look-up": "dictionary",
    FREE: FREE,
    "full": "full fine-tuning",
    "prefix": "prefix",
    "4 prefixes": "4 prefixes",
    "lora": "LoRA",
    "bias": "bias",
    "input prefix": "prefix at the input",
    "probe": "probe",
    "ensemble": "average of all",
}
ON_FRONT = (FREE, "full", "prefix", "lora", "ensemble")
COMPARED = [*METHODS][1:]  # all but the dictionary
DATA = {
    "raw": "titles",
    "cleaned": "cleaned titles",
    "time": "later titles",
    "channel": "other channels",
    "emotion": "tweets",
    "banking77": "bank questions",
    "published": "published split",
}
Row = dict[str, object]
Cell = Callable[[Row], str]


def read(name: str) -> list[Row]:
    """Return the rows of a table of `Results`."""
    return read_json(RESULTS / f"{name}.json", list)


def methods_of(data: str) -> dict[str, Row]:
    """Return the rows of a data set by method; the validation files choose the best free one."""
    rows = {row["method"]: row for row in read("methods") if row["data"] == data}
    if free := [row for method, row in rows.items() if method in BASELINES]:
        rows[FREE] = max(free, key=lambda row: row["validation"])
        rows[FREE]["chosen"] = True
    if runs := [run for name, run in rival().items() if name.split("/")[0] == data]:
        names = {"accuracy": "test_accuracy", "macro F1": "test_macro_f1"}
        rows["SetFit"] = {name: fmean(run[key] for run in runs) for name, key in names.items()}
    return rows


def rival() -> dict[str, Row]:
    """Return the runs of `script.study.setfit_rival` by folder."""
    path = RESULTS / "setfit.json"
    return read_json(path) if path.exists() else {}


def figure(column: str, form: Callable[[float], str]) -> Cell:
    """Return what formats a figure of a row, if the row has it."""
    return lambda row: "" if row[column] is None else form(row[column])


def percent(column: str) -> Cell:
    """Return what formats a share."""
    return figure(column, lambda share: f"{100 * share:.1f}")


def with_interval(column: str) -> Cell:
    """Return what formats a share and its interval."""

    def cell(row: Row) -> str:
        shown = percent(column)(row)
        return shown and shown + " ({:.1f}–{:.1f})".format(
            *(100 * end for end in row[f"{column} interval"])
        )

    return cell


def markdown(header: list[str], rows: list[list[str]], best: Callable | None = max) -> str:
    """Return a table; `best` chooses the figure of each column that is bold."""
    for place in range(1, len(header) if best else 0):
        figures = {float(row[place].split()[0]): row for row in rows if row[place]}
        if len(figures) > 1:
            row = figures[best(figures)]
            row[place] = f"**{row[place]}**"
    head, *body = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([head, "|" + "---|" * len(header), *body])


def compared(methods: tuple[str, ...], columns: dict[str, tuple[str, Cell]], best=max) -> str:
    """Return a table of methods; columns: by title, the data set and what formats a row of it.

    A data set without results yet has no column.
    """
    found = {data: methods_of(data) for data, _ in columns.values()}
    columns = {title: column for title, column in columns.items() if found[column[0]]}
    rows = []
    for method in methods:
        cells = [
            cell(found[data][method]) if method in found[data] else ""
            for data, cell in columns.values()
        ]
        rows += [[METHODS.get(method, method), *cells]] * any(cells)
    return markdown(["method", *columns], rows, best)


def accuracies(*names: str) -> dict[str, tuple[str, Cell]]:
    """Return the columns of accuracies on data sets."""
    return {DATA[name]: (name, with_interval("accuracy")) for name in names}


def tests() -> str:
    """Return the tests that were named before; those that show a difference are bold."""
    cells: dict[str, dict[str, str]] = {}
    for test in read("tests"):
        other, _, one = test["named"].partition(":")
        ends = "{:+.1f} to {:+.1f}".format(*(100 * end for end in test["interval"]))
        cell = f"{100 * test['difference']:+.1f} ({ends}), p = {test['p_holm']:.2g}"
        name = f"{METHODS[other]} against {METHODS.get(one, one)}"
        cells.setdefault(name, {})[test["data"]] = f"**{cell}**" if test["shown"] else cell
    tested = [data for data in TESTED if any(data in each for each in cells.values())]
    rows = [[name, *(each.get(data, "") for data in tested)] for name, each in cells.items()]
    return markdown(["points", *(DATA[data] for data in tested)], rows, best=None)


def curve() -> str:
    """Return the accuracies by number of training texts."""
    points = read("curve")
    sizes = sorted({point["size"] for point in points})
    cells: dict[str, dict[float, str]] = {}
    for point in points:
        row = {"on unseen": point["mean"], "on unseen interval": point["interval"]}
        cells.setdefault(point["method"], {})[point["size"]] = with_interval("on unseen")(row)
    rows = [
        [METHODS.get(name, name), *(cells[name].get(size, "") for size in sizes)] for name in cells
    ]
    return markdown(["training titles", *(f"{size:,.0f}" for size in sizes)], rows)


def few() -> str:
    """Return accuracy and macro F1 with few tweets a label, beside SetFit."""

    def both(row: Row) -> str:
        return f"{100 * row['accuracy']:.1f} / {100 * row['macro F1']:.1f}"

    names = {"8 tweets a label": "emotion-8", "64": "emotion-64", "all": "emotion"}
    columns = {title: (name, both) for title, name in names.items()}
    return compared((FREE, "full", "prefix", "lora", "SetFit"), columns)


def cost() -> str:
    """Return what a method costs: titles, one run."""
    columns = {"trained weights": "trained", "stored": "bytes", "seconds": "seconds"}
    columns |= {"memory": "memory", "texts/s": "rows/s"}
    cells = {title: ("raw", figure(key, FORMATS[key])) for title, key in columns.items()}
    return compared(COMPARED[1:-1], cells, best=None)


def free() -> str:
    """Return the accuracies of all free baselines; those that validation chooses are bold."""

    def cell(column: str, row: Row) -> str:
        shown = percent(column)(row)
        return f"**{shown}**" if "chosen" in row else shown

    columns = {
        title: (name, partial(cell, "of rows" if name == "published" else "accuracy"))
        for name, title in DATA.items()
    }
    return compared(tuple(BASELINES), columns, best=None)


ERRORS = {
    DATA[name]: (name, figure("pooled ECE", "{:.3f}".format))
    for name in ("raw", "cleaned", "emotion", "banking77", "published")
} | {
    f"{DATA['published']}, {kind}": ("published", figure(f"pooled ECE on {kind}", "{:.3f}".format))
    for kind in ("seen", "unseen")
}
FRONT = {
    DATA["raw"]: ("raw", percent("accuracy")),
    f"{DATA['emotion']}, macro F1": ("emotion", percent("macro F1")),
    DATA["banking77"]: ("banking77", percent("accuracy")),
    DATA["published"]: ("published", percent("of rows")),
}
REPEATED = {"all rows": ("published", percent("of rows"))} | {
    f"{kind} titles": ("published", with_interval(f"on {kind}")) for kind in ("seen", "unseen")
}
SETS = {
    f"{DATA['emotion']}, macro F1": ("emotion", percent("macro F1")),
    f"{DATA['emotion']}, accuracy": ("emotion", with_interval("accuracy")),
    f"{DATA['banking77']}, accuracy": ("banking77", with_interval("accuracy")),
}
TABLES = {
    "front": lambda: compared(ON_FRONT, FRONT),
    "titles": lambda: compared(COMPARED, accuracies("raw", "cleaned", "time", "channel")),
    "sets": lambda: compared(COMPARED, SETS),
    "free": free,
    "tests": tests,
    "few": few,
    "curve": curve,
    "repeated": lambda: compared([*METHODS], REPEATED),
    "confidence": lambda: compared((FREE, *TUNED, "ensemble"), ERRORS, best=min),
    "cost": cost,
}


def filled(page: str) -> str:
    """Return a page with its tables made anew."""
    return re.sub(
        r"(<!-- (\w+) -->\n).*?\n?(<!-- end -->)",
        lambda found: found[1] + TABLES[found[2]]() + "\n" + found[3],
        page,
        flags=re.DOTALL,
    )


def main(pages: tuple[Path, ...] = PAGES) -> int:
    """Write the tables of the pages."""
    for path in pages:
        write_text(path, filled(path.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
