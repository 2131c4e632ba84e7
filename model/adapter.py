"""A tuned prefix on disk: a folder in PEFT's layout that holds what was learnt, both ways.

Format: PEFT 0.21 (https://github.com/huggingface/peft), PREFIX_TUNING with SEQ_CLS. Labels and
`max_seq_length`, which PEFT does not know, travel in a config.json beside, which it does not read.
P prefix tokens, W numbers that each holds, C classes, HD hidden size.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import BertConfig

from model.prefix_encoder import prefix_width
from model.sequence_classification import BertPrefixForSequenceClassification
from model.source import ADAPTER_CONFIG, ModelError, read_json

WEIGHTS = "adapter_model.safetensors"
PREFIX = "prefix_encoder.embedding.weight"
# PEFT's names for what is learnt -> ours.
NAMES = {
    "prompt_embeddings": PREFIX,
    "base_model.classifier.weight": "classifier.weight",
    "base_model.classifier.bias": "classifier.bias",
}
# PEFT knows no type of the second name and so refuses it.
PEFT_TYPES = {"all": "PREFIX_TUNING", "input": "INPUT_PREFIX"}
NOT_FOR_PEFT = (
    "PEFT cannot load a prefix of depth input: its prompt tuning reads the first virtual token "
    "where this model reads [CLS]"
)


def adapter_config(config: BertConfig, backbone: str) -> dict:
    """The content of adapter_config.json."""
    return {
        "base_model_name_or_path": backbone,
        "inference_mode": True,
        "modules_to_save": ["classifier", "score"],
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.pre_seq_len,
        "peft_type": PEFT_TYPES[config.prefix_depth],
        "prefix_projection": False,  # a reparametrised prefix is stored as its result
        "task_type": "SEQ_CLS",
        "token_dim": config.hidden_size,
    }


def read_config(folder: Path, config: BertConfig) -> BertConfig:
    """Complete a config by what a prefix folder says; of one that PEFT wrote also its classes.

    Raises: ModelError for another kind of adapter, or one of another backbone.
    """
    path = folder / ADAPTER_CONFIG
    found = read_json(path)
    depths = {kind: depth for depth, kind in PEFT_TYPES.items()}
    if found.get("peft_type") not in depths or found.get("task_type") != "SEQ_CLS":
        raise ModelError(
            f"{path}: peft_type {found.get('peft_type')} with task_type {found.get('task_type')}; "
            "only PREFIX_TUNING with SEQ_CLS is known"
        )
    config.pre_seq_len = found.get("num_virtual_tokens")
    if not (isinstance(config.pre_seq_len, int) and config.pre_seq_len > 0):
        raise ModelError(f"{path}: num_virtual_tokens is {config.pre_seq_len}")
    config.prefix_depth = depths[found["peft_type"]]
    config.prefix_projection = False
    wanted = adapter_config(config, "")
    for name in ("num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim"):
        if found.get(name) != wanted[name]:
            raise ModelError(
                f"{path}: {name} is {found.get(name)}, that of its backbone {wanted[name]}"
            )
    if not (folder / "config.json").is_file():
        with open_weights(folder) as file:
            config.num_labels = file.get_slice("base_model.classifier.bias").get_shape()[0]
    return config


def open_weights(folder: Path):
    """The tensors' file, opened. Raises: ModelError where it is not there or not as it should."""
    path = folder / WEIGHTS
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if strange := set(file.keys()).symmetric_difference(NAMES):
        raise ModelError(f"{path} does not hold just {', '.join(NAMES)}: {', '.join(strange)}")
    return file


def load(folder: Path, config: BertConfig, head: bool = True) -> dict[str, torch.Tensor]:
    """What was learnt, by our names: the prefix [P, W] and, where `head`, weight and bias.

    Raises: ModelError for a file that is unreadable, does not fit, or holds what is not finite.
    """
    shapes = {
        PREFIX: (config.pre_seq_len, prefix_width(config)),
        "classifier.weight": (config.num_labels, config.hidden_size),
        "classifier.bias": (config.num_labels,),
    }
    tensors = {}
    with open_weights(folder) as file:
        for name, ours in NAMES.items():
            tensor = file.get_tensor(name)
            if ours == PREFIX or head:
                tensors[ours] = tensor
                if tensor.shape != shapes[ours] or not tensor.isfinite().all():
                    raise ModelError(
                        f"{folder / WEIGHTS}: {name} does not fit its config: "
                        f"{list(tensor.shape)} should be {list(shapes[ours])}, all of it finite"
                    )
    return tensors


def save(model: BertPrefixForSequenceClassification, backbone: str, folder: Path) -> None:
    """Write what was learnt over `backbone`, and nothing of the backbone itself."""
    config = copy.deepcopy(model.config)
    config.prefix_projection = False
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(folder)
    with torch.no_grad():
        learnt = {PREFIX: model.prefix_encoder()}
    learnt |= dict(model.classifier.named_parameters("classifier"))
    tensors = {name: learnt[ours].detach().cpu().contiguous() for name, ours in NAMES.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings = adapter_config(config, backbone)
    if config.prefix_depth == "input":
        settings["note"] = NOT_FOR_PEFT
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
