"""Build, load and save a model; count its parameters.

A tuned folder is one of two: a full one in the standard layout of transformers, or a prefix one
in PEFT's layout, which holds what was learnt and the name of its backbone.
"""

import logging
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, BertConfig
from transformers.utils import logging as transformers_logging

from model import adapter
from model.prefix_encoder import activations, prefix_width
from model.sequence_classification import (
    BertForSequenceClassification,
    BertPrefixForSequenceClassification,
    WordsInUse,
)
from model.source import ModelError, Source, read_json

# Which weights are missing or new is checked below, and an error where it should be.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

HEAD = "classifier."
TUNED = ["BertForSequenceClassification"]  # `architectures` of a model that has a head

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------- config, tokenizer


def load_config(source: Source, tuned: bool) -> BertConfig:
    """The model's settings.

    Raises: ModelError for what is not a BERT, and where `tuned` for a model without a head.
    """
    folder = source.backbone
    if source.adapter and (source.adapter / "config.json").is_file():  # PEFT itself writes none
        folder = source.adapter
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != "bert":
        raise ModelError(
            f"{folder} holds a model of type '{settings.get('model_type')}': only 'bert' is known"
        )
    if tuned and not source.adapter and settings.get("architectures") != TUNED:
        raise ModelError(f"{source.name} is not tuned yet: give --do_train or a tuned folder")
    try:
        config = BertConfig.from_pretrained(folder)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder / 'config.json'} is not a BERT's: {reason}") from None
    return adapter.read_config(source.adapter, config) if source.adapter else config


def task_of(config: BertConfig, wanted: str | None) -> str:
    """The kind of problem that a model was tuned for. Raises ModelError where not as `wanted`."""
    kind = config.problem_type or wanted or "single_label_classification"
    if wanted and wanted != kind:
        raise ModelError(f"--problem_type {wanted}: the model was tuned for {kind}")
    return kind


def describe_task(source: Source, config: BertConfig, names: list[str], args: Namespace) -> bool:
    """Write into a config what is to be tuned: labels, kind of problem, prefix, dropout.

    names: the training file's labels. A tuned model goes on with its own labels and head where
    they cover `names`. Returns whether the head starts anew.
    """
    known = list_labels(config)
    tuned = is_tuned(source, config)
    unnamed = known == [f"LABEL_{number}" for number in range(len(known))]
    if tuned and unnamed and len(known) == len(names):
        logger.info("%s names no labels: they are %s, in this order", source.folder, names)
        known = names
    fresh = not (tuned and set(names) <= set(known))
    if fresh and tuned:
        logger.warning(
            "warning: %s tells %s apart and the training file %s: the head starts anew",
            source.folder, ", ".join(known), ", ".join(names),
        )  # fmt: skip
    set_labels(config, names if fresh else known)
    config.problem_type = args.problem_type
    if args.prefix:  # a tuned prefix goes on as it is, and args say so
        given, taken = (config, args) if source.adapter else (args, config)
        for name in ("pre_seq_len", "prefix_depth", "prefix_projection"):
            setattr(taken, name, getattr(given, name))
        config.prefix_hidden_size = args.prefix_hidden_size
    config.hidden_dropout_prob = args.hidden_dropout_prob
    config.attention_probs_dropout_prob = args.attention_probs_dropout_prob
    config.classifier_dropout = None  # that of hidden layers before the head too
    return fresh


def is_tuned(source: Source, config: BertConfig) -> bool:
    """Whether it is the folder of a tuned model, which has a head, and no mere backbone."""
    return bool(source.adapter) or config.architectures == TUNED


def list_labels(config: BertConfig) -> list[str]:
    """The C labels by number; config.json sorts its keys as text."""
    return [config.id2label[number] for number in range(config.num_labels)]


