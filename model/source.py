"""The one door to a model: `new_model` to train one, `open_model` to predict with a tuned one.

Both read and check what is small (config, labels, tokenizer); weights load in `ModelSource.build`.
C classes, K prefixes, HD hidden size.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerBase

from model import adapter, loading
from model.engine import ready
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
from model.tuning import POOLER, TuningMethod
from runtime.file_format import FileFormat
from runtime.files import UserError, name_list, read_json
from runtime.flags import MULTI_LABEL, SINGLE_LABEL, fill
from runtime.labels import label_key, label_numbers
from runtime.machine import Machine
from runtime.training_state import WEIGHT

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ModelSource:
    """A BERT to train, or a tuned model to predict with, before its weights are loaded."""

    folders: list[ModelFolders]  # of one model, or of K prefixes
    configs: list[BertConfig]  # as many
    config: BertConfig  # the only one or, for K prefixes, one with the labels of all
    method: TuningMethod
    title: str  # in reports
    is_bank: bool = False  # whether it is K prefixes, possibly a single one
    started_from: str | None = None  # the tuned model that is tuned further
    tuned_pooling: str = ""  # of that model's head
    fresh_head: bool = False

    @property
    def name(self) -> str:
        """The backbone's name, as recorded in run.json."""
        return self.folders[0].name

    @property
    def labels(self) -> list[str]:
        """The C labels, in the order of their numbers."""
        return list_labels(self.config)

    @property
    def labels_by_prefix(self) -> list[list[str]]:
        """The labels of each of the K prefixes."""
        return [list_labels(config) for config in self.configs]

    @property
    def multi_label(self) -> bool:
        """Whether a row may have several labels, or none."""
        return self.config.problem_type == MULTI_LABEL

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer."""
        return loading.load_tokenizer(self.folders[0].backbone, self.config)

    def complete(self, form: FileFormat, settings: dict[str, Any]) -> FileFormat:
        """Return how to read a run's files, with what only the model knows; also sets it there."""
        fill(settings, {"text_column_delimiter": loading.separator(self.tokenizer)})
        joined = settings["text_column_delimiter"]
        return replace(form, multi_label=self.multi_label, text_column_delimiter=joined)

    def settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return all settings of a run, completed from the model's config."""
        unset = [name for name, value in settings.items() if value is None]
        return settings | {name: getattr(self.config, name, None) for name in unset}

    def describe(self) -> dict:
        """Return the model's part of run.json."""
        return {
            "backbone": self.name,
            "weights_sha256": sha256_of([path for folders in self.folders for path in folders.all]),
            "method": self.title,
            "library": self.method.library(self.config),
            "started_from": self.started_from,
        }

    def set_dropout(self, hidden: float, attention: float) -> None:
        """Set the dropout of a model to train."""
        self.config.hidden_dropout_prob = hidden
        self.config.attention_probs_dropout_prob = attention
        self.config.classifier_dropout = None  # then the head uses hidden_dropout_prob

    def set_labels(self, names: list[str]) -> None:
        """Set the labels to train on; a tuned model keeps its own if they include `names`."""
        self.fresh_head = True
        if self.started_from:
            known, keys, folder = self.labels, {*map(label_key, names)}, self.started_from
            if not keys <= {*map(label_key, known)} and keys <= {*label_numbers(known)}:
                known = [str(number) for number in range(len(known))]
                logger.info("%s names no labels: using %s, in this order", folder, known)
            why = ""
            if self.tuned_pooling != self.config.pooling:
                why = f"--pooling {self.tuned_pooling}"
            elif not keys <= {*map(label_key, known)}:
                why = f"labels {name_list(known)}"
            self.fresh_head = bool(why)
            names = names if why else known
            if why:
                message = "warning: initialising a new head: that of %s, for %s, does not fit"
                logger.warning(message, folder, why)
        loading.set_labels(self.config, names)

    def build(self) -> nn.Module:
        """Load the model, frozen, to predict with; the caller's generator stays as it is."""
        with torch.random.fork_rng(devices=[]):
            model = self.method.build(self.folders[0], self.configs[0])
        if self.is_bank:
            model = PrefixBank.from_tuned(model.bert, self.config, self.read_prefixes()).eval()
        return model.requires_grad_(False)

    def place(self, model: nn.Module, machine: Machine) -> nn.Module:
        """Place a model on a machine to predict with; returns it, or its form for the engine."""
        fits_bank = self.method.fits_bank(self.config)
        if machine.engine != "torch" and fits_bank and not self.is_bank:
            tuned, rounded_to = self.read_prefixes(), machine.dtype  # as a server, which it equals
            model = PrefixBank.from_tuned(model.bert, self.config, tuned, rounded_to).eval()
        model.bert = ready(model.bert, machine, self.config.pooling, fits_bank)
        machine.place(model)
        return model

    def read_prefixes(self) -> list[TunedPrefix]:
        """Read K prefixes, with heads for the labels of all of them."""
        prefixes = []
        for folders, config in zip(self.folders, self.configs, strict=True):
            prefix = read_prefix(folders.adapter, config)
            columns = [self.labels.index(name) for name in list_labels(config)]
            weight = torch.zeros(len(self.labels), config.hidden_size)
            bias = torch.full(weight.shape[:1], UNKNOWN)
            weight[columns], bias[columns] = prefix.weight, prefix.bias
            prefixes.append(TunedPrefix(prefix.slots, weight, bias))
        return prefixes

    def build_trainable(self, seed: int, gradient_checkpointing: bool = False) -> nn.Module:
        """Load the model to train; new parameters are drawn with `seed`."""
        torch.manual_seed(seed)
        model = self.method.build(self.folders[0], self.config, self.fresh_head)
        if gradient_checkpointing:
            model.bert.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def count(self, model: nn.Module) -> dict[str, int]:
        """Count and log trainable, total and stored parameters, with and without the head.

        As is customary, all word embeddings count as trainable if any are, although words that
        occur in no training text keep their embeddings. A bank of tuned prefixes is not counted.
        """
        if self.is_bank:
            return {}
        parameters, counts = dict(model.named_parameters()), {}
        trainable = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
        tensors = {
            "trainable": trainable,
            "total": parameters,
            "stored": self.method.tensors(model),
        }
        for kind, counted in tensors.items():
            sizes = {name: tensor.numel() for name, tensor in counted.items()}
            head = sum(size for name, size in sizes.items() if self.method.is_head(name))
            counts[f"{kind}_parameters"] = sum(sizes.values())
            counts[f"{kind}_parameters_without_head"] = sum(sizes.values()) - head
        shown = [f"{counts[f'{kind}_parameters']:,} {kind}" for kind in tensors]
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
    if method.needs_backbone:  # an adapter finds its backbone again by these entries
        weights, output_dir = folders.backbone / loading.WEIGHTS, settings["output_dir"]
        reads_pooler = POOLER not in method.unread(config)
        if reads_pooler and f"{POOLER}dense.weight" not in read_shapes(weights):
            raise UserError(
                f"{folders.backbone} has no pooler for the head to read: pass another pooling, "
                "such as --pooling mean"
            )
        config.backbone_sha256 = backbone_sha256(folders.backbone)
        if os.path.isabs(folders.name):  # a folder, not a name on the hub
            config.backbone_path = os.path.relpath(folders.name, os.path.realpath(output_dir))
    config.problem_type = settings["problem_type"]
    loading.set_max_seq_length(config, settings["max_seq_length"])
    if tuned_by:
        logger.warning("warning: %s was tuned before: texts it saw then count as unseen", path)
    started = {"started_from": path if tuned_by else None, "tuned_pooling": pooling}
    return ModelSource([folders], [config], config, method, method.title(config), **started)


