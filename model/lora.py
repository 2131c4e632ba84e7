"""LoRA: a product of two small matrices is learned beside frozen ones.

Hu et al. 2022, https://arxiv.org/abs/2106.09685; layout and names of PEFT 0.21. R rank, N inputs of
a linear layer, M outputs.
"""

import math
from typing import Any, Required, TypedDict

import torch
from torch import nn
from transformers import BertConfig

from model.loading import Size
from model.sequence_classification import POOLINGS, BertForSequenceClassification
from model.tuning import AdapterMethod, adapter_kind
from runtime.files import UserError

TARGETS = ("query", "value")  # of each layer, as in the paper and in PEFT
PLAIN = {  # entries of adapter_config.json that would change the result: what they must be
    "use_rslora": (None, False),
    "alpha_pattern": (None, {}),
    "init_lora_weights": (None, True, False, "gaussian"),  # others change the backbone
}


class LoraLinear(nn.Linear):
    """A frozen linear layer, plus alpha / R times the product of two trained ones."""

    def __init__(self, inputs: int, outputs: int, bias: bool, rank: int, alpha: float) -> None:
        super().__init__(inputs, outputs, bias)
        self.lora_A = nn.Linear(inputs, rank, bias=False)  # [R, N]
        self.lora_B = nn.Linear(rank, outputs, bias=False)  # [M, R]
        self.scale = alpha / rank

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states [..., N] to [..., M]."""
        return super().forward(states) + self.lora_B(self.lora_A(states)) * self.scale


class BertLoraForSequenceClassification(BertForSequenceClassification):
    """A BERT whose layers named in `lora_targets` are `LoraLinear`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        for name, layer in list(self.bert.named_modules()):
            parent, _, last = name.rpartition(".")
            if isinstance(layer, nn.Linear) and last in config.lora_targets:
                sizes = layer.in_features, layer.out_features, layer.bias is not None
                learned = LoraLinear(*sizes, config.lora_r, config.lora_alpha)
                setattr(self.bert.get_submodule(parent), last, learned)
        self.post_init()


class Lora(AdapterMethod):
    """LoRA: the head and two small matrices beside each query and value matrix are trained."""

    name, title_format = "lora", "LoRA of rank {0.lora_r}"
    flags, adds = ("lora_r", "lora_alpha"), (".lora_",)
    model_class = BertLoraForSequenceClassification
    of_peft = ("LORA",)
    peft_types = tuple(adapter_kind("LORA", pooling) for pooling in POOLINGS)
    Settings = TypedDict(
        "Settings",
        {"r": Size, "lora_alpha": float, "target_modules": Required[list[str]]}
        | dict.fromkeys(PLAIN, Any),
        total=False,
    )

    def peft_type(self, config: BertConfig) -> str:
        return adapter_kind("LORA", config.pooling)

    def configure(self, config, settings, tuned):
        super().configure(config, settings, tuned)
        config.lora_targets = getattr(config, "lora_targets", list(TARGETS))

    def build(self, folders, config, fresh_head=False):
        """Build the model; new matrices start as in the paper, with a product of 0."""
        model = super().build(folders, config, fresh_head)
        for layer in model.modules() if not folders.adapter else ():
            if isinstance(layer, LoraLinear):
                nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5))
                nn.init.zeros_(layer.lora_B.weight)
        return model

    def stored_name(self, name: str) -> str:
        return f"base_model.model.{name}"

    def settings(self, config: BertConfig) -> dict:
        return {
            "lora_alpha": config.lora_alpha,
            "modules_to_save": ["classifier", "score"],
            "r": config.lora_r,
            "target_modules": list(config.lora_targets),
        }

    def read_settings(self, config, settings, path):
        for name, accepted in PLAIN.items():
            if settings.get(name) not in accepted:
                raise UserError(f"{path}: {name} is {settings[name]!r}: plain LoRA only")
        config.lora_r, config.lora_alpha = settings.get("r", 8), settings.get("lora_alpha", 8)
        config.lora_targets = sorted(settings["target_modules"])
