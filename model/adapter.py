"""Adapter folders in PEFT's layout: the weights trained on a backbone, and the backbone's name.

Format: PEFT 0.21 (https://github.com/huggingface/peft), SEQ_CLS. Labels and `max_seq_length`, which
PEFT does not store, are in an additional config.json, which PEFT does not read.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig

from model.loading import TUNED
from model.source import ADAPTER_CONFIG, check_weights
from runtime.files import UserError, to_json

WEIGHTS = "adapter_model.safetensors"
PREFIX = "prefix_encoder.embedding.weight"


def stored_name(name: str) -> str:
    """Return PEFT's name for one of our parameters."""
    return "prompt_embeddings" if name == PREFIX else f"base_model.{name}"


def save(
    folder: Path, config: BertConfig, tensors: dict[str, Tensor], settings: dict, changes: dict
) -> None:
    """Write the trained `tensors` (by our names), without the backbone.

    settings: the content of adapter_config.json. changes: entries to change in config.json.
    """
    stored = {stored_name(n): one.detach().cpu().contiguous() for n, one in tensors.items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(to_json(dict(sorted(settings.items()))), encoding="utf-8")
    config = copy.deepcopy(config)
    config.update({"architectures": TUNED, **changes})
    config.save_pretrained(folder)


@contextmanager
def opened(folder: Path) -> Iterator[safe_open]:
    """Open the tensors of an adapter folder. Raises: UserError if they are unreadable."""
    check_weights(folder, WEIGHTS)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from None


def read(folder: Path, shapes: dict[str, tuple[int, ...] | None]) -> dict[str, Tensor]:
    """Read the tensors with these names (ours) and shapes; a name without a shape is skipped.

    Raises: UserError if the file is unreadable, or has other tensors or values that are not finite.
    """
    path, names = folder / WEIGHTS, {stored_name(name): name for name in shapes}
    with opened(folder) as file:
        if other := set(file.keys()).symmetric_difference(names):
            raise UserError(
                f"{path} must contain exactly {', '.join(names)}; missing or unexpected: "
                f"{', '.join(other)}"
            )
        tensors = {ours: file.get_tensor(name) for name, ours in names.items() if shapes[ours]}
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or not tensor.isfinite().all():
            raise UserError(
                f"{path}: {stored_name(name)} does not fit the config: {list(tensor.shape)} should "
                f"be {list(shapes[name])}, with finite values only"
            )
    return tensors


def read_unchecked(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of an adapter folder, by our names, without checks."""
    ours = {"prompt_embeddings": PREFIX}
    tensors = load_file(folder / WEIGHTS)
    return {ours.get(k, k.removeprefix("base_model.")): one for k, one in tensors.items()}


def count_labels(folder: Path) -> int:
    """Return the number of labels of an adapter that PEFT wrote."""
    with opened(folder) as file:
        return file.get_slice(stored_name("classifier.bias")).get_shape()[0]