def set_labels(config: BertConfig, names: list[str]) -> None:
    """Number the labels in this order."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def set_max_seq_length(config: BertConfig, wanted: int | None, default: int = 128) -> int:
    """Decide the longest text, in tokens: what is wanted, else what the model was tuned with.

    Raises: ModelError where prefix and text together exceed the position embeddings.
    """
    prefix = getattr(config, "pre_seq_len", 0)
    length = wanted or getattr(config, "max_seq_length", None) or default
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
    except Exception as error:  # tokenizers raises no narrower one
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
    if not new and report["unexpected_keys"]:
        raise ModelError(
            f"{source.backbone} holds weights that no classifier has: "
            f"{', '.join(sorted(report['unexpected_keys'])[:5])}"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ModelError(f"{source.backbone}: {name} is not finite: the model is broken")
    return model


def build_model(
    source: Source, config: BertConfig, fresh_head: bool = True
) -> BertForSequenceClassification:
    """A model to be tuned: with a prefix where the config has a `pre_seq_len`.

    What is new is drawn from torch's generator, normal with the backbone's initializer_range.
    """
    tuned = config.architectures == TUNED
    new = (HEAD,) if fresh_head or source.adapter else ()
    if hasattr(config, "pre_seq_len"):
        new += ("prefix_encoder.",)
        model = load_weights(BertPrefixForSequenceClassification, source, config, new)
        model.bert.requires_grad_(False)  # here, since from_pretrained makes new parameters
    else:
        new += () if tuned else ("bert.pooler.",)
        model = load_weights(BertForSequenceClassification, source, config, new)
    if fresh_head and tuned:  # else there was none to load
        torch.nn.init.normal_(model.classifier.weight, std=config.initializer_range)
        torch.nn.init.zeros_(model.classifier.bias)
    if source.adapter:
        put(model, adapter.load(source.adapter, config, head=not fresh_head))
    return model


def make_model(
    source: Source, config: BertConfig, args: Namespace, fresh_head: bool
) -> BertForSequenceClassification:
    """The model of a run: to be tuned, or tuned already."""
    if not args.do_train:
        return load_model(source, config)
    torch.manual_seed(args.seed)
    model = build_model(source, config, fresh_head)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load_model(source: Source, config: BertConfig) -> BertForSequenceClassification:
    """A tuned model, full or prefix, all of it frozen."""
    if source.adapter is None:
        model = load_weights(BertForSequenceClassification, source, config, ())
    else:
        model = build_model(source, config, fresh_head=False)
    return model.requires_grad_(False)


def tune_words_in_use(model: BertForSequenceClassification, token_ids: list[list[int]]) -> None:
    """Where word embeddings are tuned, tune only those of the words in these texts."""
    table = model.get_input_embeddings()
    if table.weight.requires_grad:
        words = torch.from_numpy(np.unique(np.concatenate(token_ids))).to(table.weight.device)
        model.set_input_embeddings(WordsInUse(table, words))


def put(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into the parameters of their names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)


def start_from_text(model: BertPrefixForSequenceClassification, tokenizer, text: str) -> None:
    """Start a prefix from what the backbone makes of real words, repeated to its length P.

    Raises: ModelError where the text has no words.
    """
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not words:
        raise ModelError(f"--prefix_init_text '{text}' holds no word")
    words = torch.from_numpy(np.resize(words, model.config.pre_seq_len)).to(model.device)
    if model.config.prefix_depth == "input":
        flat = model.get_input_embeddings()(words)
    else:
        flat = activations(model.bert, words)
    put(model, {adapter.PREFIX: flat})


def save_model(
    model: BertForSequenceClassification, tokenizer, source: Source, folder: Path
) -> None:
    """Write a tuned model: all of it, or of a prefix only what was learnt."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, BertPrefixForSequenceClassification):
        adapter.save(model, source.name, folder)
    else:
        model.save_pretrained(folder)
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # tokenizers raises no narrower one where the disk is full
            raise OSError(str(error)) from None


# -------------------------------------------------------------------------------------- counts


def count_parameters(model: BertForSequenceClassification) -> dict[str, int]:
    """Numbers that are tuned, held and stored; `..._without_head` leaves out the classifier.

    As is the custom, all word embeddings count as tuned where they may move, though those of words
    that no training text holds stay as they are.
    """

    def size(parameters: Iterable[torch.nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    def tuned(module: torch.nn.Module) -> int:
        return size(p for p in module.parameters() if p.requires_grad)

    head, total = size(model.classifier.parameters()), size(model.parameters())
    stored = total
    if isinstance(model, BertPrefixForSequenceClassification):
        stored = model.config.pre_seq_len * prefix_width(model.config) + head
    counts = {  # a model that only predicts tunes nothing, nor its head
        "trainable": (tuned(model), tuned(model.classifier)),
        "total": (total, head),
        "stored": (stored, head),
    }
    return {
        **{f"{name}_parameters": count for name, (count, _) in counts.items()},
        **{f"{name}_parameters_without_head": count - its for name, (count, its) in counts.items()},
    }
