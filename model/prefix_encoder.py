"""The prefix: its parameters, its initial values, and how layers attend to it.

P virtual tokens, T text tokens, B batch, L layers, H heads, D head size (H*D the hidden size), K
prefixes, G of them in a batch: 1 if all rows share one; on a GPU B, a copy for each row. The slots
of a prefix are the keys and values that layers attend to; flat, they are one row of 2LHD numbers
for each virtual token, as in P-tuning v2 and PEFT.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel


class PrefixEncoder(nn.Module):
    """Learns the prefix, directly or through an MLP (reparametrisation).

    Layout and names follow P-tuning v2 (Liu et al. 2022, https://arxiv.org/abs/2110.07602;
    THUDM/P-tuning-v2, model/prefix_encoder.py) and PEFT's prefix tuning; the MLP follows
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
        """Return the flat prefix [P, W], see `prefix_width`; one call serves a whole batch."""
        return self.transform(self.embedding.weight)


def prefix_width(config: BertConfig) -> int:
    """Return the size of one virtual token: keys and values of all layers, or one embedding."""
    slots = 1 if config.prefix_depth == "input" else 2 * config.num_hidden_layers
    return slots * config.hidden_size


@torch.no_grad()
def keys_and_values(bert: BertModel, words: torch.Tensor) -> torch.Tensor:
    """Compute the backbone's keys and values of P real words, as a flat prefix [P, 2LHD].

    With little data, a prefix that starts from them trains faster and ends up better than a random
    one (Li & Liang 2021, section 7.4). words: int64 [P].
    """
    bert.eval()
    states = bert(words[None], output_hidden_states=True).hidden_states
    flat = [
        projection(state[0])
        for state, layer in zip(states[:-1], bert.encoder.layer, strict=True)
        for projection in (layer.attention.self.key, layer.attention.self.value)
    ]
    return torch.cat(flat, dim=1)  # 2L of [P, HD] -> [P, 2LHD]


def by_layer(flat: torch.Tensor, config: BertConfig) -> torch.Tensor:
    """Return the slots of K flat prefixes, [K, P, 2LHD], layer by layer: [L, 2, H, K, P, D]."""
    # -> [K, P, L, 2, H, D] -> [L, 2, H, K, P, D]
    slots = flat.view(*flat.shape[:2], config.num_hidden_layers, 2, config.num_attention_heads, -1)
    return slots.permute(2, 3, 4, 0, 1, 5)


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether to compute as suits a GPU: copies are cheap, and reading a value waits for it."""
    return tensor.device.type != "cpu"


SHORT, LONG = 2**8, 2**14  # pairs of query and key in a row and head


def prefers_fused(query: torch.Tensor, virtual: int, length: int, dropout: float) -> bool:
    """Whether torch's fused attention is faster, or weights too many to keep (results/LOG.md).

    On the CPU it has no dropout, its backward pass is slow in bfloat16, and short texts are not
    worth a copy of many virtual tokens for each.
    """
    pairs = query.shape[2] * (virtual + length)
    if on_gpu(query) or pairs > LONG:
        return True
    slow = dropout or (query.dtype == torch.bfloat16 and torch.is_grad_enabled())
    return pairs >= SHORT and virtual <= 4 * length and not slow


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    prefix: Callable[[int], torch.Tensor] | None = None,
    table_rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    traced: bool = False,
    **unused,
) -> tuple[torch.Tensor, None]:
    """Attend over [prefix; text], or text alone, as an attention function of transformers.

    Given a layer's number, `prefix` returns its keys and values, [2, H, G, P, D]. There are no
    queries among them, so [CLS] stays the first output. torch's fused attention needs a copy of
    the prefix for each row; else one matrix product covers all rows that share a prefix.

    query, key, value: [B, H, T, D]; with depth "input" T counts the virtual tokens too, and in the
    last layer there is one query. attention_mask: bool [B, 1, T or 1, P+T], True where to attend,
    or float, which is added to the scores.
    table_rows: None if all rows share one prefix. Else (place, source): the rows are put into a
    table of G groups of R places, so that one product per group multiplies its rows by its prefix.
    Row i is at place[i], int64 [B], of the G*R; each place has the row source[g, r], int64 [G, R].
    Places without a row of their own repeat another, unread. See `prefix_bank.table_rows`.
    traced: make no choice that depends on the shape, so that one graph serves every shape.
    Returns [B, T, H, D].
    """
    # under autocast the text is bfloat16, but the prefix may not be
    slots = None if prefix is None else prefix(module.layer_idx).to(key.dtype)
    virtual, length = (0 if slots is None else slots.shape[3]), key.shape[2]
    if not traced and prefers_fused(query, virtual, length, dropout):
        if slots is not None:
            key, value = prepend(slots[0], key, table_rows), prepend(slots[1], value, table_rows)
        return attend_fused(query, key, value, attention_mask, scaling, dropout), None

    # heads first: [B, H, T, D] -> [H, B, T, D]
    query, key, value = (x.transpose(0, 1) for x in (query * scaling, key, value))

    scores = query @ key.transpose(2, 3)  # [H, B, T, T]
    if slots is not None:
        to_prefix = over_prefix(query, slots[0].transpose(2, 3), table_rows)
        scores = torch.cat([to_prefix, scores], dim=3)  # [H, B, T, P+T]
    mask = None if attention_mask is None else attention_mask.transpose(0, 1)
    weights = attention_weights(scores, mask, dropout, 0 if traced else FEWEST)
    out = weights[..., virtual : virtual + length] @ value
    if slots is not None:
        out = out + over_prefix(weights[..., :virtual], slots[1], table_rows)
    return out.permute(1, 2, 0, 3), None  # [H, B, T, D] -> [B, T, H, D]


def attend_packed(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    packed: tuple[torch.Tensor, torch.Tensor],
    first_only: bool = False,
    **options,
) -> tuple[torch.Tensor, None]:
    """Attend as `attend`, traced, if the tokens of all rows come as one row, without padding.

    query, key, value: [1, H, N, D]; with `first_only`, in the last layer, the queries are
    [B, H, 1, D]. packed: (tokens, back); token t of row b is number tokens[b, t] of the N, int64
    [B, T], and token n is number back[n] of the B*T. options: of `attend`.
    Returns [1, N, H, D]; with `first_only`, [B, 1, H, D].
    """
    tokens, back = packed
    key, value = unpack(key, tokens), unpack(value, tokens)
    query = query if first_only else unpack(query, tokens)
    out, _ = attend(module, query, key, value, attention_mask, traced=True, **options)
    return out if first_only else out.flatten(0, 1).index_select(0, back)[None], None


def over_prefix(
    rows: torch.Tensor,
    matrix: torch.Tensor,
    table_rows: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Multiply each row, [H, B, T, M], by its prefix's matrix, [H, G, M, N]: [H, B, T, N]."""
    heads, groups, _, width = matrix.shape
    if table_rows is not None:
        place, source = table_rows
        rows = rows.index_select(1, source.flatten())  # [H, G*R, T, M]
    product = rows.reshape(heads, groups, -1, rows.shape[3]) @ matrix  # [H, G, R*T, N]
    product = product.view(*rows.shape[:3], width)
    return product if table_rows is None else product.index_select(1, place)


