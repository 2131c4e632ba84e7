"""Checkpoints: folders that appear whole or not at all, and are believed only where they are whole.

One holds the tuned model, loadable as a finished one, and what a run needs to go on to the bit:
moments of the optimizer, weights of the best epoch, state of the loop, records so far. Tensors are
safetensors and all else is JSON, so that nothing is ever unpickled.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from model import adapter

logger = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "training.safetensors"
MODEL = "model.safetensors"  # of full fine-tuning; its weights are not written twice
WEIGHT = "weight/"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of each parameter


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or gone on from: its message says why and the way out."""


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(
    parent: Path, state: dict, tensors: dict[str, torch.Tensor], fill: Callable[[Path], None]
) -> Path:
    """Write `parent`/checkpoint-STEP; `fill` puts the model and the records into the folder given.

    Files are synced before the manifest of their sizes and hashes, that before the renaming, so
    a process killed at any moment leaves a whole checkpoint or none.

    Raises: CheckpointError where the disk does not take it; nothing of it is left then.
    """
    final = parent / f"checkpoint-{state['step']}"
    staging = parent / f"saving-{final.name}"
    try:
        staging.mkdir(parents=True)
        fill(staging)
        written = model_weights(staging)
        tensors = {name: one.cpu().contiguous() for name, one in tensors.items()}
        left = {name: one for name, one in tensors.items() if not same(one, written.get(name))}
        save_file(left, staging / TENSORS)
        (staging / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for path in staging.iterdir():
            sync(path)
        text = json.dumps(
            {path.name: describe(path) for path in sorted(staging.iterdir())}, indent=2
        )
        (staging / MANIFEST).write_text(text, encoding="utf-8")
        sync(staging / MANIFEST)
        sync(staging)
        if final.exists():  # of the same step, by a run that went on from before
            shutil.rmtree(final)
        os.replace(staging, final)
        sync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(
            f"{final} cannot be written: {error}; earlier checkpoints are intact"
        ) from None
    return final


def learnt(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """What is tuned, as `weight/NAME`, and the optimizer's moments of it, as `MOMENT/NAME`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[WEIGHT + name] = parameter.detach()
            for moment in MOMENTS:
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    return tensors


def put_back(
    tensors: dict[str, torch.Tensor], model: nn.Module, optimizer: torch.optim.AdamW
) -> None:
    """The inverse of `learnt`. Raises: CheckpointError where they are not this model's."""
    tuned = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for name, parameter in tuned.items():
        try:
            weight = tensors[WEIGHT + name]
            moments = {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS}
        except KeyError as error:
            raise CheckpointError(f"the checkpoint lacks {error}") from None
        if weight.shape != parameter.shape:
            raise CheckpointError(
                f"the checkpoint's {name} is {list(weight.shape)}, the model's "
                f"{list(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(weight)
        optimizer.state[parameter] = {k: one.to(parameter.device) for k, one in moments.items()}


def model_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights in a model's own files, as `weight/NAME`, which are not written a second time.

    A reparametrised prefix stands there as its result, so that its own weights are written too.
    """
    if (folder / MODEL).exists():
        return {WEIGHT + name: weight for name, weight in load_file(folder / MODEL).items()}
    weights = load_file(folder / adapter.WEIGHTS)
    return {WEIGHT + ours: weights[name] for name, ours in adapter.NAMES.items()}


def same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether they are one tensor to the bit."""
    return other is not None and one.shape == other.shape and torch.equal(one, other)


def describe(path: Path) -> dict:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """State and tensors of a checkpoint.

    Raises: CheckpointError where a file is missing, cut off or changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, described in manifest.items():
            if describe(folder / name) != described:
                raise CheckpointError(f"{folder} is damaged: {name} is not as it was written")
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        tensors = model_weights(folder) | tensors
    except (OSError, ValueError, AttributeError, TypeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} is no whole checkpoint: {error}") from None
    return state, tensors


def steps(parent: Path) -> dict[int, Path]:
    """The checkpoints in a folder by their steps, the newest first. They may be damaged."""
    entries = parent.iterdir() if parent.is_dir() else ()
    found = {int(match[1]): path for path in entries if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def newest(parent: Path) -> tuple[Path, dict, dict[str, torch.Tensor]] | None:
    """The newest whole checkpoint in a folder; None where there is none at all.

    Raises: CheckpointError where there are some, all of them damaged.
    """
    found = steps(parent)
    for path in found.values():
        try:
            return path, *read(path)
        except CheckpointError as error:
            logger.warning("warning: %s; trying the one before", error)
    if found:
        raise CheckpointError(
            f"every checkpoint in {parent} is damaged: --overwrite_output_dir, without "
            "--resume_from_checkpoint, starts anew"
        )
    return None


def find(choice: str, parent: Path) -> tuple[Path, dict, dict[str, torch.Tensor]] | None:
    """Path, state and tensors of the checkpoint `choice`, or of the `newest` where it is "auto"."""
    return newest(parent) if choice == "auto" else (Path(choice), *read(Path(choice)))


def prune(parent: Path, limit: int | None, best_step: int) -> None:
    """Remove the oldest checkpoints above `limit`; never the newest, nor that of `best_step`.

    None: there is no limit. 0: the newest two stay, of which each holds the best weights too.
    """
    if limit is None:
        return
    found = list(steps(parent).items())
    for step, path in found[limit or 2 :]:
        if limit == 0 or step != best_step:
            # first the manifest, so that half a checkpoint is never taken for a whole one
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
