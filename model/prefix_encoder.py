"""The prefix: what P virtual tokens hold, how they start, and how layers attend to them.

P prefix tokens, T text tokens, B batch, L layers, H heads, D head size (H*D the hidden size), G
prefixes in a batch: 1 that all rows share, or B, one for each row.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward


class PrefixEncoder(nn.Module):
    """Learns the prefix, directly or through an MLP (reparametrisation).

    Layout and names follow P-tuning v2 (Liu et al. 2022, https://arxiv.org/abs/2110.07602;
    THUDM/P-tuning-v2, model/prefix_encoder.py) and PEFT's prefix tuning; the MLP is that of
    Li & Liang 2021 (https://arxiv.org/abs/2101.00190). Reads `pre_seq_len`, `prefix_depth`,
    `prefix_projection` and `prefix_hidden_size` from the config.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = prefix_width(config)
        if config.prefix_projection:
            self.embedding = nn.Embedding(config.pre_seq_len, config.hidden_size)
            self.transform = nn.Sequential(
                nn.Linear(config.hidden_size, config.prefix_hidden_size),
                nn.Tanh(),
                nn.Linear(config.prefix_hidden_size, width),
            )
        else:
            self.embedding = nn.Embedding(config.pre_seq_len, width)
            self.transform = nn.Identity()

    def forward(self) -> torch.Tensor:
        """The flat prefix [P, W], see `prefix_width`. Once a step, whatever the batch."""
        return self.transform(self.embedding.weight)


def prefix_width(config: BertConfig) -> int:
    """Numbers that one virtual token holds: keys and values of all layers, or an embedding."""
    slots = 1 if config.prefix_depth == "input" else 2 * config.num_hidden_layers
    return slots * config.hidden_size


@torch.no_grad()
def activations(bert: BertModel, words: torch.Tensor) -> torch.Tensor:
    """Keys and values that the backbone computes for P real words, as a flat prefix [P, 2LHD].

    A start from them learns faster and better than a random one where data are few (Li & Liang
    2021, section 7.4). words: int64 [P].
    """
    bert.eval()
    states = bert(words[None], output_hidden_states=True).hidden_states
    flat = [
        projection(state[0])
        for state, layer in zip(states, bert.encoder.layer, strict=False)  # the last has no layer
        for projection in (layer.attention.self.key, layer.attention.self.value)
    ]
    return torch.cat(flat, dim=1)  # 2L of [P, HD] -> [P, 2LHD]


def by_layer(flat: torch.Tensor, config: BertConfig) -> tuple[torch.Tensor, ...]:
    """Cut a flat prefix into the keys and values of each layer: L times [2, H, G=1, P, D]."""
    # [P, 2LHD] -> [P, L, 2, H, 1, D] -> [L, 2, H, 1, P, D]
    slots = flat.view(len(flat), config.num_hidden_layers, 2, config.num_attention_heads, 1, -1)
    return slots.permute(1, 2, 3, 4, 0, 5).unbind()


def to_the_bit(module: nn.Module) -> bool:
    """Whether to compute as transformers and PEFT do, to the bit: where a model is just called.

    The loop's own passes, in training mode or in torch's inference mode, go shorter ways, which
    are equal up to rounding.
    """
    return not (module.training or torch.is_inference_mode_enabled())


def attend(
    alone: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    prefix: Callable[[int], torch.Tensor] | None = None,
    places: tuple[torch.Tensor, int] | None = None,
    **unused,
) -> tuple[torch.Tensor, None]:
    """Attention of a BERT layer over [prefix; text]; an attention function of transformers.

    `prefix` gives keys and values by the layer's number, [2, H, G, P, D]; they are no part of
    the text, so that [CLS] stays the first output. query, key, value: [B, H, T, D]; the mask is
    P+T wide. places: see `attend_jointly`. Returns [B, T, H, D].

    `to_the_bit` it goes through `alone`, transformers' own attention, on a copy of the prefix for
    each row, as in PEFT; else, and for a batch of mixed prefixes, by `attend_jointly`.
    """
    # under autocast the text is bfloat16 and the prefix is not
    before = prefix and prefix(module.layer_idx).to(key.dtype)
    if not to_the_bit(module) or places is not None:
        out = attend_jointly(query, key, value, before, places, attention_mask, scaling, dropout)
        return out, None
    if prefix:
        # [H, 1, P, D] -> [B, H, P, D], before [B, H, T, D]
        rows = before.transpose(1, 2).expand(-1, len(query), -1, -1, -1)
        key, value = (torch.cat(pair, dim=2) for pair in zip(rows, (key, value), strict=True))
    return alone(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout)


def attend_jointly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: torch.Tensor | None,
    places: tuple[torch.Tensor, int] | None,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """The same attention, but one matrix product over a prefix that many rows share.

    A copy of the prefix for each row would cost more than all else: with P = 128 and B = 32 a
    training step took 2.7 times as long. Shapes as in `attend`.

    places: int64 [B] and R: each row's place in a table of G prefixes times R rows, of which some
    stay empty. None: all rows share one prefix.
    """
    # heads first: [B, H, T, D] -> [H, B, T, D]
    query, key, value = (x.transpose(0, 1) for x in (query * scaling, key, value))

    def over_prefix(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Multiply each row, [H, B, T, M], by its prefix's matrix, [H, G, M, N]: [H, B, T, N]."""
        heads, groups, _, width = matrix.shape
        if places is not None:
            place, size = places
            table = rows.new_zeros(heads, groups * size, *rows.shape[2:])
            rows = table.index_copy(1, place, rows)
        found = rows.reshape(heads, groups, -1, rows.shape[3]) @ matrix  # [H, G, R*T, N]
        found = found.view(*rows.shape[:3], width)
        return found if places is None else found[:, place]

    scores = query @ key.mT  # [H, B, T, T]
    virtual, length = 0, key.shape[2]
    if prefix is not None:
        virtual = prefix.shape[3]
        scores = torch.cat([over_prefix(query, prefix[0].mT), scores], dim=3)  # [H, B, T, P+T]
    if mask is not None:  # [B, 1, T, P+T]: sdpa's is True where to attend, eager's is 0 there
        hidden = ~mask if mask.dtype == torch.bool else mask != 0
        scores = scores.masked_fill(hidden.transpose(0, 1), -torch.inf)
    # over fewer than 16 numbers torch's softmax takes several times as long as over 16
    scores = nn.functional.pad(scores, (0, max(0, 16 - scores.shape[3])), value=-torch.inf)
    weights = scores.softmax(dim=3, dtype=torch.float32)
    weights = nn.functional.dropout(weights, dropout).to(value.dtype)
    out = weights[..., virtual : virtual + length] @ value
    if prefix is not None:
        out = out + over_prefix(weights[..., :virtual], prefix[1])
    return out.permute(1, 2, 0, 3)  # [H, B, T, D] -> [B, T, H, D]


ATTENTION = {"eager": "prefix_eager", "sdpa": "prefix_sdpa"}
for base, function in (("eager", eager_attention_forward), ("sdpa", sdpa_attention_forward)):
    AttentionInterface.register(ATTENTION[base], partial(attend, function))
    AttentionMaskInterface.register(ATTENTION[base], ALL_MASK_ATTENTION_FUNCTIONS[base])