def unpack(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return packed tokens, [1, H, N, D], as rows, [B, H, T, D]; tokens: see `attend_packed`."""
    rows = states[0].transpose(0, 1).index_select(0, tokens.flatten())  # [B*T, H, D]
    return rows.unflatten(0, tokens.shape).transpose(1, 2)


FEWEST = 16  # torch's softmax over fewer numbers takes several times as long


def attention_weights(
    scores: torch.Tensor, mask: torch.Tensor | None, dropout: float, fewest: int = FEWEST
) -> torch.Tensor:
    """Turn scores into weights of their type: [..., N] -> [..., N, or `fewest` if N is less].

    The softmax is computed in float32. mask: see `attend`. dropout: applied whenever it is not 0.
    """
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    elif mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if fewest and (missing := fewest - scores.shape[3]) > 0:
        scores = nn.functional.pad(scores, (0, missing), value=-torch.inf)
    weights = scores.softmax(dim=3, dtype=torch.float32)
    return nn.functional.dropout(weights, dropout).to(scores.dtype)


def prepend(
    slots: torch.Tensor,
    text: torch.Tensor,
    table_rows: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Put each row's prefix before its text: [H, G, P, D] and [B, H, T, D] -> [B, H, P+T, D]."""
    slots = slots.transpose(0, 1)  # [G, H, P, D]
    if table_rows is None:
        return torch.cat([slots.expand(text.shape[0], -1, -1, -1), text], dim=2)
    place, source = table_rows
    return torch.cat([slots[place // source.shape[1]], text], dim=2)


def attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Attend without keeping the weights of all pairs for the backward pass; shapes as in `attend`.

    torch's flash attention (Dao et al. 2022, https://arxiv.org/abs/2205.14135) has no dropout on
    the CPU. So with dropout the weights are computed again, for one row at a time.
    """
    if not dropout or on_gpu(query):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        ).transpose(1, 2)

    def attend_row(query, key, value, mask=None) -> torch.Tensor:
        weights = attention_weights(query * scaling @ key.mT, mask, dropout)
        return weights[..., : key.shape[2]] @ value

    tensors = [x for x in (query, key, value, attention_mask) if x is not None]
    rows = zip(*(x.split(1) for x in tensors), strict=True)
    outputs = [checkpoint(attend_row, *row, use_reentrant=False) for row in rows]
    return torch.cat(outputs).transpose(1, 2)


def ready_mask(mask: torch.Tensor) -> torch.Tensor:
    """Give BertModel a mask, [B, N], that it need not look into, [B, 1, 1, N], unless on the CPU.

    It drops a mask that masks nothing, which saves time on a CPU, but it would wait for a GPU.
    """
    return mask[:, None, None].bool() if on_gpu(mask) else mask
