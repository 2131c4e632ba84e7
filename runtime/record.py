"""The record of a run, run.json: all that its results depend on."""

import json
import logging
import platform
import resource
import shlex
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
# Settings that change nothing of what a run learns and predicts; files count by their content.
FREE_SETTINGS = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_strategy", "save_steps",
    "save_total_limit", "train_file", "validation_file", "test_file", "model_name_or_path",
    "report_to",
}  # fmt: skip
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas", "scikit-learn")


class OutputError(ValueError):
    """An output folder that cannot be used: its message names it and the way out."""


def decisive(run: dict) -> dict:
    """The part of a run's record that decides, over the same versions, its results to the bit."""
    try:
        settings = {k: v for k, v in run["settings"].items() if k not in FREE_SETTINGS}
        data = {name: described["sha256"] for name, described in run["data"].items()}
        weights = {name: run[name] for name in ("labels", "weights_sha256")}
    except (KeyError, AttributeError, TypeError) as error:
        return {"unreadable": str(error)}
    return {"settings": settings, "data": data, **weights}


def differences(one: dict, other: dict) -> list[str]:
    """The fields, as `settings.seed`, in which two records differ."""
    found = []
    for key in sorted(one.keys() | other.keys()):
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += [f"{key}.{name}" for name in differences(mine, theirs)]
        elif mine != theirs:
            found.append(key)
    return found


def check_same(folder: Path, earlier: dict, run: dict) -> None:
    """Whether `run` goes on as the run `earlier`, of the checkpoint `folder`, would have.

    Raises: OutputError naming what differs. Other versions of packages are warned of.
    """
    if found := differences(decisive(earlier), decisive(run)):
        raise OutputError(
            f"{folder} is of a run with other {', '.join(found)}: give the same command, or "
            "start anew with --overwrite_output_dir, without --resume_from_checkpoint"
        )
    if earlier["commit"] != run["commit"]:
        logger.warning(
            "warning: this run began at commit %s of the program: its end may differ",
            earlier["commit"],
        )
    for name in differences(earlier["versions"], run["versions"]):
        logger.warning(
            "warning: %s was %s when this run began and is %s: its end may differ in the last "
            "digits", name, earlier["versions"].get(name), run["versions"].get(name),
        )  # fmt: skip


def read_record(path: Path) -> dict:
    """A run.json; empty where there is none. Raises: OutputError for what no run wrote."""
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        listed = all(isinstance(name, str) for name in record["files"])
    except (ValueError, KeyError, TypeError):
        listed = False
    if not listed:
        raise OutputError(f"{path} is not a run's: move it away")
    return record


def about(
    args: Namespace, start: str, sha256: str | None, names: list[str], data: dict[str, dict]
) -> dict:
    """All that a run's results depend on; becomes run.json.

    start, sha256: name and content of what is tuned. data: `Split.describe` of each file.
    """
    return {
        "settings": vars(args),
        "backbone": start,
        "weights_sha256": sha256,
        "labels": names,
        "data": data,
        "synthetic": any(map(is_synthetic, data.values())),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "commit": commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def is_synthetic(described: dict) -> bool:
    """Whether a file of data is as script/splits.py made it from the synthetic sample."""
    path = Path(described["path"])
    try:
        about = json.loads((path.parent / "split.json").read_text(encoding="utf-8"))
        return about["synthetic"] and about["files"].get(path.name) == described["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not ours, or none
        return False


def commit() -> str | None:
    """The commit of this program, with "+" where files were changed since; None without git."""
    here = Path(__file__).parent
    try:
        name, status = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if status.stdout.strip() else "")


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
