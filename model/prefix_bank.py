"""Many tuned prefixes on one frozen backbone; each row of a batch has its own, or all of them.

K prefixes, P length of the longest (of all, or in a batch), G prefixes in a batch, B batch, T text
tokens, L layers, H heads, D head size (HD the hidden size), C classes (the labels of all prefixes).
"""

import logging
import math
from argparse import Namespace
from typing import Self

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from model import adapter
from model.loading import list_labels, problem_type, set_labels, set_max_seq_length
from model.prefix_encoder import by_layer
from model.source import Source, backbone_sha256, locate
from model.start import Start, check_backbone, read_model_config
from model.tuning import TUNING
from runtime.files import UserError

logger = logging.getLogger(__name__)

UNKNOWN = -1e4  # logit of a label that a prefix does not know


class PrefixBank(nn.Module):
    """Classifies each row of a batch with the prefix and the head that the row names.

    Up to rounding, the logits are the same as from each tuned model alone. A label that a row's
    prefix does not know has a logit so low that its probability is 0, yet the loss stays finite.
    """

    def __init__(self, sources: list[Source], configs: list[BertConfig]) -> None:
        """Load K adapter folders.

        Raises: UserError if they do not all have depth `all` and the same backbone, problem type
            and `max_seq_length`.
        """
        super().__init__()
        check_alike(sources, configs)
        self.sources, self.config = sources, merge(configs)
        self.labels_by_prefix = [list_labels(config) for config in configs]
        method = TUNING["prefix"]
        model = method.build(sources[0], configs[0]).requires_grad_(False)
        self.bert = model.bert
        tuned = [
            adapter.read(source.adapter, method.shapes(config))
            for source, config in zip(sources, configs, strict=True)
        ]
        flat = [tensors[adapter.PREFIX] for tensors in tuned]
        self.register_buffer("lengths", torch.tensor([len(one) for one in flat]))  # [K]
        padded = pad_sequence(flat, batch_first=True)  # [K, P, 2LHD]
        slots = [torch.stack(by_layer(one, configs[0])) for one in padded]
        self.register_buffer("slots", torch.cat(slots, dim=3))  # [L, 2, H, K, P, D]
        names = list_labels(self.config)
        weight = torch.zeros(len(tuned), len(names), configs[0].hidden_size)
        bias = torch.full(weight.shape[:2], UNKNOWN)
        for number, tensors in enumerate(tuned):
            columns = [names.index(name) for name in self.labels_by_prefix[number]]
            weight[number, columns] = tensors["classifier.weight"]
            bias[number, columns] = tensors["classifier.bias"]
        self.register_buffer("weight", weight)  # [K, C, HD]
        self.register_buffer("bias", bias)  # [K, C]
        self.eval()

    @classmethod
    def open(cls, paths: list[str], max_seq_length: int | None = None) -> Self:
        """Load the adapter folders at `paths`, numbered in this order."""
        sources = [locate(path) for path in paths]
        configs: list[BertConfig] = []
        checksums = {one: backbone_sha256(one) for one in {source.backbone for source in sources}}
        for path, source in zip(paths, sources, strict=True):
            config, method = read_model_config(source)
            if method is not TUNING["prefix"]:
                raise UserError(f"--prefix_paths: {path} is not the adapter folder of a prefix")
            check_backbone(source, config, checksums[source.backbone])
            set_max_seq_length(config, method.virtual_tokens(config), max_seq_length)
            configs.append(config)
        return cls(sources, configs)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        prefix_index: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classify int64 [B, T] tokens, row i with prefix number prefix_index[i]; logits [B, C].

        Without `prefix_index`, every prefix classifies every row, and their probabilities are
        averaged.
        """
        if prefix_index is None:
            return self.average(input_ids, attention_mask)
        device = input_ids.device.type
        if torch.is_autocast_enabled(device):  # cast once instead of in every batch
            self.slots = self.slots.to(torch.get_autocast_dtype(device))
        lengths = self.lengths[prefix_index]  # [B]
        longest = int(lengths.max())
        position = torch.arange(longest + input_ids.shape[1], device=input_ids.device)
        prefix_mask = position[:longest] < lengths[:, None]  # [B, P]
        used, group = prefix_index.unique(return_inverse=True)  # [G]; each row's index into it, [B]
        places = place_rows(group) if len(used) > 1 else None
        chosen = used if len(used) < len(self.lengths) else slice(None)  # a slice needs no copy
        pooled = self.bert(
            input_ids,
            attention_mask=torch.cat([prefix_mask.to(attention_mask.dtype), attention_mask], dim=1),
            position_ids=position[: input_ids.shape[1]] + lengths[:, None],
            prefix=lambda layer: self.slots[layer][:, :, chosen, :longest],  # [2, H, G, P, D]
            places=places,
        ).pooler_output
        logits = torch.einsum("bcd,bd->bc", self.weight[prefix_index], pooled.float())
        return SequenceClassifierOutput(logits=logits + self.bias[prefix_index])

    def average(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> SequenceClassifierOutput:
        """Average the probabilities of all prefixes, scored in one batch: logits [B, C]."""
        count, batch = len(self.lengths), len(input_ids)
        index = torch.arange(count, device=input_ids.device).repeat_interleave(batch)  # [K*B]
        rows = (tensor.repeat(count, 1) for tensor in (input_ids, attention_mask))  # [K*B, T]
        logits = self(*rows, index).logits.view(count, batch, -1)  # [K, B, C]
        if self.config.problem_type == "multi_label_classification":
            return SequenceClassifierOutput(logits=logits.sigmoid().mean(dim=0).logit(eps=1e-7))
        mean = logits.log_softmax(dim=2).logsumexp(dim=0) - math.log(count)
        return SequenceClassifierOutput(logits=mean)


def place_rows(group: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Place each row in a table of G prefixes times R rows; group: int64 [B], each row's prefix.

    Returns the places, int64 [B], and R, the number of rows of the most common prefix.
    """
    counts = group.bincount()
    size = int(counts.max())
    order = group.argsort(stable=True)
    in_order = torch.arange(len(group), device=group.device)
    first = (counts.cumsum(0) - counts)[group[order]]  # [B], sorted: start of its prefix
    place = torch.empty_like(group)
    place[order] = group[order] * size + in_order - first
    return place, size


