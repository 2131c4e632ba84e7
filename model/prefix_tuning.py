"""Prefix tuning: virtual tokens and the head are trained, the backbone is frozen.

P virtual tokens.
"""

import logging
from pathlib import Path
from typing import ClassVar, Required, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig

from model import adapter
from model.loading import Size
from model.prefix_bank import LearnedSlots, PrefixBank, Stacked, TunedPrefix
from model.prefix_encoder import by_layer, keys_and_values, prefix_width
from model.sequence_classification import POOLINGS, BertPrefixForSequenceClassification
from model.tuning import HEAD, AdapterMethod, adapter_kind
from runtime.columns import MEMBER_FOLDER
from runtime.files import UserError

logger = logging.getLogger(__name__)

OF_BACKBONE = {  # entries of adapter_config.json, and of the config, that a prefix cannot choose
    "num_attention_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "token_dim": "hidden_size",
}


class Prefix(AdapterMethod):
    """Prefix tuning, at the input or in every layer, one prefix or several side by side."""

    name, adds = "prefix", ("prefix_encoder.",)
    flags = ("pre_seq_len", "prefix_depth", "prefix_projection", "prefix_hidden_size")
    model_class = BertPrefixForSequenceClassification
    # PEFT can load the first; the others are of depth input or of other poolings
    peft_types = ("PREFIX_TUNING", *(adapter_kind("INPUT_PREFIX", pooling) for pooling in POOLINGS))
    peft_types += tuple(adapter_kind("PREFIX", p) for p in POOLINGS if not POOLINGS[p].reads_pooler)
    of_peft = ("PREFIX_TUNING",)
    Settings = TypedDict(
        "Settings",
        {"num_virtual_tokens": Required[Size], "num_transformer_submodules": int | None}
        | dict.fromkeys(OF_BACKBONE, int | None),
        total=False,
    )
    # a reparametrised prefix is stored as the MLP's output
    stored: ClassVar[dict] = {"prefix_projection": False}

    def title(self, config: BertConfig) -> str:
        where = "in every layer" if config.prefix_depth == "all" else "at the input only"
        several = f", {config.num_prefixes} prefixes" * (config.num_prefixes > 1)
        return f"prefix tuning {where}{several}"

    def not_for_peft(self, config: BertConfig) -> str:
        """Return why PEFT cannot load the prefix; blank if it can."""
        if config.prefix_depth == "input":
            return (
                "PEFT cannot load a prefix of depth input: its prompt tuning reads the first "
                "virtual token where this model reads [CLS]"
            )
        if not POOLINGS[config.pooling].reads_pooler:
            return f"PEFT cannot load a prefix with {config.pooling} pooling"
        return ""

    def peft_type(self, config: BertConfig) -> str:
        if not self.not_for_peft(config):
            return "PREFIX_TUNING"
        kind = "INPUT_PREFIX" if config.prefix_depth == "input" else "PREFIX"
        return adapter_kind(kind, config.pooling)

    def configure(self, config, settings, tuned):
        super().configure(config, settings, tuned)
        config.num_prefixes = settings["num_prefixes"]
        if why := self.not_for_peft(config):
            logger.warning("warning: %s", why)

    def fits_bank(self, config: BertConfig) -> bool:
        return config.prefix_depth == "all"

    def is_exempt(self, name, parameter):
        """Also exempt the prefix: it acts as an input, not as a weight."""
        return super().is_exempt(name, parameter) or name in (adapter.PREFIX, f"{HEAD}bias")

    def build(self, folders, config, fresh_head=False):
        """Build the model; `config.num_prefixes` above 1 makes it a bank of new prefixes."""
        model = super().build(folders, config, fresh_head)
        others = getattr(config, "num_prefixes", 1) - 1
        if not others:
            return model

        def draw(first: Tensor) -> Tensor:
            drawn = (config.initializer_range * torch.randn(first.shape) for _ in range(others))
            return torch.stack([first.detach(), *drawn])

        slots = LearnedSlots(config, draw(model.get_parameter(adapter.PREFIX)))
        weight = draw(model.classifier.weight)
        heads = Stacked(weight=weight, bias=torch.zeros(weight.shape[:2]))
        lengths = torch.full((len(weight),), config.pre_seq_len)
        return PrefixBank(model.bert, config, slots, lengths, heads)

    def initialise(self, model, tokenizer, settings, texts):
        """Start from real words, repeated or cut to P: their keys and values, or their embeddings.

        Words: --prefix_init_text, else training texts. Raises: UserError if there are no words.
        """
        if settings["prefix_init"] != "text":
            return
        config, bert, prefixes = model.config, model.bert, []
        for number in range(config.num_prefixes):
            words = settings["prefix_init_text"]
            if words is None:  # 64 random texts fill a prefix of the default length
                random = np.random.default_rng(settings["seed"] + number)
                words = " ".join(texts[row] for row in random.permutation(len(texts))[:64])
            ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
            if not ids:
                raise UserError(f"no word to start from in '{words}': see --prefix_init_text")
            ids = torch.from_numpy(np.resize(ids, config.pre_seq_len)).to(bert.device)
            at_input = config.prefix_depth == "input"
            states = bert.get_input_embeddings()(ids) if at_input else keys_and_values(bert, ids)
            prefixes.append(states)
        flat = torch.stack(prefixes) if config.num_prefixes > 1 else prefixes[0]
        model.load_state_dict({adapter.PREFIX: flat}, strict=False)

    @torch.no_grad()
    def tensors(self, model):
        """Return prefix and head; a reparametrised prefix is stored as the MLP's output."""
        head = {HEAD + name: parameter for name, parameter in model.classifier.named_parameters()}
        if isinstance(model, PrefixBank):
            return {adapter.PREFIX: model.get_parameter(adapter.PREFIX), **head}
        return {adapter.PREFIX: model.prefix_encoder(), **head}

    def stored_name(self, name: str) -> str:
        return adapter.STORED_PREFIX if name == adapter.PREFIX else super().stored_name(name)

    def save(self, model, tokenizer, folders, folder):
        """Write an adapter folder or, for several prefixes, a folder that contains one for each."""
        if not isinstance(model, PrefixBank):
            super().save(model, tokenizer, folders, folder)
            return
        stacked = self.tensors(model)
        for number in range(model.config.num_prefixes):
            place = folder / MEMBER_FOLDER.format(number + 1)
            place.mkdir(exist_ok=True)
            tensors = {name: tensor[number] for name, tensor in stacked.items()}
            self.save_tensors(tensors, model.config, folders, place)

    def settings(self, config: BertConfig) -> dict:
        why = self.not_for_peft(config)
        return ({"note": why} if why else {}) | {
            "modules_to_save": ["classifier", "score"],
            "num_transformer_submodules": 1,
            "num_virtual_tokens": config.pre_seq_len,
            "prefix_projection": False,
            **{name: getattr(config, ours) for name, ours in OF_BACKBONE.items()},
        }

    def read_settings(self, config, settings, path):
        config.pre_seq_len = settings["num_virtual_tokens"]
        config.prefix_depth = "input" if "INPUT" in settings["peft_type"] else "all"
        if settings["peft_type"] != self.peft_type(config):
            raise UserError(
                f"{path}: peft_type {settings['peft_type']} does not fit the pooling "
                f"{config.pooling} of config.json: restore both files"
            )
        config.prefix_projection = False
        config.num_prefixes = 1  # in a folder, whatever the ensemble that it belongs to
        wanted = self.settings(config)
        for name in (*OF_BACKBONE, "num_transformer_submodules"):
            if settings.get(name) != wanted[name]:
                raise UserError(
                    f"{path}: {name} is {settings.get(name)}, but its backbone has {wanted[name]}"
                )


def read_prefix(
    folder: Path,
    config: BertConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TunedPrefix:
    """Read the prefix, in `dtype`, and the head of an adapter folder. Raises: UserError."""
    head = (config.num_labels, config.hidden_size)
    shapes = {f"{HEAD}weight": head, f"{HEAD}bias": head[:1]}
    shapes[adapter.PREFIX] = (config.pre_seq_len, prefix_width(config))
    weight, bias, flat = (t.to(device) for t in adapter.read(folder, shapes).values())
    slots = by_layer(flat.to(dtype)[None], config)[:, :, :, 0]  # [L, 2, H, P, D]
    # copies, whatever happens to the file
    slots = slots.clone(memory_format=torch.contiguous_format)
    return TunedPrefix(slots, weight.clone(), bias.clone())
