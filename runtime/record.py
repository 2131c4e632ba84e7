"""The record of a run, run.json: everything its results depend on, and its identity."""

import logging
import math
import platform
import resource
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from runtime.file_format import read_split_record
from runtime.files import UserError, read_json
from runtime.labels import label_key

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas", "scikit-learn")
# Settings that do not affect a run's results; files are compared by their content.
FREE_SETTINGS = set(
    "output_dir overwrite_output_dir resume_from_checkpoint save_strategy save_steps "
    "save_total_limit train_file validation_file test_file model_name_or_path report_to "
    "csv_encoding".split()
)
# Settings that only change how sums are rounded, so that a run resumes with others. Of the last two
# the product counts: it is the number of rows of a step.
STEP_SIZE = ("per_device_train_batch_size", "gradient_accumulation_steps")
ROUNDING = ("per_device_eval_batch_size", "gradient_checkpointing", "threads", *STEP_SIZE)


class File(TypedDict):
    """A data file in a record; only its content counts."""

    path: str
    rows: int
    sha256: str


class Record(TypedDict, total=False):
    """The entries of run.json that are read back; a baseline's has less, and all have more."""

    files: list[str]
    settings: dict[str, Any]
    data: dict[str, File]
    labels: list[str]
    weights_sha256: str | None
    commit: str | None
    versions: dict[str, str]
    command: str
    synthetic: bool


def describe_run(settings: dict, model: dict, labels: list[str], data: dict[str, dict]) -> dict:
    """Return the record of a run that is about to start.

    model: "backbone" and "weights_sha256", the name and checksum of the model to start from, and
    "method", its readable name. data: path, rows and checksum of each file.
    """
    splits = {name: read_split_record(file["path"], file["sha256"]) for name, file in data.items()}
    known = ("protocol", "input", "input_sha256", "parameters")  # with the seed
    return {
        "settings": settings,
        **model,
        "labels": labels,
        "data": data,
        "split": {k: splits["train"][k] for k in known if k in splits.get("train", ())} or None,
        "synthetic": any(split.get("synthetic") for split in splits.values()),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "commit": commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def commit() -> str | None:
    """Return the commit of this program, with "+" if files were changed since.

    None without git, and for a copy that is not tracked but lies within another repository.
    """
    questions = ("ls-files --error-unmatch record.py", "rev-parse HEAD", "status --porcelain -uno")
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
    try:
        _, name, status = (subprocess.run(["git", *q.split()], **options) for q in questions)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + "+" * bool(status.stdout)


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_record(path: Path) -> dict:
    """Read a run.json, or return {} if there is none. Raises: UserError if no run wrote it."""
    if not path.exists():
        return {}
    record = read_json(path, Record)
    if "files" not in record:
        raise UserError(f"{path} was not written by a run: move it away")
    return record


def identity(record: dict) -> dict:
    """Return the part that determines a run's results, up to rounding."""
    every = record.get("settings", {})
    settings = {  # an unset one is as good as missing: an earlier version may not have had it
        name: value
        for name, value in every.items()
        if name not in (*FREE_SETTINGS, *ROUNDING) and value is not None and value is not False
    }
    settings[STEP_SIZE[0]] = math.prod(every.get(name) or 1 for name in STEP_SIZE)
    return {
        "settings": settings,
        "data": {name: file["sha256"] for name, file in record.get("data", {}).items()},
        "labels": [*map(label_key, record.get("labels", ()))],
        "weights_sha256": record.get("weights_sha256"),
    }


def differences(one: dict, other: dict) -> list[str]:
    """List the fields in which two records differ, nested fields as `settings.seed`."""
    fields = []
    for key in sorted(one.keys() | other.keys()):
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            fields += [f"{key}.{name}" for name in differences(mine, theirs)]
        elif mine != theirs:
            fields.append(key)
    return fields


def run_differences(one: dict, other: dict) -> list[str]:
    """List what makes two records different runs; it is empty for one run, up to rounding."""
    return differences(identity(one), identity(other))


def rounding(record: dict) -> dict:
    """Return the part that may change the last digits of a run's results."""
    settings = {name: record.get("settings", {}).get(name) or None for name in ROUNDING}
    versions = {f"{name} version": number for name, number in record.get("versions", {}).items()}
    return {**settings, **versions, "commit": record.get("commit")}


def check_same_run(folder: Path, earlier: dict, record: dict) -> None:
    """Check that the checkpoint in `folder`, with the record `earlier`, is of this run.

    Raises: UserError naming what differs. Warns about what may change the last digits.
    """
    if fields := run_differences(earlier, record):
        raise UserError(
            f"{folder} belongs to a run with different {', '.join(fields)}: repeat that "
            "command, or start over with --overwrite_output_dir and without "
            "--resume_from_checkpoint"
        )
    for name in differences(rounding(earlier), rounding(record)):
        logger.warning(
            "warning: this run started with another %s; the last digits of the results may differ",
            name,
        )
