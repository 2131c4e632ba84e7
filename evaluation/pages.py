"""report.html: what a person looks at after a run; one file, which needs no network.

Pictures are matplotlib's SVG, in the page itself; the page is filled by Jinja, which escapes all
that comes from data.
"""

from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.plots import (
    DRAWN,
    STYLE,
    class_bars,
    confusion,
    learning_curves,
    reliability,
    study_figures,
    svg,
)
from evaluation.tables import WAYS, result_rows, shown


def environment() -> Environment:
    """Jinja, which escapes, and fails at what is missing."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    found.filters["shown"] = shown
    return found


def render(about: dict, results: dict, evaluation: dict, records: list[dict]) -> str:
    """The page of a run, from the content of its run.json, all_results.json, evaluation.json and
    the lines of its metrics.jsonl."""
    labels = evaluation["labels"]
    name = "test" if "test" in evaluation else "eval"
    details = evaluation[name]
    settings = about["settings"]
    if settings.get("num_train_epochs"):
        way = WAYS[settings["prefix_depth"]]
    elif "train_rows" in results:
        way = f"baseline {about['backbone']}"
    else:
        models = settings["prefix_paths"] or [settings["model_name_or_path"]]
        way = f"predictions of {', '.join(models)}"
    cards = [
        (title, results.get(f"{name}_{key}"), results.get(f"{name}_{key}_interval"))
        for title, key in (
            ("accuracy", "accuracy"), ("on unseen texts", "accuracy_unseen"),
            ("on seen texts", "accuracy_seen"), ("texts seen in training", "seen_share"),
            ("micro F1", "micro_f1"), ("macro F1", "macro_f1"),
        )
    ]  # fmt: skip
    few = len(labels) <= DRAWN
    with matplotlib.rc_context(STYLE):
        pictures = {
            "curves": learning_curves(records),
            "bars": few and class_bars(labels, details["f1"], details["support"]),
            "reliability": reliability(details["reliability"]),
            "confusion": few and details["confusion"] and confusion(labels, details["confusion"]),
        }

    def named(label: int | list[int]) -> str:
        if isinstance(label, list):  # 0 and 1 for each label
            return ", ".join(n for n, there in zip(labels, label, strict=True) if there) or "none"
        return labels[label]

    mistakes = [
        one | {"label": named(one["label"]), "predicted": named(one["predicted"])}
        for one in details["mistakes"]
    ]
    classes = zip(labels, *(details[key] for key in ("precision", "recall", "f1", "support")),
                  strict=True)  # fmt: skip
    return environment().get_template("report.html").render(
        about=about, results=results, way=way, file={"test": "test", "eval": "validation"}[name],
        cards=[card for card in cards if card[1] is not None], rows=result_rows(results),
        pictures=pictures, classes=list(classes), mistakes=mistakes,
        audited=f"{name}_seen_share" in results, several=f"{name}_micro_f1" in results,
    )  # fmt: skip


def render_study(
    runs: list[dict], rows: list[dict], table: list[list[str]], columns: list[str],
    tests: list[dict], command: str, notes: list[str],
) -> str:  # fmt: skip
    """The page of a study, see script/compare.py."""
    with matplotlib.rc_context(STYLE):
        protocols = [
            [
                svg(figure, words)
                for _, figure, words in study_figures(
                    *([one for one in things if one["protocol"] == protocol]
                      for things in (runs, rows))
                )
            ]
            for protocol in dict.fromkeys(row["protocol"] for row in rows)
        ]  # fmt: skip
    folds = len({run["data"] for run in runs if run["protocol"] == "unseen"})
    cards = [row for row in rows if row["protocol"] == "unseen" and row["on unseen"] is not None]
    return environment().get_template("study.html").render(
        runs=runs, table=table, columns=columns, tests=tests, command=command,
        protocols=protocols, folds=folds, cards=cards, notes=notes,
    )  # fmt: skip
