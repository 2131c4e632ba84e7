"""The tuned models that are served, and how they get into memory.

Prefixes of depth `all` share a frozen backbone, and their rows share batches. Every other model has
a backbone of its own. Prefixes are small and may be many, so only those in use stay in memory.

P virtual tokens, L layers, H heads, D head size (HD the hidden size), C classes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import BertModel, PreTrainedTokenizerBase

from model import load
from model.adapter import WEIGHTS
from model.classifier import Classifier
from model.folders import ADAPTER_CONFIG, ensemble_folders, find_backbone
from model.loading import TUNED, read_config
from model.prefix_bank import PrefixBank, TunedPrefix
from model.source import ModelSource, open_model
from runtime.batches import Encoded
from runtime.columns import is_member, remembered_settings
from runtime.file_format import FileFormat
from runtime.files import UserError, read_json
from runtime.machine import Machine
from serving.prefixes import Adapter, Changed, PrefixCache, stamps_of

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
        self, source: ModelSource, bert: BertModel, machine: Machine, prefixes: PrefixCache
    ) -> None:
        self.folders, self.config, self.bert = source.folders[0], source.config, bert
        self.tokenizer, self.machine, self.prefixes = source.tokenizer, machine, prefixes

    def prepare(self, model: "Model") -> list[TunedPrefix]:
        """Return the prefixes that a row of the model needs. Raises: Changed or UserError."""
        return [self.prefixes.get(adapter) for adapter in model.adapters]

    @torch.inference_mode()
    def logits(self, token_ids: list[list[int]], prepared: list[list[TunedPrefix]]) -> list[Tensor]:
        """Score rows: for each, the logits of each of its prefixes, float32 [K, C]."""
        distinct = list({id(prefix): prefix for tuned in prepared for prefix in tuned}.values())
        number = {id(prefix): place for place, prefix in enumerate(distinct)}
        index = [number[id(prefix)] for tuned in prepared for prefix in tuned]
        ids = [ids for ids, tuned in zip(token_ids, prepared, strict=True) for _ in tuned]
        bank = PrefixBank.from_tuned(self.bert, self.config, distinct, self.machine.dtype)
        logits = score(self.machine, bank, ids, self.config.pad_token_id or 0, index)
        by_row = logits.split([len(tuned) for tuned in prepared])
        classes = (len(tuned[0].bias) for tuned in prepared)
        return [rows[:, :count] for rows, count in zip(by_row, classes, strict=True)]


class OwnBackbone:
    """A model that shares nothing: of another method, or a prefix at the input."""

    def __init__(self, classifier: Classifier) -> None:
        self.model, self.machine = classifier.model.eval(), classifier.machine
        self.tokenizer = classifier.tokenizer

    def prepare(self, model: "Model") -> None:
        """Nothing needs to be read: the model is in memory."""

    @torch.inference_mode()
    def logits(self, token_ids: list[list[int]], prepared: list[None]) -> list[Tensor]:
        """Score rows: for each, its logits, float32 [1, C]."""
        pad = self.tokenizer.pad_token_id
        return list(score(self.machine, self.model, token_ids, pad)[:, None])


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
    labels: list[str]
    multi_label: bool
    max_seq_length: int
    title: str  # of the tuning method
    backend: SharedBackbone | OwnBackbone
    adapters: list[Adapter] = field(default_factory=list)
    created: int = 0  # seconds since 1970
    stored_bytes: int = 0
    scores: dict[str, float] = field(default_factory=dict)  # of its test
    form: FileFormat = field(default_factory=FileFormat)  # of the files that it was trained on

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer, which all its prefixes share."""
        return self.backend.tokenizer

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
        stamps = [stamps_of(member) for member in members]
        if known_backbone:
            self.check_served(folder, members)
        source = open_model(str(folder))
        tuned: dict[Adapter, TunedPrefix] = {}
        if source.method.fits_bank(source.config):
            backend = self.backbone_of(source)
            configs = source.configs or [source.config]
            adapters = [Adapter(*fields) for fields in zip(members, configs, stamps, strict=True)]
            try:
                tuned = {adapter: adapter.read(self.machine) for adapter in adapters}
            except Changed:
                raise UserError(f"{folder} changed while it was read: load it again") from None
        elif known_backbone:
            raise UserError(f"{folder} has no prefix of depth all")
        else:
            backend = OwnBackbone(load(folder, self.machine.precision))
        weights = [path for m in members for path in (m / WEIGHTS, m / "model.safetensors")]
        states = [path.stat() for path in weights if path.is_file()]
        averaged = f", {len(members)} averaged" * (len(members) > 1)
        model = Model(
            name=name,
            labels=source.labels,
            multi_label=source.multi_label,
            max_seq_length=source.config.max_seq_length,
            title=source.method.title(source.config) + averaged,
            backend=backend,
            adapters=list(tuned),
            created=int(max(state.st_mtime for state in states)),
            stored_bytes=sum(state.st_size for state in states),
            scores=read_scores(folder),
            form=FileFormat.from_settings(remembered_settings(folder)),
        )
        for adapter, prefix in tuned.items():
            self.prefixes.put(adapter, prefix)
        old = self.models.get(name)
        self.models[name] = model  # requests that began with the old one end with it
        if old:
            self.prefixes.retire(old.adapters)
        return model

    def remove(self, name: str) -> bool:
        """Stop serving a model; returns whether there was one."""
        old = self.models.pop(name, None)
        if old:
            self.prefixes.retire(old.adapters)
        return old is not None

    def check_served(self, folder: Path, members: list[Path]) -> None:
        """Check that adapters are of a served backbone, before another one is looked for.

        Raises: UserError.
        """
        backbones = [shared.folders for shared in self.backbones.values()]
        known = {f.name for f in backbones} | {str(f.backbone) for f in backbones}
        known |= {str(f.backbone.resolve()) for f in backbones}
        for member in members:
            if not (member / ADAPTER_CONFIG).is_file():
                raise UserError(f"{folder} is not an adapter folder")
            if (base := find_backbone(member)) not in known:
                raise UserError(f"{folder} was tuned on a backbone that is not served: {base}")

    def backbone_of(self, source: ModelSource) -> SharedBackbone:
        """Return the backbone of prefixes, loaded once.

        Raises: UserError if a prefix has other settings of the backbone than the first.
        """
        config, folders = source.config, source.folders[0]
        key = (folders.backbone.resolve(), config.pooling)
        if key not in self.backbones:
            built = source.method.build(folders, source.configs[0] if source.configs else config)
            self.machine.place(built.requires_grad_(False).eval())
            self.backbones[key] = SharedBackbone(source, built.bert, self.machine, self.prefixes)
        backend = self.backbones[key]
        for path, other in zip(source.folders, source.configs or [config], strict=True):
            for name in OF_BACKBONE:
                if getattr(other, name) != getattr(backend.config, name):
                    raise UserError(
                        f"{path.adapter}/config.json: {name} differs from the backbone's"
                    )
        return backend
