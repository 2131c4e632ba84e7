"""The tuned models that are served, and how they get into memory.

Prefixes of depth `all` share a frozen backbone, and their rows share batches. Every other model has
a backbone of its own. Prefixes are small and may be many, so only those in use stay in memory.

P virtual tokens, L layers, H heads, D head size (HD the hidden size), C classes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from model import adapter
from model.classifier import Classifier
from model.loading import (
    TUNED,
    list_labels,
    load_tokenizer,
    problem_type,
    read_config,
    set_max_seq_length,
)
from model.prefix_bank import FrozenBank, TunedPrefix
from model.source import (
    ADAPTER_CONFIG,
    Source,
    backbone_sha256,
    ensemble_folders,
    find_backbone,
    locate,
)
from model.start import check_backbone, read_model_config
from model.tuning import TUNING
from runtime.batches import Encoded
from runtime.columns import is_member, remembered_settings
from runtime.file_format import FileFormat
from runtime.files import UserError, read_json
from runtime.machine import Machine
from serving.prefixes import Adapter, Changed, PrefixCache, stamp_of

logger = logging.getLogger(__name__)

OF_BACKBONE = (  # settings of a config that a prefix cannot choose
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "max_position_embeddings type_vocab_size layer_norm_eps pad_token_id"
).split()


class Results(TypedDict, total=False):
    """The part of all_results.json that is shown."""

    test_accuracy: float | None
    test_accuracy_unseen: float | None
    test_macro_f1: float | None
    test_loss: float | None
    test_ece: float | None


class SharedBackbone:
    """A frozen BERT on which each row of a batch has a prefix of its own."""

    def __init__(
        self,
        source: Source,
        config: BertConfig,
        bert: BertModel,
        machine: Machine,
        prefixes: PrefixCache,
    ) -> None:
        self.source, self.config, self.bert = source, config, bert
        self.machine, self.prefixes = machine, prefixes

    def prepare(self, model: "Model") -> list[TunedPrefix]:
        """Return the prefixes that a row of the model needs. Raises: Changed or UserError."""
        return [self.prefixes.get(one) for one in model.adapters]

    @torch.inference_mode()
    def logits(self, token_ids: list[list[int]], prepared: list[list[TunedPrefix]]) -> list[Tensor]:
        """Score rows: for each, the logits of each of its prefixes, float32 [K, C]."""
        distinct = list({id(one): one for tuned in prepared for one in tuned}.values())
        number = {id(one): place for place, one in enumerate(distinct)}
        index = [number[id(one)] for tuned in prepared for one in tuned]
        ids = [ids for ids, tuned in zip(token_ids, prepared, strict=True) for _ in tuned]
        bank = FrozenBank(self.bert, self.config, distinct)
        found = score(self.machine, bank, ids, self.config.pad_token_id or 0, index)
        each = found.split([len(tuned) for tuned in prepared])
        classes = (len(tuned[0].bias) for tuned in prepared)
        return [rows[:, :count] for rows, count in zip(each, classes, strict=True)]


class OwnBackbone:
    """A model that shares nothing: full, bias tuning, a probe, or a prefix at the input."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier, self.machine = classifier, classifier.machine

    def prepare(self, model: "Model") -> None:
        """Nothing needs to be read: the model is in memory."""

    @torch.inference_mode()
    def logits(self, token_ids: list[list[int]], prepared: list[None]) -> list[Tensor]:
        """Score rows: for each, its logits, float32 [1, C]."""
        pad = self.classifier.tokenizer.pad_token_id
        return list(score(self.machine, self.classifier.model, token_ids, pad)[:, None])


def score(
    machine: Machine, module, token_ids: list[list[int]], pad: int, index: list[int] | None = None
) -> Tensor:
    """Score one batch: float32 [B, C], on the CPU. index: each row's prefix."""
    rows = np.arange(len(token_ids))
    prefix_index = None if index is None else np.array(index)
    data = Encoded(token_ids, rows, None, [], pad, prefix_index)
    return machine.logits(module, data, rows).cpu()


