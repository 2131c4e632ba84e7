"""Load and check the config, tokenizer and weights of a BERT."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from model.sequence_classification import BertForSequenceClassification
from model.source import Source
from runtime.files import UserError, read_json

# Silence warnings about missing and unexpected weights: they are checked below.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

TUNED = ["BertForSequenceClassification"]  # `architectures` of a model with a head


def read_config(folder: Path) -> BertConfig:
    """Read the config of a BERT. Raises: UserError if it is invalid or for another model type."""
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != "bert":
        raise UserError(
            f"{folder} has a model of type '{settings.get('model_type')}': only 'bert' is supported"
        )
    try:
        return BertConfig.from_pretrained(folder)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.json'} is not a valid BERT config: {reason}") from None


def list_labels(config: BertConfig) -> list[str]:
    """Return the C labels in the order of their numbers; config.json sorts its keys as text."""
    return [config.id2label[number] for number in range(config.num_labels)]


def set_labels(config: BertConfig, names: list[str]) -> None:
    """Store the labels in a config, numbered in this order."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def problem_type(config: BertConfig, wanted: str | None) -> str:
    """Return the problem type a model was tuned for. Raises: UserError if another is wanted."""
    kind = config.problem_type or wanted or "single_label_classification"
    if wanted and wanted != kind:
        raise UserError(f"--problem_type {wanted}: the model was tuned for {kind}")
    return kind


def set_max_seq_length(config: BertConfig, virtual: int, wanted: int | None) -> None:
    """Set the maximum text length in tokens: `wanted`, or the tuned model's, or 128.

    Raises: UserError if `virtual` tokens and text together exceed the position embeddings.
    """
    length = wanted or getattr(config, "max_seq_length", None) or 128
    if virtual + length > config.max_position_embeddings:
        raise UserError(
            f"--pre_seq_len {virtual} + --max_seq_length {length} exceeds the "
            f"{config.max_position_embeddings} positions of the backbone: lower one of them"
        )
    config.max_seq_length = length


def load_tokenizer(source: Source, config: BertConfig) -> PreTrainedTokenizerBase:
    """Load the backbone's fast tokenizer. Raises: UserError if it does not fit the model."""
    if not any((source.backbone / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        # transformers would build a tokenizer that knows only the special tokens
        raise UserError(f"{source.backbone} has no tokenizer.json or vocab.txt")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.backbone, use_fast=True)
    except Exception as error:  # tokenizers has no narrower exception
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{source.backbone} has no usable tokenizer: {first}") from None
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{source.backbone}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{config.vocab_size} embeddings: they do not belong together"
        )
    tokenizer.model_max_length = config.max_seq_length
    return tokenizer


def load_weights(
    cls: type, folder: Path, config: BertConfig, new: tuple[str, ...] = ()
) -> BertForSequenceClassification:
    """Build a `cls` with the weights in `folder`.

    new: parameters whose names start with one of these may be missing; they are drawn from torch's
    generator, normal with the backbone's initializer_range.

    Raises: UserError if other weights are missing, have the wrong shape, are not finite or are not
        in safetensors.
    """
    try:
        model, report = cls.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # checked below, with the missing ones
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} has no usable model.safetensors: {first}") from None
    fresh = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    lost = [key for key in fresh if not key.startswith(new)]
    if lost:
        raise UserError(
            f"{folder} lacks {len(lost)} of the weights, or has them in other shapes: "
            f"{', '.join(lost[:5])}; is this a model folder?"
        )
    if not new and report["unexpected_keys"]:
        raise UserError(
            f"{folder} has weights that do not belong to a classifier: "
            f"{', '.join(sorted(report['unexpected_keys'])[:5])}"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{folder}: {name} has values that are not finite: the model is broken")
    return model
