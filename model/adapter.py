"""Adapter folders, in PEFT's layout: what was trained on top of a backbone, and its name.

Format: PEFT 0.21 (https://github.com/huggingface/peft), SEQ_CLS. Labels and `max_seq_length`, which
PEFT does not store, are in a config.json beside, which it does not read.
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
from model.source import ADAPTER_CONFIG
from runtime.files import UserError, to_json

WEIGHTS = "adapter_model.safetensors"
PREFIX = "prefix_encoder.embedding.weight"


def stored_name(name: str) -> str:
    """PEFT's name of one of our parameters."""
    return "prompt_embeddings" if name == PREFIX else f"base_model.{name}"


def save(
    folder: Path, config: BertConfig, tensors: dict[str, Tensor], settings: dict, changes: dict
) -> None:
    """Write what was trained, by our names, and nothing of the backbone.

    settings: the content of adapter_config.json. changes: to the config, in what is stored.
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
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from None


def read(folder: Path, shapes: dict[str, tuple[int, ...] | None]) -> dict[str, Tensor]:
    """Read the tensors of these names (ours) and shapes; those without a shape are not wanted.

    Raises: UserError if the file is unreadable, holds other tensors or values that are not finite.
    """
    path, names = folder / WEIGHTS, {stored_name(name): name for name in shapes}
    with opened(folder) as file:
        if other := set(file.keys()).symmetric_difference(names):
            raise UserError(
                f"{path} should hold {', '.join(names)} and nothing else: {', '.join(other)}"
            )
        tensors = {ours: file.get_tensor(name) for name, ours in names.items() if shapes[ours]}
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or not tensor.isfinite().all():
            raise UserError(
                f"{path}: {stored_name(name)} does not fit its config: {list(tensor.shape)} should "
                f"be {list(shapes[name])}, all of it finite"
            )
    return tensors


def read_unchecked(folder: Path) -> dict[str, Tensor]:
    """All tensors of an adapter folder, by our names."""
    ours = {"prompt_embeddings": PREFIX}
    tensors = load_file(folder / WEIGHTS)
    return {ours.get(k, k.removeprefix("base_model.")): one for k, one in tensors.items()}


def count_labels(folder: Path) -> int:
    """The number of labels of an adapter that PEFT wrote."""
    with opened(folder) as file:
        return file.get_slice(stored_name("classifier.bias")).get_shape()[0]