@dataclass(frozen=True, eq=False)
class Model:
    """A served model. It never changes: loading it again makes another one."""

    name: str
    folder: Path
    labels: list[str]
    multi_label: bool
    max_seq_length: int
    title: str  # of the tuning method
    tokenizer: PreTrainedTokenizerBase
    backend: SharedBackbone | OwnBackbone
    adapters: list[Adapter] = field(default_factory=list)
    created: int = 0  # seconds since 1970
    stored_bytes: int = 0
    scores: dict[str, float] = field(default_factory=dict)  # of its test
    form: FileFormat = field(default_factory=FileFormat)  # of the files that it was trained on

    def describe(self) -> dict[str, Any]:
        """Return the model's entry in /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "user",
            "labels": self.labels,
            "multi_label": self.multi_label,
            "method": self.title,
            "max_seq_length": self.max_seq_length,
            "text_column_names": list(self.form.text_column_names),
            "stored_bytes": self.stored_bytes,
            "scores": self.scores,
        }


def read_scores(folder: Path) -> dict[str, float]:
    """Return the test figures of a finished run; {} if there are none."""
    try:
        results = read_json(folder / "all_results.json", Results)
    except UserError:
        return {}
    return {name: value for name, value in results.items() if value is not None}


def is_model(folder: Path) -> bool:
    """Whether a folder contains a tuned model, or several prefixes for one task."""
    if (folder / ADAPTER_CONFIG).is_file() or ensemble_folders(folder):
        return True
    return (folder / "model.safetensors").is_file() and read_config(folder).architectures == TUNED


@contextmanager
def skipping(folder: Path) -> Iterator[None]:
    """Skip the block with a warning if it finds that the model in `folder` is not usable."""
    try:
        yield
    except (UserError, OSError) as error:
        logger.warning("warning: skipping %s: %s", folder, error)


def find_models(paths: list[str]) -> dict[str, Path]:
    """Return the folders of models by name; a path is a model, or a folder of models.

    Damaged ones in a folder of models are left out with a warning.
    Raises: UserError if a path contains none, or if two models have the same name.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"folder {path} does not exist")
        one = path.resolve()
        below = sorted(p for p in one.iterdir() if p.is_dir() and not p.name.startswith("."))
        folders = [one] if is_model(one) else []
        for folder in below if not folders else []:
            with skipping(folder):
                folders += [folder] * is_model(folder)
        if not folders:
            raise UserError(f"{path} contains no tuned model: train one with script/run_prefix.sh")
        for folder in folders:
            name = folder.name
            if is_member(name):  # one prefix of several: its own name says nothing
                name = f"{folder.parent.name}-{name}"
            if found.setdefault(name, folder) != folder:
                raise UserError(f"{found[name]} and {folder} have the same name: rename one")
    return found


