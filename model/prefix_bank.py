"""Many prefixes on one frozen backbone; each row of a batch has its own, or all of them.

K prefixes, P length of the longest (of all, or in a batch), G prefixes in a batch, B batch, T text
tokens, L layers, H heads, D head size (HD the hidden size), C classes (the labels of all prefixes).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput

from model.predictions import average
from model.prefix_encoder import on_gpu, ready_mask
from model.sequence_classification import POOLINGS

UNKNOWN = -1e4  # logit of a label that a prefix does not know


class Stacked(nn.Module):
    """The parameters of K modules of one kind, stacked under their usual names."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))


class PrefixBank(nn.Module):
    """Classifies each row of a batch with the prefix and the head that the row names.

    Up to rounding, the logits are the same as from each prefix alone. A label that a row's prefix
    does not know has a logit so low that its probability is 0, yet the loss stays finite. The
    parameters have the names that they have with one prefix, and a first dimension of K.
    """

    def __init__(
        self,
        bert: BertModel,
        config: BertConfig,
        prefixes: list[torch.Tensor],
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> None:
        """prefixes: K times [P, 2LHD]. weight, bias: of the heads, [K, C, HD] and [K, C]."""
        super().__init__()
        self.bert, self.config = bert, config
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("lengths", torch.tensor([len(one) for one in prefixes]))  # [K]
        self.prefix_encoder = nn.Module()
        self.prefix_encoder.embedding = Stacked(weight=pad_sequence(prefixes, batch_first=True))
        self.classifier = Stacked(weight=weight, bias=bias)
        self.ready: torch.Tensor | None = None  # the slots of frozen prefixes

    def slots(self, device: str) -> torch.Tensor:
        """Return the keys and values of all prefixes: [L, 2, H, K, P, D]."""
        flat = self.prefix_encoder.embedding.weight  # [K, P, 2LHD]
        if self.ready is None or flat.requires_grad:
            heads, layers = self.config.num_attention_heads, self.config.num_hidden_layers
            found = flat.view(*flat.shape[:2], layers, 2, heads, -1).permute(2, 3, 4, 0, 1, 5)
            if flat.requires_grad:
                return found
            self.ready = found.contiguous()
        if torch.is_autocast_enabled(device):  # cast once instead of in every batch
            self.ready = self.ready.to(torch.get_autocast_dtype(device))
        return self.ready

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
        slots = self.slots(input_ids.device.type)
        lengths = self.lengths[prefix_index]  # [B]
        if on_gpu(input_ids):  # each row has a copy, since finding what rows share would wait
            longest, chosen = slots.shape[4], prefix_index
            places = torch.arange(len(prefix_index), device=prefix_index.device), 1
        else:
            longest, (chosen, places) = int(lengths.max()), self.share(prefix_index)
        position = torch.arange(longest + input_ids.shape[1], device=input_ids.device)
        prefix_mask = position[:longest] < lengths[:, None]  # [B, P]
        mask = torch.cat([prefix_mask.to(attention_mask.dtype), attention_mask], dim=1)
        outputs = self.bert(
            input_ids,
            attention_mask=ready_mask(mask),
            position_ids=position[: input_ids.shape[1]] + lengths[:, None],
            prefix=lambda layer: slots[layer][:, :, chosen, :longest],  # [2, H, G, P, D]
            places=places,
        )
        pooled = POOLINGS[self.config.pooling].pool(outputs, attention_mask)
        weight, bias = self.classifier.weight[prefix_index], self.classifier.bias[prefix_index]
        return SequenceClassifierOutput(logits=self.head(self.dropout(pooled), weight, bias))

    def share(
        self, prefix_index: torch.Tensor
    ) -> tuple[torch.Tensor | slice, tuple[torch.Tensor, int] | None]:
        """Return the prefixes that a batch needs, G of them, and `places`, see `attend`."""
        used, group = prefix_index.unique(return_inverse=True)  # [G]; each row's index into it, [B]
        if len(used) == 1:
            return slice(int(used), int(used) + 1), None
        # a slice needs no copy
        chosen = used if len(used) < len(self.lengths) else slice(None)
        return chosen, place_rows(group)

    def head(self, pooled: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Apply each row's head, [B, C, HD] and [B, C], to [B, HD]: logits [B, C]."""
        return torch.einsum("bcd,bd->bc", weight, pooled.float()) + bias

    def average(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> SequenceClassifierOutput:
        """Average the probabilities of all prefixes, scored in one batch: logits [B, C]."""
        count, batch = len(self.lengths), len(input_ids)
        index = torch.arange(count, device=input_ids.device).repeat_interleave(batch)  # [K*B]
        rows = (tensor.repeat(count, 1) for tensor in (input_ids, attention_mask))  # [K*B, T]
        logits = self(*rows, index).logits.view(count, batch, -1)  # [K, B, C]
        several = self.config.problem_type == "multi_label_classification"
        return SequenceClassifierOutput(logits=average(logits, several))


@dataclass(frozen=True)
class TunedPrefix:
    """A tuned prefix with its head, in the layout that scoring needs."""

    slots: torch.Tensor  # [L, 2, H, P, D]
    weight: torch.Tensor  # [C, HD]
    bias: torch.Tensor  # [C]

    @classmethod
    def of(
        cls, config: BertConfig, flat: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> Self:
        """flat: [P, 2LHD]."""
        slots = flat.view(len(flat), config.num_hidden_layers, 2, config.num_attention_heads, -1)
        slots = slots.permute(1, 2, 3, 0, 4).clone(memory_format=torch.contiguous_format)
        return cls(slots, weight.clone(), bias.clone())  # copies do not depend on the file

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in vars(self).values())


class FrozenBank(PrefixBank):
    """A bank of just the prefixes that a batch needs; building one takes a single copy of them."""

    def __init__(self, bert: BertModel, config: BertConfig, tuned: list[TunedPrefix]) -> None:
        nn.Module.__init__(self)
        self.bert, self.config, self.dropout = bert, config, nn.Identity()
        device = tuned[0].slots.device
        self.lengths = torch.tensor([one.slots.shape[3] for one in tuned], device=device)  # [K]
        weight = pad_sequence([one.weight for one in tuned], batch_first=True)
        bias = pad_sequence([one.bias for one in tuned], batch_first=True, padding_value=UNKNOWN)
        self.classifier = Stacked(weight=weight, bias=bias)
        longest = max(one.slots.shape[3] for one in tuned)
        padded = (
            nn.functional.pad(one.slots, (0, 0, 0, longest - one.slots.shape[3]))
            if one.slots.shape[3] < longest
            else one.slots
            for one in tuned
        )
        # [L, 2, H, K, P, D]; no copy of a single one
        self.ready = (
            torch.stack(list(padded), dim=3) if len(tuned) > 1 else tuned[0].slots.unsqueeze(3)
        )

    def slots(self, device: str) -> torch.Tensor:
        return self.ready

    def head(self, pooled: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Round as the head of a single prefix does: in bfloat16, its logits are bfloat16 too."""
        dtype = self.ready.dtype
        with torch.autocast(pooled.device.type, enabled=False):
            pooled, weight, bias = (x.to(dtype).float() for x in (pooled, weight, bias))
            return super().head(pooled, weight, bias).to(dtype)


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
