"""Checkpoints: folders written atomically and verified before use.

A checkpoint contains the tuned model, loadable like a finished one, and what a run needs to resume
byte for byte: the optimizer's moments, the weights of the best epoch, the state of the loop and the
metrics so far. Tensors are safetensors and everything else is JSON; nothing is unpickled.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

import torch
from msgspec import Meta, Struct
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from runtime.files import UserError, read_json, sha256, sync, to_json
from runtime.record import Record
from runtime.swap import files_of

logger = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "training.safetensors"

Count = Annotated[int, Meta(ge=0)]


class ProgressState(Struct):
    """The progress of training; all floats survive bit for bit."""

    done: Count  # steps
    examples: Count
    loss_sum: float
    recent: list[tuple[Count, float]]  # examples and loss sum of each step since the last report
    norm: float
    rate: float
    seconds: float


class BestState(Struct):
    """The best epoch so far, 0 for none, and the value of its metric."""

    epoch: Count
    value: float | None


class State(TypedDict):
    """The content of state.json."""

    step: Count
    best_step: Count
    progress: ProgressState
    best: BestState
    run: Record


Tensors = dict[str, torch.Tensor]
# Reads the tensors in a folder's model files, by their checkpoint names; a checkpoint does not
# store them twice.
StoredTensors = Callable[[Path], Tensors]


class CheckpointError(UserError):
    """A checkpoint that cannot be written or resumed."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint."""

    path: Path
    state: State
    tensors: Tensors


def write(
    parent: Path, state: dict, tensors: Tensors, fill: Callable[[Path], None], stored: StoredTensors
) -> None:
    """Write `parent`/checkpoint-STEP; `fill` writes the model and the metrics into a given folder.

    Everything is synced before the folder gets its name: a kill leaves a whole checkpoint or none.
    Raises: CheckpointError if writing fails; the new checkpoint is then removed.
    """
    final = parent / f"checkpoint-{state['step']}"
    staging = parent / f"saving-{final.name}"
    try:
        staging.mkdir(parents=True)
        fill(staging)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        for name, written in stored(staging).items():
            if name in tensors and torch.equal(tensors[name], written):
                del tensors[name]
        save_file(tensors, staging / TENSORS)
        (staging / STATE).write_text(to_json(state), encoding="utf-8")
        for path in staging.rglob("*"):
            sync(path)
        manifest = {name: describe(staging / name) for name in sorted(files_of(staging))}
        (staging / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
        sync(staging / MANIFEST)
        sync(staging)
        if final.exists():  # the same step, saved before this run resumed from an earlier one
            shutil.rmtree(final)
        os.replace(staging, final)
        sync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(
            f"{final} cannot be written: {error}; earlier checkpoints are intact"
        ) from None
    logger.info("saved %s", final)


def describe(path: Path) -> dict:
    """Return the size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def read(folder: Path, stored: StoredTensors) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises: CheckpointError if a file is missing, cut off or changed.
    """
    try:
        for name, described in read_manifest(folder).items():
            if describe(folder / name) != described:
                raise CheckpointError(f"{folder} is damaged: {name} does not match its checksum")
        state = read_json(folder / STATE, State)
        return Checkpoint(folder, state, stored(folder) | load_file(folder / TENSORS))
    except CheckpointError:
        raise
    except (OSError, UserError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}") from None


def read_manifest(folder: Path) -> dict[str, dict]:
    """Read the descriptions of a checkpoint's files. Raises: UserError if it has other files."""
    manifest = read_json(folder / MANIFEST, dict[str, dict])
    for name in files_of(folder) - {MANIFEST} ^ manifest.keys():
        raise CheckpointError(f"{folder} is damaged: {name} is missing, here or in {MANIFEST}")
    return manifest


def looks_whole(folder: Path) -> bool:
    """Whether a checkpoint has all its files; they are not read."""
    try:
        read_manifest(folder)
    except (OSError, UserError):
        return False
    return True


def steps(parent: Path) -> dict[int, Path]:
    """List the checkpoints in a folder by step, the newest first. They may be damaged."""
    entries = parent.iterdir() if parent.is_dir() else ()
    paths = {int(match[1]): path for path in entries if (match := NAME.fullmatch(path.name))}
    return dict(sorted(paths.items(), reverse=True))


def find(choice: str, parent: Path, stored: StoredTensors) -> Checkpoint | None:
    """Read the checkpoint in folder `choice`, or the newest intact one in `parent` if it is "auto".

    Returns None if there is none. Raises: CheckpointError if all are damaged.
    """
    if choice != "auto":
        return read(Path(choice), stored)
    paths = steps(parent).values()
    for path in paths:
        try:
            return read(path, stored)
        except CheckpointError as error:
            logger.warning("warning: %s; trying the previous one", error)
    if paths:
        raise CheckpointError(
            f"every checkpoint in {parent} is damaged: start over with --overwrite_output_dir and "
            "without --resume_from_checkpoint"
        )
    return None


def prune(parent: Path, limit: int | None, best_step: int) -> None:
    """Remove the oldest checkpoints above `limit`, but never the newest or the best (`best_step`).

    None: no limit. 0: keep the newest two; each also contains the best weights.
    """
    if limit is None:
        return
    for step, path in list(steps(parent).items())[limit or 2 :]:
        if limit == 0 or step != best_step:
            # the manifest first, so that half a checkpoint never passes for a whole one
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
