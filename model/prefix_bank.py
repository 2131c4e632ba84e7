"""Many prefixes on one frozen backbone; each row of a batch has its own, or all of them.

K prefixes, P length of the longest (of all, or in a batch), G prefixes in a batch, B batch, T text
tokens, L layers, H heads, D head size (HD the hidden size), C classes (the most of any prefix).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput

from model.predictions import average
from model.prefix_encoder import by_layer, on_gpu, ready_mask
from model.sequence_classification import POOLINGS
from runtime.flags import MULTI_LABEL

UNKNOWN = -1e4  # logit of a label that a prefix does not know


class Stacked(nn.Module):
    """The parameters of K modules of one kind, stacked under their usual names."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))


class LearnedSlots(nn.Module):
    """The keys and values of K prefixes, as parameters [K, P, 2LHD] of the usual name."""

    def __init__(self, config: BertConfig, flat: torch.Tensor) -> None:
        super().__init__()
        self.config, self.embedding = config, Stacked(weight=flat)

    def forward(self) -> torch.Tensor:
        """Return the slots: [L, 2, H, K, P, D]."""
        return by_layer(self.embedding.weight, self.config)


class FixedSlots(nn.Module):
    """The keys and values of K tuned prefixes: [L, 2, H, K, P, D]."""

    def __init__(self, slots: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("slots", slots, persistent=False)

    def forward(self) -> torch.Tensor:
        """Return the slots, cast once instead of in every batch."""
        device = self.slots.device.type
        if torch.is_autocast_enabled(device):
            self.slots = self.slots.to(torch.get_autocast_dtype(device))
        return self.slots


@dataclass(frozen=True)
class TunedPrefix:
    """A tuned prefix with its head, in the layout that scoring needs."""

    slots: torch.Tensor  # [L, 2, H, P, D]
    weight: torch.Tensor  # [C, HD]
    bias: torch.Tensor  # [C]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in vars(self).values())


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
        slots: LearnedSlots | FixedSlots,
        lengths: torch.Tensor,
        heads: Stacked,
        head_dtype: torch.dtype = torch.float32,
    ) -> None:
        """lengths: of the prefixes, [K]. heads: weight [K, C, HD] and bias [K, C].

        head_dtype: to which the heads round. The head of a single prefix, which a server must
        equal, rounds to the precision of the machine.
        """
        super().__init__()
        self.bert, self.config, self.head_dtype = bert, config, head_dtype
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.prefix_encoder, self.classifier = slots, heads
        self.register_buffer("lengths", lengths)

    @classmethod
    def from_tuned(
        cls,
        bert: BertModel,
        config: BertConfig,
        tuned: list[TunedPrefix],
        head_dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Join tuned prefixes of any length.

        Shorter heads get `UNKNOWN` at their end. Labels are not matched by name: that does
        `ModelSource.read_prefixes`, and a server cuts the end off.
        """
        parts, pad = [prefix.slots for prefix in tuned], nn.functional.pad
        lengths = torch.tensor([part.shape[3] for part in parts], device=parts[0].device)
        longest = max(part.shape[3] for part in parts)
        if any(part.shape[3] < longest for part in parts):
            parts = [pad(part, (0, 0, 0, longest - part.shape[3])) for part in parts]
        # [L, 2, H, K, P, D]; no copy of a single one
        slots = torch.stack(parts, dim=3) if len(parts) > 1 else parts[0].unsqueeze(3)
        weight = pad_sequence([prefix.weight for prefix in tuned], batch_first=True)
        bias = pad_sequence([prefix.bias for prefix in tuned], True, padding_value=UNKNOWN)
        heads = Stacked(weight=weight, bias=bias)
        bank = cls(bert, config, FixedSlots(slots), lengths, heads, head_dtype)
        bank.dropout = nn.Identity()  # a server has a bank for each batch: eval() takes time
        return bank

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
        slots = self.prefix_encoder()
        lengths = self.lengths[prefix_index]  # [B]
        if on_gpu(input_ids):  # each row has a copy, since finding what rows share would wait
            longest, chosen = slots.shape[4], prefix_index
            each = torch.arange(len(prefix_index), device=prefix_index.device)
            rows = each, each[:, None]
        else:
            longest, (chosen, rows) = int(lengths.max()), self.share(prefix_index)
        position = torch.arange(longest + input_ids.shape[1], device=input_ids.device)
        prefix_mask = position[:longest] < lengths[:, None]  # [B, P]
        mask = torch.cat([prefix_mask.to(attention_mask.dtype), attention_mask], dim=1)
        outputs = self.bert(
            input_ids,
            attention_mask=ready_mask(mask),
            position_ids=position[: input_ids.shape[1]] + lengths[:, None],
            prefix=lambda layer: slots[layer][:, :, chosen, :longest],  # [2, H, G, P, D]
            table_rows=rows,
        )
        pooled = POOLINGS[self.config.pooling](outputs, attention_mask)
        return SequenceClassifierOutput(logits=self.head(self.dropout(pooled), prefix_index))

    def share(
        self, prefix_index: torch.Tensor
    ) -> tuple[torch.Tensor | slice, tuple[torch.Tensor, torch.Tensor] | None]:
        """Return the prefixes that a batch needs, G of them, and `table_rows`, see `attend`."""
        used, group = prefix_index.unique(return_inverse=True)  # [G]; each row's index into it, [B]
        if len(used) == 1:
            return slice(int(used), int(used) + 1), None
        # a slice needs no copy
        chosen = used if len(used) < len(self.lengths) else slice(None)
        return chosen, table_rows(group)

    def head(self, pooled: torch.Tensor, prefix_index: torch.Tensor) -> torch.Tensor:
        """Apply each row's head to [B, HD]: logits [B, C]."""
        weight, bias = self.classifier.weight[prefix_index], self.classifier.bias[prefix_index]
        if self.head_dtype == torch.float32:
            return torch.einsum("bcd,bd->bc", weight, pooled.float()) + bias
        with torch.autocast(pooled.device.type, enabled=False):
            pooled, weight, bias = (x.to(self.head_dtype).float() for x in (pooled, weight, bias))
            return (torch.einsum("bcd,bd->bc", weight, pooled) + bias).to(self.head_dtype)

    def average(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> SequenceClassifierOutput:
        """Average the probabilities of all prefixes, scored in one batch: logits [B, C]."""
        count, batch = len(self.lengths), len(input_ids)
        index = torch.arange(count, device=input_ids.device).repeat_interleave(batch)  # [K*B]
        rows = (tensor.repeat(count, 1) for tensor in (input_ids, attention_mask))  # [K*B, T]
        logits = self(*rows, index).logits.view(count, batch, -1)  # [K, B, C]
        multi_label = self.config.problem_type == MULTI_LABEL
        return SequenceClassifierOutput(logits=average(logits, multi_label))


def table_rows(group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Place each row in a table of G prefixes times R rows; group: int64 [B], each row's prefix.

    R is the number of rows of the most common prefix. Returns the place of each row, int64 [B], and
    the row at each place, int64 [G, R], 0 if it is empty.
    """
    counts = group.bincount()
    size = int(counts.max())
    order = group.argsort(stable=True)
    in_order = torch.arange(len(group), device=group.device)
    first = (counts.cumsum(0) - counts)[group[order]]  # [B], sorted: start of its prefix
    place = torch.empty_like(group)
    place[order] = group[order] * size + in_order - first
    source = torch.zeros_like(counts).repeat(size)
    source[place] = in_order
    return place, source.view(-1, size)
