"""What a run starts from: a backbone, a model folder or an adapter folder."""

import logging
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerBase

from model import adapter, loading
from model.loading import list_labels, read_config, read_shapes
from model.source import (
    AdapterSettings,
    Source,
    backbone_sha256,
    ensemble_folders,
    locate,
    sha256_of,
)
from model.tuning import POOLER, TUNING, TuningMethod, method_of
from runtime.file_format import FileFormat
from runtime.files import UserError, name_list, read_json
from runtime.flags import fill
from runtime.labels import label_key, label_numbers
from runtime.training_state import WEIGHT

logger = logging.getLogger(__name__)


class Start:
    """A backbone to tune, or a tuned model to use or tune further; its weights load in `build`."""

    labels_by_prefix: list[list[str]] | None = None  # with --prefix_paths
    started_from: str | None = None  # the tuned model that is tuned further
    fresh_head = False

    def __init__(self, args: Namespace) -> None:
        """Find the model and complete its config, except for the labels of a training file.

        Raises: UserError if the model does not exist or does not fit the arguments.
        """
        path = args.model_name_or_path
        self.source = locate(path)
        self.sources = [self.source]
        self.config, self.tuned_by = read_model_config(self.source)
        check_backbone(self.source, self.config)
        self.tuned_pooling = self.config.pooling
        if args.do_train:
            self.method = TUNING[args.tuning_method]
            self.method.configure(self.config, args, bool(self.tuned_by))
            if self.method.needs_backbone:
                self.describe_backbone(args.output_dir)
            self.title = self.method.title(self.config)
            self.config.problem_type = args.problem_type
        elif self.tuned_by:
            self.method, self.title = self.tuned_by, f"predictions of {path}"
            self.config.problem_type = loading.problem_type(self.config, args.problem_type, path)
        else:
            raise UserError(f"{path} is not tuned yet: use --do_train or a model or adapter folder")
        if args.do_train and self.tuned_by:
            self.started_from = path
            logger.warning("warning: %s was tuned before: texts it saw then count as unseen", path)
        virtual = self.method.virtual_tokens(self.config)
        loading.set_max_seq_length(self.config, virtual, args.max_seq_length)

    def describe_backbone(self, output_dir: str) -> None:
        """Store in an adapter's config by what it finds its backbone again.

        Raises: UserError if the backbone lacks the pooler that an adapter would read.
        """
        folder, pooler = self.source.backbone, f"{POOLER}dense.weight"
        if POOLER not in self.method.unread(self.config) and pooler not in read_shapes(folder):
            raise UserError(f"{folder} has no pooler for the head to read: pass --pooling mean")
        self.config.backbone_sha256 = backbone_sha256(folder)
        if os.path.isabs(self.source.name):  # a folder, not a name on the hub
            folder, start = self.source.name, os.path.realpath(output_dir)
            self.config.backbone_path = os.path.relpath(folder, start)

    def set_dropout(self, args: Namespace) -> None:
        """Set the dropout of a model to train."""
        self.config.hidden_dropout_prob = args.hidden_dropout_prob
        self.config.attention_probs_dropout_prob = args.attention_probs_dropout_prob
        self.config.classifier_dropout = None  # then the head uses hidden_dropout_prob

    @property
    def labels(self) -> list[str]:
        """The C labels, in the order of their numbers."""
        return list_labels(self.config)

    @property
    def multi_label(self) -> bool:
        """Whether a row may have several labels, or none."""
        return self.config.problem_type == "multi_label_classification"

    def set_labels(self, names: list[str]) -> None:
        """Set the labels to train on; a tuned model keeps its own if they include `names`."""
        known, folder, keys = self.labels, self.source.folder, {*map(label_key, names)}
        if self.tuned_by and keys - {*map(label_key, known)} and keys <= {*label_numbers(known)}:
            known = [str(number) for number in range(len(known))]
            logger.info("%s names no labels: using %s, in this order", folder, known)
        fits = self.tuned_by and self.tuned_pooling == self.config.pooling
        self.fresh_head = not (fits and keys <= {*map(label_key, known)})
        if self.fresh_head and self.tuned_by:
            message = (
                "warning: initialising a new head: the head of %s, for labels %s, does not fit"
            )
            logger.warning(message, folder, name_list(known))
        loading.set_labels(self.config, names if self.fresh_head else known)

    def settings(self, args: Namespace) -> dict:
        """Return all settings of the run, completed from the model's config."""
        given = vars(args)
        missing = [k for k, one in given.items() if one is None and hasattr(self.config, k)]
        return given | {name: getattr(self.config, name) for name in missing}

    def describe(self) -> dict:
        """Return the model's part of run.json."""
        return {
            "backbone": self.source.name,
            "weights_sha256": sha256_of([folder for one in self.sources for folder in one.folders]),
            "method": self.title,
            "library": self.method.library(self.config),
            "started_from": self.started_from,
        }

    def complete(
        self, form: FileFormat, args: Namespace, tokenizer: PreTrainedTokenizerBase
    ) -> FileFormat:
        """Return how to read a run's files, with what only the model knows; also sets it in `args`.

        That is whether a row may have several labels, and the separator between text columns.
        """
        fill(args, {"text_column_delimiter": loading.separator(tokenizer)})
        joined = args.text_column_delimiter
        return replace(form, multi_label=self.multi_label, text_column_delimiter=joined)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the backbone's tokenizer."""
        return loading.load_tokenizer(self.source, self.config)

    def build(self, args: Namespace) -> nn.Module:
        """Build the model, trainable and initialised with `args.seed`, or frozen to predict."""
        if not args.do_train:
            with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is
                return self.method.build(self.source, self.config).requires_grad_(False)
        torch.manual_seed(args.seed)
        model = self.method.build(self.source, self.config, self.fresh_head)
        if args.gradient_checkpointing:
            model.bert.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def count(self, model: nn.Module) -> dict[str, int]:
        """Count the model's parameters and log them."""
        counts = count_parameters(model)
        shown = [f"{counts[f'{k}_parameters']:,} {k}" for k in ("trainable", "total", "stored")]
        logger.info("parameters: %s", ", ".join(shown))
        return counts

    def save(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Write the tuned model into an existing folder."""
        self.method.save(model, tokenizer, self.source, folder)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count trainable, total and stored parameters; `..._without_head` leaves out the classifier.

    As is customary, all word embeddings count as trainable if any are, although words that occur in
    no training text keep their embeddings.
    """
    parameters, method = dict(model.named_parameters()), method_of(model.config)
    counted = {
        "trainable": {name: one for name, one in parameters.items() if one.requires_grad},
        "total": parameters,
        "stored": method.tensors(model),
    }
    counts = {}
    for kind, tensors in counted.items():
        sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        head = sum(size for name, size in sizes.items() if method.is_head(name))
        counts[f"{kind}_parameters"] = sum(sizes.values())
        counts[f"{kind}_parameters_without_head"] = sum(sizes.values()) - head
    return counts


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a model or adapter folder, by their checkpoint names; unchecked."""
    if members := ensemble_folders(folder):
        each = [adapter.read_unchecked(Path(member)) for member in members]
        tensors = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    elif (folder / adapter.WEIGHTS).exists():
        tensors = adapter.read_unchecked(folder)
    else:
        tensors = load_file(folder / "model.safetensors")
    return {WEIGHT + name: tensor for name, tensor in tensors.items()}


def read_model_config(source: Source) -> tuple[BertConfig, TuningMethod | None]:
    """Read a model's config and its tuning method, which is None for a plain backbone.

    Raises: UserError if it is not a BERT, or an adapter of an unknown kind or for another backbone.
    """
    if source.adapter is None:
        config = read_config(source.backbone)
        config.tuning_method, config.pooling = "full", getattr(config, "pooling", "cls")
        return config, TUNING["full"] if config.architectures == loading.TUNED else None
    path = source.adapter / adapter.ADAPTER_CONFIG
    settings = read_json(path, AdapterSettings)
    methods = {peft_type: one for one in TUNING.values() for peft_type in one.peft_types}
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if task != "SEQ_CLS" or kind not in methods:
        raise UserError(
            f"{path}: peft_type {kind} with task_type {task}; only {', '.join(methods)} with "
            "SEQ_CLS can be loaded"
        )
    written_by_peft = not (source.adapter / "config.json").is_file()
    if written_by_peft and kind != "PREFIX_TUNING":
        raise UserError(f"{source.adapter} lacks config.json, which stores its labels")
    config = read_config(source.backbone if written_by_peft else source.adapter)
    config.tuning_method = methods[kind].name
    config.pooling = getattr(config, "pooling", methods[kind].pooling)
    methods[kind].read_settings(config, settings, path)
    if written_by_peft:  # PEFT stores no labels
        config.num_labels = adapter.count_labels(source.adapter)
    return config, methods[kind]


def check_backbone(source: Source, config: BertConfig, checksum: str | None = None) -> None:
    """Check that an adapter's backbone is the one that it was tuned on, if it stores the checksum.

    checksum: the backbone's, if it is known. Raises: UserError.
    """
    expected = getattr(config, "backbone_sha256", None)
    if source.adapter and expected and expected != (checksum or backbone_sha256(source.backbone)):
        raise UserError(
            f"{source.adapter} was tuned on another {source.name}: its weights or "
            "tokenizer have changed since; restore them, or tune again"
        )
