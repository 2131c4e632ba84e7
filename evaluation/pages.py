"""The page of a run (report.html, one file that needs no network), and the model card."""

import json
from itertools import compress
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.metrics import IN_MATRIX, TITLES
from evaluation.plots import Run, run_plots
from evaluation.tables import result_rows, shown

FOLDER = Path(__file__).parent
CARDS = "accuracy_unseen accuracy_seen accuracy seen_share micro_f1 macro_f1".split()
KEPT = 0.8  # share of rows that the example of rejection keeps
LABEL_LENGTH = 60  # characters of a label that pages show


def fill(template: str, folder: Path = FOLDER, **values) -> str:
    """Fill a template from a folder; HTML is escaped, and a missing value is an error.

    It can extend the templates of this folder.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, FOLDER]),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=template.endswith(".md"),
    )
    environment.filters["shown"] = shown
    return environment.get_template(template).render(**values)


def render_card(record: dict, results: dict) -> str:
    """Render the model card, README.md, of a trained model; unset settings are left out."""
    settings = {k: v for k, v in record["settings"].items() if v is not None and v is not False}
    return fill(
        "card.md",
        record=record,
        results=results,
        rows=result_rows(results),
        settings=json.dumps(settings, indent=2),
        several=record["settings"].get("num_prefixes", 1) > 1,
    )


def render_run(record: dict, results: dict, evaluation: dict, records: list[dict]) -> str:
    """Render a run's page from run.json, all_results.json, evaluation.json and metrics.jsonl."""
    labels = [
        label if len(label) <= LABEL_LENGTH else f"{label[:LABEL_LENGTH]}..."
        for label in evaluation["labels"]
    ]
    name = "test" if "test" in evaluation else "eval"
    details = evaluation[name]

    def named(label: int | list[int]) -> str:
        if isinstance(label, list):  # 0 or 1 for each label
            return ", ".join(compress(labels, label)) or "none"
        return labels[label]

    mistakes = []
    for mistake in details["mistakes"]:
        names = {key: named(mistake[key]) for key in ("label", "predicted")}
        words = mistake.get("words", ())
        most = max((abs(value) for _, value in words), default=0)
        # with how dark each word's background is, as a share
        shaded = [(word, value, abs(value) / most) for word, value in words if most]
        mistakes.append(mistake | names | {"shaded": shaded})
    columns = (details[key] for key in ("precision", "recall", "f1", "support"))
    cards: dict[tuple, str] = {}  # titles by figure: if no text is seen, two figures are the same
    for key in CARDS:
        if (value := results.get(f"{name}_{key}")) is not None:
            interval = results.get(f"{name}_{key}_interval") or ()
            cards.setdefault((value, *interval), TITLES[key])
    kind, points = list(details["coverage"].items())[-1]  # unseen texts, if there are seen ones
    kept = min(points, key=lambda point: abs(point[1] - KEPT))  # threshold, coverage, accuracy
    return fill(
        "report.html",
        record=record,
        results=results,
        file={"test": "test", "eval": "validation"}[name],
        cards=[(title, value, interval) for (value, *interval), title in cards.items()],
        accuracy=results[f"{name}_accuracy"],
        drawn=IN_MATRIX,
        rows=result_rows(results),
        plots=run_plots(Run(labels, details, records)),
        classes=list(zip(labels, *columns, strict=True)),
        mistakes=mistakes,
        kept=kept if kept[1] < 1 else None,
        kept_unseen=kind == "unseen texts",
        audited=f"{name}_seen_share" in results,
        several=f"{name}_micro_f1" in results,
    )