def check_alike(sources: list[Source], configs: list[BertConfig]) -> None:
    """Check that all folders fit the first. Raises: UserError naming a folder that does not."""

    def traits(source: Source, config: BertConfig) -> dict:
        return {
            "backbone": source.backbone,
            "problem_type": problem_type(config, None),
            "max_seq_length": config.max_seq_length,
        }

    first = traits(sources[0], configs[0])
    for source, config in zip(sources, configs, strict=True):
        if config.prefix_depth != "all":
            raise UserError(f"--prefix_paths: {source.adapter} is not a prefix of depth all")
        for name, value in traits(source, config).items():
            if value != first[name]:
                raise UserError(
                    f"--prefix_paths: {name} of {source.adapter} is {value}, "
                    f"but in {sources[0].adapter} it is {first[name]}"
                )


def merge(configs: list[BertConfig]) -> BertConfig:
    """Return the first config with the labels of all configs, in order of first occurrence."""
    merged = BertConfig.from_dict(configs[0].to_dict())
    names = (name for config in configs for name in list_labels(config))
    set_labels(merged, list(dict.fromkeys(names)))
    merged.pre_seq_len = max(config.pre_seq_len for config in configs)
    return merged


class BankStart(Start):
    """The start of a run with --prefix_paths: a bank that only predicts."""

    def __init__(self, args: Namespace) -> None:
        self.bank = PrefixBank.open(args.prefix_paths, args.max_seq_length)
        self.config, self.sources = self.bank.config, self.bank.sources
        self.source, self.method = self.sources[0], TUNING["prefix"]
        self.config.problem_type = problem_type(self.config, args.problem_type)
        self.title = f"predictions of {', '.join(args.prefix_paths)}"
        self.labels_by_prefix, self.started_from = self.bank.labels_by_prefix, None
        if args.prefix_column is None:  # all prefixes classify each row
            for path, names in zip(args.prefix_paths, self.labels_by_prefix, strict=True):
                if {*names} != {*self.labels}:
                    raise UserError(
                        f"--prefix_paths: {path} has other labels than {args.prefix_paths[0]}, so "
                        "they cannot be averaged: pass --prefix_column, or prefixes for one task"
                    )
            self.labels_by_prefix = None

    def build(self, args: Namespace) -> PrefixBank:
        return self.bank

    def count(self, model: PrefixBank) -> dict[str, int]:
        logger.info("%d tuned prefixes on one backbone", len(self.sources))
        return {}
