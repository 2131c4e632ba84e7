"""The one door to a model: `new_model` to train one, `open_model` to predict with a tuned one.

Both read and check what is small (config, labels, tokenizer); weights load in `ModelSource.build`.
C classes, K prefixes, HD hidden size.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerBase

from model import adapter, loading
from model.folders import (
    ADAPTER_CONFIG,
    AdapterSettings,
    ModelFolders,
    backbone_sha256,
    ensemble_folders,
    locate,
    sha256_of,
)
from model.loading import list_labels, read_config, read_shapes
from model.methods import TUNING, method_of
from model.prefix_bank import UNKNOWN, PrefixBank, TunedPrefix
from model.prefix_tuning import read_prefix
from model.tuning import POOLER, AdapterMethod, TuningMethod
from runtime.file_format import MULTI_LABEL, FileFormat
from runtime.files import UserError, name_list, read_json
from runtime.flags import fill
from runtime.labels import label_key, label_numbers
from runtime.training_state import WEIGHT

logger = logging.getLogger(__name__)


class ModelSource:
    """A BERT to train, or a tuned model to predict with, before its weights are loaded."""

    labels_by_prefix: list[list[str]] | None = None  # if each row names its prefix
    started_from: str | None = None  # the tuned model that is tuned further
    tuned_pooling: str | None = None  # of that model's head
    fresh_head = False

    def __init__(
        self,
        folders: list[ModelFolders],
        config: BertConfig,
        method: TuningMethod,
        title: str,
        configs: Sequence[BertConfig] = (),
    ) -> None:
        """folders: one, or those of K prefixes, with their `configs`; config: with all labels."""
        self.folders, self.config, self.method, self.title = folders, config, method, title
        self.configs = configs

    @property
    def name(self) -> str:
        """The backbone's name, as recorded in run.json."""
        return self.folders[0].name

    @property
    def labels(self) -> list[str]:
        """The C labels, in the order of their numbers."""
        return list_labels(self.config)

    @property
    def multi_label(self) -> bool:
        """Whether a row may have several labels, or none."""
        return self.config.problem_type == MULTI_LABEL

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer."""
        return loading.load_tokenizer(self.folders[0].backbone, self.config)

    def complete(self, form: FileFormat, settings: dict[str, Any]) -> FileFormat:
        """Return how to read a run's files, with what only the model knows; also sets it there.

        That is whether a row may have several labels, and the separator between text columns.
        """
        fill(settings, {"text_column_delimiter": loading.separator(self.tokenizer)})
        joined = settings["text_column_delimiter"]
        return replace(form, multi_label=self.multi_label, text_column_delimiter=joined)

    def remember_backbone(self, output_dir: str) -> None:
        """Store in an adapter's config by what it finds its backbone again.

        Raises: UserError if the backbone lacks the pooler that an adapter would read.
        """
        folder, pooler = self.folders[0].backbone, f"{POOLER}dense.weight"
        if POOLER not in self.method.unread(self.config) and pooler not in read_shapes(folder):
            raise UserError(f"{folder} has no pooler for the head to read: pass --pooling mean")
        self.config.backbone_sha256 = backbone_sha256(folder)
        if os.path.isabs(self.name):  # a folder, not a name on the hub
            self.config.backbone_path = os.path.relpath(self.name, os.path.realpath(output_dir))

    def set_dropout(self, hidden: float, attention: float) -> None:
        """Set the dropout of a model to train."""
        self.config.hidden_dropout_prob = hidden
        self.config.attention_probs_dropout_prob = attention
        self.config.classifier_dropout = None  # then the head uses hidden_dropout_prob

    def set_labels(self, names: list[str]) -> None:
        """Set the labels to train on; a tuned model keeps its own if they include `names`."""
        known, folder, keys = self.labels, self.folders[0].folder, {*map(label_key, names)}
        if (
            self.started_from
            and keys - {*map(label_key, known)}
            and keys <= {*label_numbers(known)}
        ):
            known = [str(number) for number in range(len(known))]
            logger.info("%s names no labels: using %s, in this order", folder, known)
        fits = self.tuned_pooling == self.config.pooling
        self.fresh_head = not (fits and keys <= {*map(label_key, known)})
        if self.fresh_head and self.started_from:
            message = "warning: initialising a new head: that of %s, for labels %s, does not fit"
            logger.warning(message, folder, name_list(known))
        loading.set_labels(self.config, names if self.fresh_head else known)

    def settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return all settings of a run, completed from the model's config."""
        unset = [k for k, value in settings.items() if value is None and hasattr(self.config, k)]
        return settings | {name: getattr(self.config, name) for name in unset}

    def describe(self) -> dict:
        """Return the model's part of run.json."""
        return {
            "backbone": self.name,
            "weights_sha256": sha256_of([path for folders in self.folders for path in folders.all]),
            "method": self.title,
            "library": self.method.library(self.config),
            "started_from": self.started_from,
        }

    def build(self) -> nn.Module:
        """Load the model, frozen, to predict with; the caller's generator stays as it is."""
        with torch.random.fork_rng(devices=[]):
            if not self.configs:
                return self.method.build(self.folders[0], self.config).requires_grad_(False)
            bert = self.method.build(self.folders[0], self.configs[0]).bert
            bank = PrefixBank.from_tuned(bert, self.config, self.read_prefixes())
            return bank.requires_grad_(False).eval()

    def read_prefixes(self) -> list[TunedPrefix]:
        """Read K prefixes, with heads for the labels of all of them."""
        found = []
        for folders, config in zip(self.folders, self.configs, strict=True):
            prefix = read_prefix(folders.adapter, config)
            columns = [self.labels.index(name) for name in list_labels(config)]
            weight = torch.zeros(len(self.labels), config.hidden_size)
            bias = torch.full(weight.shape[:1], UNKNOWN)
            weight[columns], bias[columns] = prefix.weight, prefix.bias
            found.append(TunedPrefix(prefix.slots, weight, bias))
        return found

    def build_trainable(self, seed: int, gradient_checkpointing: bool = False) -> nn.Module:
        """Load the model to train; new parameters are drawn with `seed`."""
        torch.manual_seed(seed)
        model = self.method.build(self.folders[0], self.config, self.fresh_head)
        if gradient_checkpointing:
            model.bert.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def count(self, model: nn.Module) -> dict[str, int]:
        """Count the parameters of the model, and log them."""
        if self.configs:
            logger.info("%d tuned prefixes on one backbone", len(self.folders))
            return {}
        counts = count_parameters(model)
        shown = [f"{counts[f'{k}_parameters']:,} {k}" for k in ("trainable", "total", "stored")]
        logger.info("parameters: %s", ", ".join(shown))
        return counts

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the tuned model into an existing folder. Raises: OSError if the disk is full."""
        self.method.save(model, self.tokenizer, self.folders[0], folder)


def new_model(settings: dict[str, Any]) -> ModelSource:
    """Return the backbone or the tuned model that a run with these settings trains.

    Raises: UserError if it does not exist or does not fit the settings.
    """
    path = settings["model_name_or_path"]
    if members := ensemble_folders(Path(path)):
        raise UserError(
            f"{path} contains {len(members)} prefixes, which cannot be tuned further together: "
            f"pass one of them, such as {members[0]}"
        )
    folders = locate(path)
    config, tuned_by = read_model_config(folders)
    method, pooling = TUNING[settings["tuning_method"]], config.pooling
    method.configure(config, settings, bool(tuned_by))
    source = ModelSource([folders], config, method, method.title(config))
    if method.needs_backbone:
        source.remember_backbone(settings["output_dir"])
    config.problem_type = settings["problem_type"]
    if tuned_by:
        source.started_from, source.tuned_pooling = path, pooling
        logger.warning("warning: %s was tuned before: texts it saw then count as unseen", path)
    loading.set_max_seq_length(config, method.virtual_tokens(config), settings["max_seq_length"])
    return source


def open_model(
    paths: str | Sequence[str],
    max_seq_length: int | None = None,
    problem_type: str | None = None,
    by_row: bool = False,
) -> ModelSource:
    """Return a tuned model: a model or adapter folder, one of several prefixes, or a list of these.

    Several prefixes are averaged; they must have the same labels, unless each row names its own
    (`by_row`). Raises: UserError if a folder is not usable, or if they do not fit together.
    """
    members, is_bank = [], not isinstance(paths, str)
    for path in paths if is_bank else [paths]:
        inside = ensemble_folders(Path(path))
        if inside and by_row:
            raise UserError(f"{path} has several prefixes: --prefix_column needs one of them")
        is_bank |= bool(inside)
        members += inside or [path]
    opened = [open_folder(path, max_seq_length, problem_type) for path in members]
    folders, configs, methods = map(list, zip(*opened, strict=True))
    title = f"predictions of {', '.join(members)}"
    if not is_bank:
        return ModelSource(folders, configs[0], methods[0], title)
    check_alike(members, folders, configs, by_row)
    merged = BertConfig.from_dict(configs[0].to_dict())
    labels = [list_labels(config) for config in configs]
    loading.set_labels(merged, list(dict.fromkeys(name for names in labels for name in names)))
    merged.pre_seq_len = max(config.pre_seq_len for config in configs)
    source = ModelSource(folders, merged, methods[0], title, configs)
    source.labels_by_prefix = labels if by_row else None
    return source


def open_folder(
    path: str, max_seq_length: int | None, problem_type: str | None
) -> tuple[ModelFolders, BertConfig, TuningMethod]:
    """Open one tuned model. Raises: UserError if it is not tuned or not usable."""
    folders = locate(path)
    config, method = read_model_config(folders)
    if method is None:
        raise UserError(f"{path} is not tuned yet: use --do_train or a model or adapter folder")
    config.problem_type = loading.problem_type(config, problem_type, path)
    loading.set_max_seq_length(config, method.virtual_tokens(config), max_seq_length)
    return folders, config, method


def check_alike(
    paths: list[str], folders: list[ModelFolders], configs: list[BertConfig], by_row: bool
) -> None:
    """Check that prefixes fit together. Raises: UserError naming a folder that does not fit."""
    names = ("problem_type", "max_seq_length", "pooling")
    traits = [
        {"backbone": folder.backbone} | {name: getattr(config, name) for name in names}
        for folder, config in zip(folders, configs, strict=True)
    ]
    for path, config, trait in zip(paths, configs, traits, strict=True):
        if not method_of(config).fits_bank(config):
            raise UserError(f"--prefix_paths: {path} is not a prefix of depth all")
        for name, value in trait.items():
            if value != traits[0][name]:
                raise UserError(
                    f"--prefix_paths: {name} of {path} is {value}, but in {paths[0]} it is "
                    f"{traits[0][name]}"
                )
        if not by_row and {*list_labels(config)} != {*list_labels(configs[0])}:
            raise UserError(
                f"--prefix_paths: {path} has other labels than {paths[0]}, so they cannot be "
                "averaged: pass --prefix_column, or prefixes for one task"
            )


def read_model_config(folders: ModelFolders) -> tuple[BertConfig, TuningMethod | None]:
    """Read a model's config and its tuning method, which is None for a plain backbone.

    Raises: UserError if it is not a BERT, or an adapter of an unknown kind or for another backbone.
    """
    if folders.adapter is None:
        config = read_config(folders.backbone)
        config.tuning_method, config.pooling = "full", getattr(config, "pooling", "cls")
        return config, TUNING["full"] if config.architectures == loading.TUNED else None
    path = folders.adapter / ADAPTER_CONFIG
    settings = read_json(path, AdapterSettings)
    adapters = [method for method in TUNING.values() if isinstance(method, AdapterMethod)]
    methods = {kind: method for method in adapters for kind in method.peft_types}
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if task != "SEQ_CLS" or kind not in methods:
        raise UserError(
            f"{path}: peft_type {kind} with task_type {task}; only {', '.join(methods)} with "
            "SEQ_CLS can be loaded"
        )
    method = methods[kind]
    written_by_peft = not (folders.adapter / "config.json").is_file()
    if written_by_peft and kind not in method.of_peft:
        raise UserError(f"{folders.adapter} lacks config.json, which stores its labels")
    config = read_config(folders.backbone if written_by_peft else folders.adapter)
    config.tuning_method = method.name
    config.pooling = getattr(config, "pooling", method.pooling)
    method.read_settings(config, settings | read_json(path, method.Settings), path)
    if written_by_peft:  # PEFT stores no labels
        config.num_labels = adapter.count_labels(folders.adapter)
    expected = getattr(config, "backbone_sha256", None)
    if expected and expected != backbone_sha256(folders.backbone):
        raise UserError(
            f"{folders.adapter} was tuned on another {folders.name}: its weights or tokenizer have "
            "changed since; restore them, or tune again"
        )
    return config, method


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count trainable, total and stored parameters; `..._without_head` leaves out the classifier.

    As is customary, all word embeddings count as trainable if any are, although words that occur in
    no training text keep their embeddings.
    """
    parameters, method = dict(model.named_parameters()), method_of(model.config)
    counted = {
        "trainable": {name: tensor for name, tensor in parameters.items() if tensor.requires_grad},
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
        read = [adapter.read_unchecked(Path(member)) for member in members]
        tensors = {name: torch.stack([tensors[name] for tensors in read]) for name in read[0]}
    elif (folder / adapter.WEIGHTS).exists():
        tensors = adapter.read_unchecked(folder)
    else:
        tensors = load_file(folder / "model.safetensors")
    return {WEIGHT + name: tensor for name, tensor in tensors.items()}
