"""The tuning methods: one object each, and `TUNING`, the table of them all.

To add a method, write a subclass of `AdapterMethod` that says what it trains, add it to `TUNING`,
and add its defaults to `arguments.TUNING_DEFAULTS`.

P virtual tokens.
"""

import logging
from argparse import Namespace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerBase

from model import adapter
from model.loading import TUNED, load_weights, quiet, read_shapes
from model.prefix_bank import PrefixBank
from model.prefix_encoder import keys_and_values, prefix_width
from model.sequence_classification import (
    POOLINGS,
    BertForSequenceClassification,
    BertPrefixForSequenceClassification,
)
from model.source import Source
from runtime.columns import ENSEMBLE_FOLDER
from runtime.files import UserError

logger = logging.getLogger(__name__)

HEAD, POOLER = "classifier.", "bert.pooler."
OWN_POOLINGS = [name.upper() for name, pooling in POOLINGS.items() if not pooling.is_berts]


class TuningMethod:
    """Full fine-tuning, and the base class of all methods: what is new, trainable and stored."""

    name = "full"  # as in --tuning_method
    model_class = BertForSequenceClassification
    pooling = "cls"  # the default: a key of model.sequence_classification.POOLINGS
    peft_types: tuple[str, ...] = ()  # of adapter_config.json; all but PREFIX_TUNING are ours
    needs_backbone = False  # whether a tuned folder lacks the backbone's weights

    def title(self, config: BertConfig) -> str:
        """Return the method's name in reports."""
        return "full fine-tuning"

    def library(self, config: BertConfig) -> str | None:
        """Return the library that can load a tuned model, besides this program."""
        return "transformers" if POOLINGS[config.pooling].is_berts else None

    def configure(self, config: BertConfig, args: Namespace, tuned: bool) -> None:
        """Write the method and its settings into the config.

        tuned: whether the model was tuned before; then it keeps its pooling if no flag is given.
        Raises: UserError if it has no pooler, and the flags ask for one.
        """
        own = POOLINGS[config.pooling].is_berts
        lacks_pooler = tuned and config.tuning_method == "full" and not own
        if lacks_pooler and args.pooling and POOLINGS[args.pooling].is_berts:
            raise UserError(
                f"--pooling {args.pooling}: {args.model_name_or_path} was tuned with --pooling "
                f"{config.pooling}, so it has no pooler: omit the flag"
            )
        keeps = tuned and (lacks_pooler or config.tuning_method == self.name)
        pooling = config.pooling if keeps else self.pooling
        config.tuning_method, config.pooling = self.name, args.pooling or pooling

    def virtual_tokens(self, config: BertConfig) -> int:
        """Count the positions that virtual tokens occupy."""
        return 0

    def unread(self, config: BertConfig) -> tuple[str, ...]:
        """Return name prefixes of parameters that the pooling does not read."""
        return () if POOLINGS[config.pooling].is_berts else (POOLER,)

    def may_lack(self, config: BertConfig) -> tuple[str, ...]:
        """Return name prefixes of parameters, other than the head's, that a backbone may lack."""
        return self.unread(config) if config.architectures == TUNED else (POOLER,)

    def is_trainable(self, name: str) -> bool:
        """Whether the parameter of this name is trained."""
        return True

    def is_head(self, name: str) -> bool:
        """Whether the parameter of this name belongs to the classification head."""
        return name.startswith(HEAD)

    def is_exempt(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter is exempt from weight decay, as biases and LayerNorm are."""
        return parameter.ndim < 2

    @torch.no_grad()
    def change_logits(self, model: nn.Module, temperature: float, biases: Tensor | float) -> None:
        """Divide all logits by a temperature and add biases [C], by way of the head."""
        for name, parameter in model.named_parameters():
            if self.is_head(name):
                parameter /= temperature
                if name.endswith("bias"):
                    parameter += torch.as_tensor(biases, device=parameter.device)

    def build(
        self, source: Source, config: BertConfig, fresh_head: bool = False
    ) -> BertForSequenceClassification:
        """Build the model of `source`, with its trainable parameters marked.

        fresh_head: draw a new head even if there is one. New parameters are drawn from torch's
        generator. Raises: UserError for weights that do not fit.
        """
        new = self.may_lack(config) + ((HEAD,) if fresh_head or source.adapter else ())
        model = load_weights(self.model_class, source.backbone, config, new)
        if fresh_head and f"{HEAD}weight" in read_shapes(source.backbone):  # it was loaded
            nn.init.normal_(model.classifier.weight, std=config.initializer_range)
            nn.init.zeros_(model.classifier.bias)
        if source.adapter:
            shapes = {name: tuple(one.shape) for name, one in self.tensors(model).items()}
            if fresh_head:
                shapes |= {name: None for name in shapes if self.is_head(name)}
            put(model, adapter.read(source.adapter, shapes))
        unread = self.unread(config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.is_trainable(name) and not name.startswith(unread))
        return model

    def initialise(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        args: Namespace,
        texts: list[str],
    ) -> None:
        """Initialise new parameters from training texts, if the method does that."""

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors to store in a model or adapter folder, by parameter name."""
        unread = self.unread(model.config)
        return {
            name: one
            for name, one in model.named_parameters()
            if self.is_trainable(name) and not name.startswith(unread)
        }

    def save(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, source: Source, folder: Path
    ) -> None:
        """Write a tuned model into `folder`. Raises: OSError if the disk is full."""
        # without a pooler that is not read, transformers says that the folder does not fit
        unread = self.unread(model.config)
        read = {n: one for n, one in model.state_dict().items() if not n.startswith(unread)}
        with quiet():
            model.save_pretrained(folder, state_dict=read)
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # tokenizers has no narrower exception
            raise OSError(str(error)) from None


class AdapterMethod(TuningMethod):
    """A method that freezes most of the backbone and stores only the trained weights."""

    needs_backbone = True
    stored: ClassVar[dict] = {}  # config settings that differ in the stored config.json

    def library(self, config: BertConfig) -> str | None:
        return None

    def may_lack(self, config: BertConfig) -> tuple[str, ...]:
        return self.unread(config)  # else the weights of a new pooler would stay random

    def settings(self, config: BertConfig) -> dict:
        """Return the method's own part of adapter_config.json."""
        return {"peft_type": self.peft_types[0]}

    def read_settings(self, config: BertConfig, settings: dict, path: Path) -> None:
        """Copy `settings`, read from the adapter_config.json at `path`, into the config.

        Raises: UserError if they are for another backbone.
        """

    def save(self, model, tokenizer, source, folder):
        self.save_tensors(self.tensors(model), model.config, source, folder)

    def save_tensors(
        self, tensors: dict[str, Tensor], config: BertConfig, source: Source, folder: Path
    ) -> None:
        """Write the trained tensors into `folder`. Raises: OSError if the disk is full."""
        settings = {"base_model_name_or_path": source.name, "inference_mode": True}
        settings |= {"task_type": "SEQ_CLS", **self.settings(config)}
        adapter.save(folder, config, tensors, settings, self.stored)


class Prefix(AdapterMethod):
    """Prefix tuning: virtual tokens and the head are trained, the backbone is frozen."""

    name = "prefix"
    model_class = BertPrefixForSequenceClassification
    # PEFT can load the first; the others are of depth input or of other poolings
    peft_types = ("PREFIX_TUNING", "INPUT_PREFIX", *(f"{name}_PREFIX" for name in OWN_POOLINGS))
    peft_types += tuple(f"{name}_INPUT_PREFIX" for name in OWN_POOLINGS)
    # a reparametrised prefix is stored as the MLP's output
    stored: ClassVar[dict] = {"prefix_projection": False}

    def title(self, config: BertConfig) -> str:
        where = "in every layer" if config.prefix_depth == "all" else "at the input only"
        several = f", {config.num_prefixes} prefixes" * (config.num_prefixes > 1)
        return f"prefix tuning {where}{several}"

    def library(self, config: BertConfig) -> str | None:
        return None if self.not_for_peft(config) else "peft"

    def not_for_peft(self, config: BertConfig) -> str:
        """Return why PEFT cannot load the prefix; blank if it can."""
        if config.prefix_depth == "input":
            return (
                "PEFT cannot load a prefix of depth input: its prompt tuning reads the first "
                "virtual token where this model reads [CLS]"
            )
        if not POOLINGS[config.pooling].is_berts:
            return f"PEFT cannot load a prefix with {config.pooling} pooling"
        return ""

    def peft_type(self, config: BertConfig) -> str:
        """Return the kind of prefix, one of `peft_types`."""
        if not self.not_for_peft(config):
            return "PREFIX_TUNING"
        kind = "INPUT_PREFIX" if config.prefix_depth == "input" else "PREFIX"
        return kind if POOLINGS[config.pooling].is_berts else f"{config.pooling.upper()}_{kind}"

    def configure(self, config: BertConfig, args: Namespace, tuned: bool) -> None:
        super().configure(config, args, tuned)
        for name in ("pre_seq_len", "prefix_depth", "prefix_projection", "prefix_hidden_size"):
            if getattr(args, name) is not None:  # a prefix tuned further keeps its own
                setattr(config, name, getattr(args, name))
        config.num_prefixes = args.num_prefixes
        if why := self.not_for_peft(config):
            logger.warning("warning: %s", why)

    def virtual_tokens(self, config: BertConfig) -> int:
        return config.pre_seq_len

    def may_lack(self, config: BertConfig) -> tuple[str, ...]:
        return ("prefix_encoder.", *super().may_lack(config))

    def is_trainable(self, name: str) -> bool:
        return name.startswith(("prefix_encoder.", HEAD))

    def is_exempt(self, name: str, parameter: nn.Parameter) -> bool:
        """Also exempt the prefix: it acts as an input, not as a weight."""
        return super().is_exempt(name, parameter) or name in (adapter.PREFIX, f"{HEAD}bias")

    def build(self, source, config, fresh_head=False):
        """Build the model; `config.num_prefixes` above 1 makes it a bank of new prefixes."""
        model = super().build(source, config, fresh_head)
        if (count := getattr(config, "num_prefixes", 1)) == 1:
            return model

        def draw(like: Tensor) -> list[Tensor]:
            shapes = [like.shape] * (count - 1)
            return [like.detach(), *(config.initializer_range * torch.randn(s) for s in shapes)]

        prefixes = draw(model.get_parameter(adapter.PREFIX))
        weight = torch.stack(draw(model.classifier.weight))
        bias = torch.zeros(weight.shape[:2])
        return PrefixBank(model.bert, config, prefixes, weight, bias)

    def initialise(self, model, tokenizer, args, texts):
        """Start from real words, repeated or cut to P: their keys and values, or their embeddings.

        Words: --prefix_init_text, else training texts. Raises: UserError if there are no words.
        """
        if args.prefix_init != "text":
            return
        config, bert, starts = model.config, model.bert, []
        for number in range(config.num_prefixes):
            words = args.prefix_init_text
            if words is None:  # 64 random texts fill a prefix of the default length
                drawn = np.random.default_rng(args.seed + number).permutation(len(texts))[:64]
                words = " ".join(texts[row] for row in drawn)
            ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
            if not ids:
                raise UserError(f"no word to start from in '{words}': see --prefix_init_text")
            ids = torch.from_numpy(np.resize(ids, config.pre_seq_len)).to(bert.device)
            at_input = config.prefix_depth == "input"
            starts.append(
                bert.get_input_embeddings()(ids) if at_input else keys_and_values(bert, ids)
            )
        flat = torch.stack(starts) if config.num_prefixes > 1 else starts[0]
        put(model, {adapter.PREFIX: flat})

    @torch.no_grad()
    def tensors(self, model):
        """Return prefix and head; a reparametrised prefix is stored as the MLP's output."""
        head = {HEAD + name: one for name, one in model.classifier.named_parameters()}
        if isinstance(model, PrefixBank):
            return {adapter.PREFIX: model.get_parameter(adapter.PREFIX), **head}
        return {adapter.PREFIX: model.prefix_encoder(), **head}

    def save(self, model, tokenizer, source, folder):
        """Write an adapter folder or, for several prefixes, a folder that contains one for each."""
        if not isinstance(model, PrefixBank):
            super().save(model, tokenizer, source, folder)
            return
        tensors = self.tensors(model)
        for number in range(model.config.num_prefixes):
            place = folder / ENSEMBLE_FOLDER.format(number + 1)
            place.mkdir(exist_ok=True)
            self.save_tensors(
                {n: one[number] for n, one in tensors.items()}, model.config, source, place
            )

    def shapes(self, config: BertConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `tensors`."""
        head = (config.num_labels, config.hidden_size)
        prefix = (config.pre_seq_len, prefix_width(config))
        return {adapter.PREFIX: prefix, f"{HEAD}weight": head, f"{HEAD}bias": head[:1]}

    def settings(self, config: BertConfig) -> dict:
        why = self.not_for_peft(config)
        return ({"note": why} if why else {}) | {
            "modules_to_save": ["classifier", "score"],
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": config.pre_seq_len,
            "peft_type": self.peft_type(config),
            "prefix_projection": False,
            "token_dim": config.hidden_size,
        }

    def read_settings(self, config: BertConfig, settings: dict, path: Path) -> None:
        config.pre_seq_len = settings.get("num_virtual_tokens")
        if not (isinstance(config.pre_seq_len, int) and config.pre_seq_len > 0):
            raise UserError(f"{path}: num_virtual_tokens is {config.pre_seq_len}, not 1 or more")
        config.prefix_depth = "input" if "INPUT" in settings["peft_type"] else "all"
        if settings["peft_type"] != self.peft_type(config):
            raise UserError(
                f"{path}: peft_type {settings['peft_type']} does not fit the pooling "
                f"{config.pooling} of config.json: restore both files"
            )
        config.prefix_projection = False
        config.num_prefixes = 1  # in a folder, whatever the ensemble that it belongs to
        wanted = self.settings(config)
        for name in (
            "num_attention_heads",
            "num_layers",
            "num_transformer_submodules",
            "token_dim",
        ):
            if settings.get(name) != wanted[name]:
                raise UserError(
                    f"{path}: {name} is {settings.get(name)}, but its backbone has {wanted[name]}"
                )


class Probe(AdapterMethod):
    """A linear probe: only the head is trained, over the frozen backbone's mean-pooled tokens."""

    name = "probe"
    pooling = "mean"
    peft_types = ("PROBE",)

    def title(self, config: BertConfig) -> str:
        return "linear probing"

    def is_trainable(self, name: str) -> bool:
        return self.is_head(name)


class Bias(AdapterMethod):
    """Biases, the gains of LayerNorm and the head are trained.

    BitFit (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199) trains no gains.
    """

    name = "bias"
    peft_types = ("BIAS",)

    def title(self, config: BertConfig) -> str:
        return "bias tuning"

    def is_trainable(self, name: str) -> bool:
        return self.is_head(name) or name.endswith(".bias") or "LayerNorm" in name


TUNING = {one.name: one for one in (TuningMethod(), Prefix(), Probe(), Bias())}


def method_of(config: BertConfig) -> TuningMethod:
    """Return the tuning method of a config; one that names none counts as full."""
    return TUNING[getattr(config, "tuning_method", "full")]


def put(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)