class Registry:
    """All served models by name; a model is replaced as a whole or not at all."""

    def __init__(self, machine: Machine, cache_bytes: int) -> None:
        self.machine, self.models = machine, dict[str, Model]()
        self.prefixes = PrefixCache(cache_bytes, machine)
        self.backbones: dict[tuple[Path, str], SharedBackbone] = {}
        self.locate, self.checksum = cache(locate), cache(backbone_sha256)
        self.tokenizers: dict[Path, PreTrainedTokenizerBase] = {}

    def add_all(self, found: dict[str, Path], named: list[str]) -> None:
        """Serve the models that `find_models` found; in a folder of models, those that are usable.

        Raises: UserError if a model is not usable that is named itself, or if there is none left.
        """
        paths = {Path(path).resolve() for path in named}
        for name, folder in found.items():
            with nullcontext() if folder in paths else skipping(folder):
                self.add(name, folder)
        if not self.models:
            raise UserError(f"no model in {', '.join(named)} is usable: see the warnings above")

    def add(self, name: str, folder: Path, known_backbone: bool = False) -> Model:
        """Load a model completely, then serve it, in place of one with the same name.

        known_backbone: it must be one or several prefixes of a backbone that is already served.
        Raises: UserError if the folder is damaged or does not fit; then nothing changes.
        """
        members = [Path(path) for path in ensemble_folders(folder)] or [folder]
        if not (members[0] / ADAPTER_CONFIG).is_file():
            if known_backbone:
                raise UserError(f"{folder} is not an adapter folder")
            return self.replace(self.open_whole(name, folder))
        opened = [self.open_prefix(member, known_backbone) for member in members]
        if None in opened:
            if len(members) > 1 or known_backbone:
                raise UserError(f"{folder} has no prefix of depth all")
            return self.replace(self.open_whole(name, folder))
        backend, config = opened[0][:2]
        for other, other_config, *_ in opened[1:]:
            alike = (list_labels, lambda one: one.problem_type, lambda one: one.max_seq_length)
            if other is not backend or any(of(other_config) != of(config) for of in alike):
                raise UserError(f"the prefixes in {folder} do not belong together")
        title = TUNING["prefix"].title(config)
        title += f", {len(members)} averaged" * (len(members) > 1)
        model = Model(
            name=name,
            folder=folder,
            labels=list_labels(config),
            multi_label=problem_type(config, None, folder) == "multi_label_classification",
            max_seq_length=config.max_seq_length,
            title=title,
            tokenizer=self.tokenizer(backend.source, config),
            backend=backend,
            adapters=[one for _, _, one, _ in opened],
            **stored(folder, members),
        )
        for _, _, one, tuned in opened:
            self.prefixes.put(one, tuned)
        return self.replace(model)

    def replace(self, model: Model) -> Model:
        """Serve a model from now on; requests that began with the old one end with it."""
        old = self.models.get(model.name)
        self.models[model.name] = model
        if old:
            self.prefixes.retire(old.adapters)
        return model

    def remove(self, name: str) -> bool:
        """Stop serving a model; returns whether there was one."""
        old = self.models.pop(name, None)
        if old:
            self.prefixes.retire(old.adapters)
        return old is not None

    def open_prefix(
        self, folder: Path, known_backbone: bool
    ) -> tuple[SharedBackbone, BertConfig, Adapter, TunedPrefix] | None:
        """Open an adapter folder; None if it is not a prefix of depth `all`."""
        stamp = stamp_of(folder)
        base = find_backbone(folder)
        if known_backbone and not self.is_served(base):
            raise UserError(f"{folder} was tuned on a backbone that is not served: {base}")
        source = replace(self.locate(base), adapter=folder)
        config, method = read_model_config(source)
        if method is not TUNING["prefix"] or config.prefix_depth != "all":
            return None
        check_backbone(source, config, self.checksum(source.backbone))
        set_max_seq_length(config, method.virtual_tokens(config), None)
        key = (source.backbone.resolve(), config.pooling)
        if key not in self.backbones:
            built = method.build(source, config).requires_grad_(False).eval()
            self.machine.place(built)
            self.backbones[key] = SharedBackbone(
                source, config, built.bert, self.machine, self.prefixes
            )
        backend, one = self.backbones[key], Adapter(folder, config, stamp)
        for name in OF_BACKBONE:
            if getattr(config, name) != getattr(backend.config, name):
                raise UserError(f"{folder}/config.json: {name} differs from the backbone's")
        try:
            return backend, config, one, one.read(self.machine)
        except Changed:
            raise UserError(f"{folder} changed while it was read: load it again") from None

    def is_served(self, backbone: str) -> bool:
        """Whether models on a backbone of this name, or in this folder, are served."""
        sources = [one.source for one in self.backbones.values()]
        return any(
            backbone in (one.name, str(one.backbone), str(one.backbone.resolve()))
            for one in sources
        )

    def open_whole(self, name: str, folder: Path) -> Model:
        """Load a model that shares nothing."""
        classifier = Classifier.load(folder, self.machine.precision)
        classifier.model.eval()
        return Model(
            name=name,
            folder=folder,
            labels=classifier.labels,
            multi_label=classifier.multi_label,
            max_seq_length=classifier.max_seq_length,
            title=classifier.title,
            tokenizer=classifier.tokenizer,
            backend=OwnBackbone(classifier),
            **stored(folder, [folder]),
        )

    def tokenizer(self, source: Source, config: BertConfig) -> PreTrainedTokenizerBase:
        """Return the backbone's tokenizer, which all its prefixes share."""
        if source.backbone not in self.tokenizers:
            self.tokenizers[source.backbone] = load_tokenizer(source, config)
        return self.tokenizers[source.backbone]


def stored(folder: Path, members: list[Path]) -> dict[str, Any]:
    """Return the fields of a `Model` that come from its folder; members: with weights."""
    names = (adapter.WEIGHTS, "model.safetensors")
    files = [(one / name).stat() for one in members for name in names if (one / name).is_file()]
    return {
        "created": int(max(one.st_mtime for one in files)),
        "stored_bytes": sum(one.st_size for one in files),
        "scores": read_scores(folder),
        "form": FileFormat.from_settings(remembered_settings(folder)),
    }
