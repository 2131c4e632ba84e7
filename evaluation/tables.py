"""What a person reads of a run: its record, its model card, its closing table."""

import json
from argparse import Namespace
from pathlib import Path

# Rows of the closing table, and their keys in all_results.json behind `eval_` and `test_`.
ROWS = (
    ("rows", "rows"),
    ("accuracy", "accuracy"),
    ("  95 % interval", "accuracy_interval"),
    ("macro F1", "macro_f1"),
    ("weighted F1", "weighted_f1"),
    ("micro F1", "micro_f1"),
    ("log loss", "loss"),
    ("calibration error", "ece"),
    ("text in training file", "seen_share"),
    ("accuracy on seen texts", "accuracy_seen"),
    ("accuracy on unseen texts", "accuracy_unseen"),
    ("  95 % interval", "accuracy_unseen_interval"),
)
WAYS = {
    None: "full fine-tuning",
    "all": "prefix tuning in every layer",
    "input": "prefix tuning at the input alone",
}
CARD = """---
base_model: {backbone}
pipeline_tag: text-classification
library_name: {library}
metrics: [accuracy, f1]
---

# {title}

{backbone}, tuned by {way} to tell {count} labels apart: {labels}.{notes}

## Results

{results}
{choice}

## Training data and procedure

{train_rows} rows of `{train_file}` (SHA-256 `{train_sha256}`); {trainable:,} of {total:,}
parameters tuned, in {seconds:.0f} s. All settings:

```json
{settings}
```

## Versions

{versions}

## Limits

It knows the labels above and texts of the kind it was tuned on; texts are cut to
{max_seq_length} tokens. Confidences are not calibrated.
"""


def parameters(results: dict) -> str:
    """One line of the log: tuned, held and stored parameters."""
    return "parameters (without the head): " + ", ".join(
        f"{results[f'{kind}_parameters']:,} ({results[f'{kind}_parameters_without_head']:,}) {kind}"
        for kind in ("trainable", "total", "stored")
    )


def shown(value: float | int | list[float] | None) -> str:
    """A figure of a table: a share, the two ends of an interval, or a count with commas."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return "-".join(f"{end:.3f}" for end in value)
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def result_rows(results: dict) -> list[tuple[str, list[str]]]:
    """Title, validation and test figure of each of `ROWS` that there is."""
    rows = []
    for title, key in ROWS:
        cells = [results.get(f"{split}_{key}") for split in ("eval", "test")]
        if any(cell is not None for cell in cells):
            rows.append((title, [shown(cell) for cell in cells]))
    return rows


def model_card(about: dict, results: dict) -> str:
    """The README.md beside a tuned model."""
    settings = about["settings"]
    rows = [f"| {title.strip()} | {' | '.join(cells)} |" for title, cells in result_rows(results)]
    table = ["None: it was neither evaluated nor tested."]
    if rows:
        table = ["| | validation | test |", "|---|---|---|", *rows, ""]
        table.append(
            "The accuracy on texts that do not stand in the training file is the one to expect on "
            "new texts."
        )
    notes = ""
    if about["started_from"]:
        notes += f"\n\nIt started from `{about['started_from']}`, which was tuned before: "
        notes += "texts that it saw then count as unseen below."
    if about["synthetic"]:
        notes += "\n\n**It was tuned on made-up texts, the synthetic sample.**"
    choice = "It is the model after the last epoch."
    if "best_epoch" in results:
        choice = (
            f"It is the best of the epochs, {results['best_epoch']}, by the validation file alone."
        )
    return CARD.format(
        choice=choice,
        backbone=about["backbone"],
        library="peft" if settings["prefix_depth"] == "all" else "transformers",
        title="A tuned prefix" if settings["prefix"] else "A tuned classifier",
        way=WAYS[settings["prefix_depth"]],
        count=len(about["labels"]),
        labels=", ".join(about["labels"]),
        train_rows=shown(results["train_rows"]),
        train_file=settings["train_file"],
        train_sha256=about["data"]["train"]["sha256"],
        trainable=results["trainable_parameters"],
        total=results["total_parameters"],
        seconds=results["train_runtime"],
        settings=json.dumps(settings, indent=2),
        versions="\n".join(f"- {name} {number}" for name, number in about["versions"].items()),
        max_seq_length=settings["max_seq_length"],
        results="\n".join(table),
        notes=notes,
    )


def summary(args: Namespace, results: dict, folder: Path) -> str:
    """The closing table of a run: what was reached, what it took, where it lies."""
    rows = result_rows(results)
    lines = [f"{'':24}{'validation':>13}{'test':>13}"] if rows else []
    lines += [f"{title:24}{one:>13}{other:>13}" for title, (one, other) in rows]
    if "train_runtime" in results:
        tuned, total = results["trainable_parameters"], results["total_parameters"]
        lines.append(
            f"tuned {tuned:,} of {total:,} parameters ({100 * tuned / total:.3g} %) "
            f"in {results['train_runtime']:.0f} s, "
            f"{results['train_samples_per_second']:.0f} examples/s"
        )
    lines.append(f"peak memory {results['peak_memory_bytes'] / 2**30:.2f} GiB")
    if args.do_predict and "test_accuracy" not in results:
        lines.append(
            f"{args.test_file} has nothing in a column '{args.label_column_name}': predicted, not "
            "scored"
        )
    files = sorted(entry.name for entry in folder.iterdir())
    lines.append(f"in {folder}: {', '.join(files)}")
    return "\n".join(lines)
