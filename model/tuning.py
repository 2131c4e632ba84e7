"""What a tuning method is: what it adds to a BERT, trains and stores; `methods.py` has their table.

To add a method, write a subclass of `AdapterMethod` and give it a row in `methods.TUNING` and in
`arguments.TUNING`; flags of its own are a group in `arguments.GROUPS`.
"""

import copy
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerBase

from model import adapter
from model.bert import quiet
from model.folders import ADAPTER_CONFIG, ModelFolders
from model.loading import TUNED, WEIGHTS, load_weights, read_shapes
from model.sequence_classification import POOLINGS, BertForSequenceClassification
from runtime.files import UserError, to_json

HEAD, POOLER = "classifier.", "bert.pooler."


def adapter_kind(kind: str, pooling: str) -> str:
    """Return the name of a kind of adapter with a pooling: PEFT must refuse what it cannot do."""
    return kind if POOLINGS[pooling].reads_pooler else f"{pooling.upper()}_{kind}"


class TuningMethod:
    """Full fine-tuning, and the base class of all methods."""

    name, title_format = "full", "full fine-tuning"  # as in --tuning_method, in reports
    flags: tuple[str, ...] = ()  # its own ones that are stored in the config
    adds: tuple[str, ...] = ()  # parts of the names of parameters that a backbone lacks
    trains: tuple[str, ...] = ("",)  # of those that are trained besides them and the head
    model_class = BertForSequenceClassification
    pooling = "cls"  # the default: a key of model.sequence_classification.POOLINGS
    needs_backbone = False  # whether a tuned folder lacks the backbone's weights
    peft_types: tuple[str, ...] = ()  # of adapter_config.json, if it has one

    def title(self, config: BertConfig) -> str:
        """Return the method's name in reports."""
        return self.title_format.format(config)

    def library(self, config: BertConfig) -> str | None:
        """Return the library that can load a tuned model, besides this program."""
        return "transformers" if POOLINGS[config.pooling].reads_pooler else None

    def configure(self, config: BertConfig, settings: dict[str, Any], tuned: bool) -> None:
        """Write the method and the `settings` of a run that concern it into the config.

        tuned: whether the model was tuned before; then it keeps its pooling if no flag is given.
        Raises: UserError if it has no pooler, and the flags ask for one.
        """
        stores_pooler, wanted = POOLINGS[config.pooling].reads_pooler, settings["pooling"]
        lacks_pooler = tuned and config.tuning_method == "full" and not stores_pooler
        if lacks_pooler and wanted and POOLINGS[wanted].reads_pooler:
            raise UserError(
                f"--pooling {wanted}: {settings['model_name_or_path']} was tuned with --pooling "
                f"{config.pooling}, so it has no pooler: omit the flag"
            )
        keeps = tuned and (lacks_pooler or config.tuning_method == self.name)
        config.pooling = wanted or (config.pooling if keeps else self.pooling)
        config.tuning_method = self.name
        for name in self.flags:
            if settings[name] is not None:  # an adapter tuned further keeps its own
                setattr(config, name, settings[name])

    def fits_bank(self, config: BertConfig) -> bool:
        """Whether a `PrefixBank` can hold a tuned model beside others on one backbone."""
        return False

    def unread(self, config: BertConfig) -> tuple[str, ...]:
        """Return the beginnings of the names of parameters that the pooling does not read."""
        return () if POOLINGS[config.pooling].reads_pooler else (POOLER,)

    def may_lack(self, name: str, config: BertConfig) -> bool:
        """Whether the backbone's files may lack this parameter; not asked for the head's."""
        new = self.unread(config) if config.architectures == TUNED else (POOLER,)
        return name.startswith(new)

    def is_trainable(self, name: str, config: BertConfig) -> bool:
        """Whether the parameter of this name is trained."""
        parts = (HEAD, *self.adds, *self.trains)
        return any(part in name for part in parts) and not name.startswith(self.unread(config))

    def is_head(self, name: str) -> bool:
        """Whether the parameter of this name belongs to the classification head."""
        return name.startswith(HEAD)

    def is_exempt(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter is exempt from weight decay, as biases and LayerNorm are."""
        return parameter.ndim < 2

    @torch.no_grad()
    def change_logits(self, model: nn.Module, temperature: float, biases: Tensor | float) -> None:
        """Divide all logits by a temperature and add biases [C], by changing the head."""
        for name, parameter in model.named_parameters():
            if self.is_head(name):
                parameter /= temperature
                if name.endswith("bias"):
                    parameter += torch.as_tensor(biases, device=parameter.device)

    def build(
        self, folders: ModelFolders, config: BertConfig, fresh_head: bool = False
    ) -> BertForSequenceClassification:
        """Build the model in `folders`, with its trainable parameters marked.

        fresh_head: draw a new head even if there is one. New parameters are drawn from torch's
        generator. Raises: UserError for weights that do not fit.
        """
        new_head = fresh_head or bool(folders.adapter)

        def may_lack(name: str) -> bool:
            return new_head if self.is_head(name) else self.may_lack(name, config)

        backbone, strict = folders.backbone, not (new_head or self.adds)
        model = load_weights(self.model_class, backbone, config, may_lack, strict)
        if fresh_head and f"{HEAD}weight" in read_shapes(backbone / WEIGHTS):  # it was loaded
            nn.init.normal_(model.classifier.weight, std=config.initializer_range)
            nn.init.zeros_(model.classifier.bias)
        if folders.adapter:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors(model).items()}
            if fresh_head:
                shapes |= {name: None for name in shapes if self.is_head(name)}
            model.load_state_dict(adapter.read(folders.adapter, shapes), strict=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.is_trainable(name, config))
        return model

    def initialise(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
        texts: list[str],
    ) -> None:
        """Initialise new parameters from training texts, if the method does that."""

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors to store in a model or adapter folder, by parameter name."""
        parameters = model.named_parameters()
        return {name: p for name, p in parameters if self.is_trainable(name, model.config)}

    def save(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        folders: ModelFolders,
        folder: Path,
    ) -> None:
        """Write a tuned model into `folder`. Raises: OSError if the disk is full."""
        # without a pooler that is not read, transformers says that the folder does not fit
        unread = self.unread(model.config)
        state = model.state_dict()
        with quiet():
            read = {name: state[name] for name in state if not name.startswith(unread)}
            model.save_pretrained(folder, state_dict=read)
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # tokenizers has no narrower exception
            raise OSError(str(error)) from None


class AdapterMethod(TuningMethod):
    """A method that freezes most of the backbone and stores only the trained weights."""

    needs_backbone, trains = True, ()
    of_peft: tuple[str, ...] = ()  # those of `peft_types` that PEFT reads and writes
    Settings: type = TypedDict("Settings", {})  # entries of adapter_config.json that it reads
    stored: ClassVar[dict] = {}  # config settings that differ in the stored config.json

    def library(self, config: BertConfig) -> str | None:
        return "peft" if self.peft_type(config) in self.of_peft else None

    def may_lack(self, name: str, config: BertConfig) -> bool:
        new = any(part in name for part in self.adds)
        return new or name.startswith(self.unread(config))  # a new pooler would stay random

    def peft_type(self, config: BertConfig) -> str:
        """Return the kind of adapter, one of `peft_types`."""
        return self.peft_types[0]

    def settings(self, config: BertConfig) -> dict:
        """Return the method's own part of adapter_config.json, besides `peft_type`."""
        return {}

    def read_settings(self, config: BertConfig, settings: dict, path: Path) -> None:
        """Copy `settings`, read from the adapter_config.json at `path`, into the config.

        Raises: UserError if they are for another backbone.
        """

    def stored_name(self, name: str) -> str:
        """Return PEFT's name for one of our parameters; `adapter.our_name` is the inverse."""
        return f"base_model.{name}"

    def save(self, model, tokenizer, folders, folder):
        self.save_tensors(self.tensors(model), model.config, folders, folder)

    def save_tensors(
        self, tensors: dict[str, Tensor], config: BertConfig, folders: ModelFolders, folder: Path
    ) -> None:
        """Write the trained tensors into `folder`. Raises: OSError if the disk is full."""
        stored = {self.stored_name(name): tensors[name].detach().cpu() for name in tensors}
        stored = {name: tensor.contiguous() for name, tensor in stored.items()}
        save_file(stored, folder / adapter.WEIGHTS, metadata={"format": "pt"})
        settings = {"base_model_name_or_path": folders.name, "inference_mode": True}
        settings |= {"task_type": "SEQ_CLS", "peft_type": self.peft_type(config)}
        text = to_json(dict(sorted((settings | self.settings(config)).items())))
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        config = copy.deepcopy(config)
        config.update({"architectures": TUNED, **self.stored})
        config.save_pretrained(folder)
