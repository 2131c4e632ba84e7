"""Adapter folders in PEFT's layout: the weights trained on a backbone, and the backbone's name.

Format: PEFT 0.21 (https://github.com/huggingface/peft), SEQ_CLS. Labels and `max_seq_length`, which
PEFT does not store, are in an additional config.json, which PEFT does not read.
"""

import re
from pathlib import Path

from torch import Tensor

from model.loading import opened, read_shapes
from runtime.files import UserError

WEIGHTS = "adapter_model.safetensors"
PREFIX, STORED_PREFIX = "prefix_encoder.embedding.weight", "prompt_embeddings"


def our_name(stored: str) -> str:
    """Return our name for a tensor of an adapter folder; see `AdapterMethod.stored_name`."""
    return PREFIX if stored == STORED_PREFIX else re.sub(r"^base_model\.(model\.)?", "", stored)


def read(folder: Path, shapes: dict[str, tuple[int, ...] | None]) -> dict[str, Tensor]:
    """Read the tensors with these names (ours) and shapes; a name without a shape is skipped.

    Raises: UserError if the file is unreadable, or has other tensors or values that are not finite.
    """
    path = folder / WEIGHTS
    with opened(path) as file:
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


def count_labels(folder: Path) -> int:
    """Return the number of labels of an adapter that PEFT wrote. Raises: UserError."""
    shapes = {our_name(name): shape for name, shape in read_shapes(folder / WEIGHTS).items()}
    if "classifier.bias" not in shapes:
        raise UserError(f"{folder / WEIGHTS} has no classifier.bias: it has no head")
    return shapes["classifier.bias"][0]
