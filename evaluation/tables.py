"""The closing table of a run."""

from pathlib import Path

from arguments import MOSTLY_SEEN
from evaluation.metrics import TITLES
from model.schedule import coming_texts

SWITCH = f"; near {100 * MOSTLY_SEEN:.0f} %, where it switches, try the other one too: see --help"


def shown(value: float | int | list[float] | None) -> str:
    """Format a table cell: a share, the two ends of an interval, or a count with commas."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return "-".join(f"{end:.3f}" for end in value)
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def result_rows(results: dict) -> list[tuple[str, list[str]]]:
    """Return title, validation and test figure for each of `TITLES` in the results."""
    rows = []
    for key, title in TITLES.items():
        cells = [results.get(f"{split}_{key}") for split in ("eval", "test")]
        if any(cell is not None for cell in cells):
            rows.append((title, [shown(cell) for cell in cells]))
    return rows


def schedule_name(seen_share: float) -> str:
    """Name the default schedule that a share of seen texts chooses."""
    return f"schedule for {coming_texts(seen_share)} texts ({100 * seen_share:.0f} % seen)"


def summary(record: dict, results: dict, folder: Path) -> str:
    """Format the closing table of a run: its figures, its cost and its files."""
    rows = result_rows(results)
    lines = [f"{'':24}{'validation':>13}{'test':>13}"] if rows else []
    lines += [f"{title:24}{one:>13}{other:>13}" for title, (one, other) in rows]
    if "train_runtime" in results:
        trainable, total = results["trainable_parameters"], results["total_parameters"]
        lines.append(
            f"trained {trainable:,} of {total:,} parameters ({100 * trainable / total:.3g} %) "
            f"in {results['train_runtime']:.0f} s, "
            f"{results['train_samples_per_second']:.0f} examples/s"
        )
    if "schedule_seen_share" in results:
        share = results["schedule_seen_share"]
        near = 0.3 <= share <= 0.7  # both were measured with 0 and with 85 % seen texts alone
        lines.append(schedule_name(share) + SWITCH * near)
    lines.append(f"peak memory {results['peak_memory_bytes'] / 2**30:.2f} GiB")
    if "test" in record["data"] and "test_accuracy" not in results:
        column = record["settings"]["label_column_name"]
        path = record["data"]["test"]["path"]
        lines.append(f"{path} has no labels in column '{column}': predicted, not scored")
    files = sorted(entry.name for entry in folder.iterdir())
    lines.append(f"files in {folder}: {', '.join(files)}")
    return "\n".join(lines)
