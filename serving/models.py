"""The tuned models that are served, and how they get into memory.

Prefixes of depth `all` share a frozen backbone, and their rows share batches. Every other model has
a backbone of its own. Prefixes are small and may be many, so only those in use stay in memory.

K prefixes that a row is averaged over, C classes.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.quantization import check_int8
from model.engine import ready
from model.folders import ADAPTER_CONFIG, ensemble_folders, find_backbone
from model.predictions import average
from model.prefix_bank import PrefixBank, TunedPrefix
from model.source import ModelSource, open_model
from runtime.batches import Encoded, TextRows, tokenize
from runtime.columns import is_member, remembered_settings
from runtime.file_format import FileFormat
from runtime.files import UserError, read_json
from runtime.machine import Machine
from serving.prefixes import Adapter, PrefixCache, stamps_of

logger = logging.getLogger(__name__)

PART = 32  # rows
OF_BACKBONE = (  # settings of a config that a prefix cannot choose
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "max_position_embeddings type_vocab_size layer_norm_eps pad_token_id"
).split()
SCORES = "test_accuracy test_accuracy_unseen test_macro_f1 test_loss test_ece".split()
Results = TypedDict("Results", dict.fromkeys(SCORES, float | None), total=False)


class Backend:
    """A BERT in memory: one that prefixes share, or a whole model, which has no prefixes here."""

    def __init__(self, source: ModelSource, module: nn.Module, cache: PrefixCache) -> None:
        """module: on the machine of the cache."""
        self.folders, self.config = source.folders[0], source.config
        self.tokenizer, self.cache, self.machine = source.tokenizer, cache, cache.machine
        self.module = module

    def prepare(self, model: "Model") -> list[TunedPrefix]:
        """Return the prefixes that a row of the model needs. Raises: UserError."""
        return [self.cache.get(adapter) for adapter in model.adapters]

    @torch.inference_mode()
    def logits(
        self, token_ids: list[list[int]], prefixes: list[list[TunedPrefix]]
    ) -> tuple[Tensor, ...]:
        """Score rows, each with its own prefixes.

        Returns for each row the logits of each of its prefixes, or of the whole model: float32
        [K, C]. C includes the labels that only other prefixes of the batch have, at the end.
        """
        module, index = self.module, None
        if any(prefixes):
            distinct = list({id(prefix): prefix for tuned in prefixes for prefix in tuned}.values())
            place = {id(prefix): number for number, prefix in enumerate(distinct)}
            index = np.array([place[id(prefix)] for tuned in prefixes for prefix in tuned])
            module = PrefixBank.from_tuned(module, self.config, distinct, self.machine.dtype)
        counts = [len(tuned) or 1 for tuned in prefixes]
        ids = [ids for ids, count in zip(token_ids, counts, strict=True) for _ in range(count)]
        rows = np.arange(len(ids))
        data = Encoded(ids, rows, None, [], self.tokenizer.pad_token_id, index)
        return self.machine.logits(module, data, rows).cpu().split(counts)


@dataclass(frozen=True, eq=False)
class Model:
    """A served model. It never changes: loading it again makes another one."""

    name: str
    labels: list[str]
    multi_label: bool
    max_seq_length: int
    backend: Backend
    adapters: list[Adapter] = field(default_factory=list)
    form: FileFormat = field(default_factory=FileFormat)  # of the files that it was trained on
    entry: dict[str, Any] = field(default_factory=dict)  # in /v1/models

    def classify(self, rows: TextRows) -> Tensor:
        """Score rows outside the queue: float32 [N, C]."""
        token_ids, _ = tokenize(self.backend.tokenizer, rows.texts, self.max_seq_length)
        prefixes, logits = self.backend.prepare(self), []
        for start in range(0, len(token_ids), PART):
            part = token_ids[start : start + PART]
            logits += self.backend.logits(part, [prefixes] * len(part))
        return average(torch.stack(logits, dim=1)[..., : len(self.labels)], self.multi_label)


def read_scores(folder: Path) -> dict[str, float]:
    """Return the test figures of a finished run; {} if there are none."""
    try:
        results = read_json(folder / "all_results.json", Results)
    except UserError:
        return {}
    return {name: value for name, value in results.items() if value is not None}


def is_model(folder: Path) -> bool:
    """Whether a folder seems to contain a tuned model, or several prefixes for one task."""
    if (folder / ADAPTER_CONFIG).is_file() or (folder / "model.safetensors").is_file():
        return True
    return any(is_member(path.parent.name) for path in folder.glob(f"*/{ADAPTER_CONFIG}"))


def find_models(paths: list[str]) -> dict[str, Path]:
    """Return the folders of models by name; a path is a model, or a folder of models.

    Raises: UserError if a path contains none, or if two models have the same name.
    """
    models: dict[str, Path] = {}
    for path in paths:
        folder = Path(path).resolve()
        if not folder.is_dir():
            raise UserError(f"folder {path} does not exist: name a model, or train one first")
        folders = [folder] if is_model(folder) else filter(is_model, sorted(folder.glob("[!.]*")))
        if not (folders := list(folders)):
            raise UserError(f"{path} contains no tuned model: train one with script/run_prefix.sh")
        for folder in folders:
            name = folder.name
            if is_member(name):  # one prefix of several: its own name says nothing
                name = f"{folder.parent.name}-{name}"
            if models.setdefault(name, folder) != folder:
                raise UserError(f"{models[name]} and {folder} have the same name: rename one")
    return models


class Registry:
    """All served models by name; a model is replaced as a whole or not at all."""

    def __init__(self, machine: Machine, cache_bytes: int) -> None:
        self.machine, self.models = machine, dict[str, Model]()
        self.prefixes = PrefixCache(cache_bytes, machine)
        self.backbones: dict[tuple[Path, str], Backend] = {}

    def add_all(self, folders: dict[str, Path], named: list[str]) -> None:
        """Serve the models that `find_models` found; in a folder of models, those that are usable.

        Raises: UserError if a model is not usable that is named itself, or if there is none left.
        """
        paths = {Path(path).resolve() for path in named}
        for name, folder in folders.items():
            try:
                self.add(name, folder)
            except (UserError, OSError) as error:
                if folder in paths:
                    raise
                logger.warning("warning: skipping %s: %s", folder, error)
        if not self.models:
            raise UserError(f"no model in {', '.join(named)} is usable: see the warnings above")

    def add(self, name: str, folder: Path, known_backbone: bool = False) -> Model:
        """Load a model completely, then serve it, in place of one with the same name.

        known_backbone: it must be one or several prefixes of a backbone that is already served.
        Raises: UserError if the folder is damaged or does not fit; then nothing changes.
        """
        members = [Path(path) for path in ensemble_folders(folder)] or [folder]
        stamps = [stamps_of(member) for member in members]  # before anything is read
        if known_backbone:
            self.check_served(members)
        source, adapters = open_model(str(folder)), []
        if source.method.fits_bank(source.config):
            backend, configs = self.backbone_of(source), source.configs
            adapters = [Adapter(*facts) for facts in zip(members, configs, stamps, strict=True)]
            for adapter in adapters:
                self.prefixes.get(adapter)
        elif known_backbone:
            raise UserError(f"{folder} has no prefix of depth all")
        else:
            module = source.place(source.build(), self.machine).eval()
            backend = Backend(source, module, self.prefixes)
        form = FileFormat.from_settings(remembered_settings(folder))
        states = [path.stat() for m in members for path in m.glob("*model.safetensors")]
        averaged = f", {len(members)} averaged" * (len(members) > 1)
        entry = {
            "id": name,
            "object": "model",
            "created": int(max(state.st_mtime for state in states)),
            "owned_by": "user",
            "labels": source.labels,
            "multi_label": source.multi_label,
            "method": source.method.title(source.config) + averaged,
            "max_seq_length": source.config.max_seq_length,
            "text_column_names": list(form.text_column_names),
            "stored_bytes": sum(state.st_size for state in states),
            "scores": read_scores(folder),
        }
        facts = source.labels, source.multi_label, source.config.max_seq_length
        model = Model(name, *facts, backend, adapters, form, entry)
        if self.machine.int8:
            check_int8(model.classify, folder, source.labels, source.multi_label)
        self.models[name] = model  # requests that began with the old one end with it
        return model

    def check_served(self, members: list[Path]) -> None:
        """Check that adapters are of a served backbone, before another one is looked for.

        Raises: UserError.
        """
        served = [backend.folders for backend in self.backbones.values()]
        known = {name for f in served for name in (f.name, str(f.backbone.resolve()))}
        for member in members:
            if not (member / ADAPTER_CONFIG).is_file():
                raise UserError(f"{member} is not an adapter folder")
            if (base := find_backbone(member)) not in known:
                raise UserError(f"{member} was tuned on a backbone that is not served: {base}")

    def backbone_of(self, source: ModelSource) -> Backend:
        """Return the backbone of prefixes, loaded once.

        Raises: UserError if a prefix has other settings of the backbone than the first.
        """
        folders, configs = source.folders[0], source.configs
        key = folders.backbone.resolve(), source.config.pooling
        if key not in self.backbones:
            bert = source.method.build(folders, configs[0]).bert.requires_grad_(False).eval()
            bert = ready(bert, self.machine, source.config.pooling, with_prefix=True)
            self.machine.place(bert)
            self.backbones[key] = Backend(source, bert, self.prefixes)
        backend = self.backbones[key]
        for path, config in zip(source.folders, configs, strict=True):
            for name in OF_BACKBONE:
                if getattr(config, name) != getattr(backend.config, name):
                    raise UserError(
                        f"{path.adapter}/config.json: {name} differs from the backbone's"
                    )
        return backend
