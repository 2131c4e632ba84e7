"""Many tuned prefixes over one frozen backbone, of which each row of a batch names its own.

K prefixes, P the longest, B batch, T text tokens, L layers, H heads, D head size, C classes: the
labels of all prefixes together.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from model import adapter, loading
from model.prefix_encoder import by_layer
from model.source import ModelError, Source, locate

UNKNOWN = -1e4  # logit of a label that a model does not know


class PrefixBank(nn.Module):
    """Classifies each row of a batch with the prefix and the head that the row names.

    Logits equal those of each tuned model alone, up to rounding. A label that a row's model does
    not know has a logit so low that its probability is 0, and the loss still finite.
    """

    def __init__(self, sources: list[Source], configs: list[BertConfig]) -> None:
        """Load K tuned folders.

        Raises: ModelError where they have no backbone, depth `all`, kind of problem or
            `max_seq_length` in common.
        """
        super().__init__()
        check_alike(sources, configs)
        self.sources, self.config = sources, merge(configs)
        self.labels = [loading.list_labels(config) for config in configs]  # of each prefix
        self.backbone = loading.load_model(sources[0], configs[0]).bert
        learnt = [
            adapter.load(source.adapter, config)
            for source, config in zip(sources, configs, strict=True)
        ]
        flat = [tensors[adapter.PREFIX] for tensors in learnt]
        self.register_buffer("lengths", torch.tensor([len(one) for one in flat]))  # [K]
        padded = pad_sequence(flat, batch_first=True)  # [K, P, 2LHD]
        slots = [torch.stack(by_layer(one, configs[0])) for one in padded]
        self.register_buffer("slots", torch.cat(slots, dim=3))  # [L, 2, H, K, P, D]
        known = loading.list_labels(self.config)
        weight = torch.zeros(len(learnt), len(known), configs[0].hidden_size)
        bias = torch.full(weight.shape[:2], UNKNOWN)
        for number, (tensors, config) in enumerate(zip(learnt, configs, strict=True)):
            columns = [known.index(name) for name in loading.list_labels(config)]
            weight[number, columns] = tensors["classifier.weight"]
            bias[number, columns] = tensors["classifier.bias"]
        self.register_buffer("weight", weight)  # [K, C, HD]
        self.register_buffer("bias", bias)  # [K, C]
        self.eval()

    @classmethod
    def open(cls, paths: list[str], max_seq_length: int | None = None) -> "PrefixBank":
        """Load the tuned folders at `paths`, numbered in this order."""
        sources = [locate(path) for path in paths]
        for path, source in zip(paths, sources, strict=True):
            if source.adapter is None:
                raise ModelError(f"--prefix_paths: {path} is not the folder of a tuned prefix")
        configs = [loading.load_config(source, tuned=True) for source in sources]
        for config in configs:
            loading.set_max_seq_length(config, max_seq_length)
        return cls(sources, configs)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, served_by: torch.Tensor
    ) -> SequenceClassifierOutput:
        """Classify int64 [B, T] tokens, row i by prefix number served_by[i]; logits [B, C]."""
        device = input_ids.device.type
        if torch.is_autocast_enabled(device):  # cast once, not in each batch
            self.slots = self.slots.to(torch.get_autocast_dtype(device))
        lengths = self.lengths[served_by]  # [B]
        longest = int(lengths.max())
        place = torch.arange(longest + input_ids.shape[1], device=input_ids.device)
        there = place[:longest] < lengths[:, None]  # [B, P]
        used, number = served_by.unique(return_inverse=True)  # G prefixes; of each row, its own
        places = None
        if len(used) > 1:
            counts = number.bincount()
            size = int(counts.max())
            order = number.argsort(stable=True)
            in_order = torch.arange(len(number), device=number.device)
            first = (counts.cumsum(0) - counts)[number[order]]  # in order, of each row's prefix
            place_of_row = torch.empty_like(number)
            place_of_row[order] = number[order] * size + in_order - first
            places = place_of_row, size
        chosen = used if len(used) < len(self.lengths) else slice(None)  # all need no copy
        state = self.backbone(
            input_ids,
            attention_mask=torch.cat([there.to(attention_mask.dtype), attention_mask], dim=1),
            position_ids=place[: input_ids.shape[1]] + lengths[:, None],
            prefix=lambda layer: self.slots[layer][:, :, chosen, :longest],  # [2, H, G, P, D]
            places=places,
        ).pooler_output
        logits = torch.einsum("bcd,bd->bc", self.weight[served_by], state.float())
        return SequenceClassifierOutput(logits=logits + self.bias[served_by])


def check_alike(sources: list[Source], configs: list[BertConfig]) -> None:
    """Raises: ModelError naming the first folder that does not go with the first one, and why."""

    def traits(source: Source, config: BertConfig) -> dict:
        return {
            "backbone": source.backbone,
            "problem_type": loading.task_of(config, None),
            "max_seq_length": config.max_seq_length,
        }

    first = traits(sources[0], configs[0])
    for source, config in zip(sources, configs, strict=True):
        if config.prefix_depth != "all":
            raise ModelError(f"--prefix_paths: {source.adapter} is no prefix of depth all")
        for name, value in traits(source, config).items():
            if value != first[name]:
                raise ModelError(
                    f"--prefix_paths: {name} of {source.adapter} is {value}, "
                    f"that of {sources[0].adapter} {first[name]}"
                )


def merge(configs: list[BertConfig]) -> BertConfig:
    """The first config, with the labels of all, in the order in which they come up."""
    merged = BertConfig.from_dict(configs[0].to_dict())
    names = (name for config in configs for name in loading.list_labels(config))
    loading.set_labels(merged, list(dict.fromkeys(names)))
    merged.pre_seq_len = max(config.pre_seq_len for config in configs)
    return merged
