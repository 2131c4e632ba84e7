"""Adapter folders in PEFT's layout: the weights trained on a backbone, and the backbone's name.

Format: PEFT 0.21 (https://github.com/huggingface/peft), SEQ_CLS. Labels and `max_seq_length`, which
PEFT does not store, are in an additional config.json, which PEFT does not read.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig

from model.folders import ADAPTER_CONFIG, check_weights
from model.loading import TUNED
from runtime.files import UserError, to_json

WEIGHTS = "adapter_model.safetensors"
PREFIX, STORED_PREFIX = "prefix_encoder.embedding.weight", "prompt_embeddings"


def our_name(stored: str) -> str:
    """Return our name for a tensor of an adapter folder; see `AdapterMethod.stored_name`."""
    return PREFIX if stored == STORED_PREFIX else re.sub(r"^base_model\.(model\.)?", "", stored)


def save(
    folder: Path, config: BertConfig, tensors: dict[str, Tensor], settings: dict, changes: dict
) -> None:
    """Write the trained `tensors`, by PEFT's names, without the backbone.

    settings: the content of adapter_config.json. changes: entries to change in config.json.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
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
    path = folder / WEIGHTS
    with opened(folder) as file:
        names = {our_name(stored): stored for stored in file.keys()}  # noqa: SIM118
        if other := names.keys() ^ shapes.keys():
            raise UserError(
                f"{path} must contain exactly {', '.join(shapes)}; missing or unexpected: "
                f"{', '.join(names.get(name, name) for name in sorted(other))}"
            )
        tensors = {name: file.get_tensor(names[name]) for name in shapes if shapes[name]}
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or not tensor.isfinite().all():
            raise UserError(
                f"{path}: {names[name]} does not fit the config: {list(tensor.shape)} should be "
                f"{list(shapes[name])}, with finite values only"
            )
    return tensors


def read_unchecked(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of an adapter folder, by our names, without checks."""
    return {our_name(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}


def count_labels(folder: Path) -> int:
    """Return the number of labels of an adapter that PEFT wrote."""
    with opened(folder) as file:
        biases = [name for name in file.keys() if our_name(name) == "classifier.bias"]  # noqa: SIM118
        if not biases:
            raise UserError(f"{folder / WEIGHTS} has no classifier.bias: it has no head")
        return file.get_slice(biases[0]).get_shape()[0]