def open_model(
    paths: str | Sequence[str],
    max_seq_length: int | None = None,
    problem_type: str | None = None,
    by_row: bool = False,
) -> ModelSource:
    """Return a tuned model: of a model or adapter folder, of a folder that contains several
    prefixes, or of a list of adapter folders of prefixes.

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
    config = configs[0]
    if is_bank:
        check_alike(members, folders, configs, by_row)
        config = BertConfig.from_dict(config.to_dict())
        labels = (name for member in configs for name in list_labels(member))
        loading.set_labels(config, list(dict.fromkeys(labels)))
        config.pre_seq_len = max(member.pre_seq_len for member in configs)
    title = f"predictions of {', '.join(members)}"
    return ModelSource(folders, configs, config, methods[0], title, is_bank)


def open_folder(
    path: str, max_seq_length: int | None, problem_type: str | None
) -> tuple[ModelFolders, BertConfig, TuningMethod]:
    """Open one tuned model. Raises: UserError if it is not tuned, or not for this problem type."""
    folders = locate(path)
    config, method = read_model_config(folders)
    if method is None:
        raise UserError(f"{path} is not tuned yet: use --do_train or a model or adapter folder")
    config.problem_type = config.problem_type or problem_type or SINGLE_LABEL
    if problem_type not in (None, config.problem_type):
        raise UserError(
            f"--problem_type {problem_type}: {path} was tuned for {config.problem_type}"
        )
    if config.num_labels == 1 and config.problem_type == SINGLE_LABEL:
        raise UserError(
            f"{path} has one output, as cross-encoders have, so it cannot choose between labels: "
            "tune it further with --do_train, or pass a model of two labels or more"
        )
    loading.set_max_seq_length(config, max_seq_length)
    return folders, config, method


def check_alike(
    paths: list[str], folders: list[ModelFolders], configs: list[BertConfig], by_row: bool
) -> None:
    """Check that prefixes fit together. Raises: UserError naming a folder that does not fit."""
    names = ("problem_type", "max_seq_length", "pooling")
    for path, folder, config in zip(paths, folders, configs, strict=True):
        if not method_of(config).fits_bank(config):
            what = "the adapter folder of a prefix of depth all"
            raise UserError(f"--prefix_paths: {path} is not {what}")
        values = {name: (getattr(config, name), getattr(configs[0], name)) for name in names}
        values["backbone"] = folder.backbone, folders[0].backbone
        for name, (value, first) in values.items():
            if value != first:
                raise UserError(
                    f"--prefix_paths: {name} of {path} is {value}, but in {paths[0]} it is {first}"
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
    methods = {kind: method for method in TUNING.values() for kind in method.peft_types}
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


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a model or adapter folder, by their checkpoint names; unchecked."""
    paths = [Path(member) / adapter.WEIGHTS for member in ensemble_folders(folder)]
    if not paths:
        path = folder / adapter.WEIGHTS
        paths = [path if path.exists() else folder / loading.WEIGHTS]
    read = [load_file(path) for path in paths]
    names = {WEIGHT + adapter.our_name(name): name for name in read[0]}
    if len(read) == 1:
        return {ours: read[0][name] for ours, name in names.items()}
    return {ours: torch.stack([part[name] for part in read]) for ours, name in names.items()}
