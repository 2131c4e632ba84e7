"""The prefix: keys and values of P virtual tokens for every layer, and how layers read them.

P prefix tokens, T text tokens, B batch, L layers, H heads, D head size (H*D the hidden size).
"""

import torch
from torch import nn
from transformers import BertConfig


class PrefixEncoder(nn.Module):
    """Learns the prefix, directly or through an MLP (reparametrisation).

    Layout and names follow P-tuning v2 (Liu et al. 2022, https://arxiv.org/abs/2110.07602;
    THUDM/P-tuning-v2, model/prefix_encoder.py) and PEFT's prefix tuning; the MLP is that of
    Li & Liang 2021 (https://arxiv.org/abs/2101.00190). Reads `pre_seq_len`,
    `prefix_projection` and `prefix_hidden_size` from the config.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = 2 * config.num_hidden_layers * config.hidden_size
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
        """The flat prefix, [P, 2*L*H*D]."""
        return self.transform(self.embedding.weight)


class PrefixCache:
    """Gives a flat prefix to BertModel as its `past_key_values`.

    transformers' encoder asks it for two things only: `get_seq_length`, by which text positions
    start at P, and `update`. It stores nothing, so unlike a DynamicCache one object serves any
    number of forward passes, and layers that are recomputed read it again.
    """

    def __init__(self, flat: torch.Tensor, layers: int, heads: int) -> None:
        length = flat.shape[0]
        # [P, 2LHD] -> [P, 2L, H, D] -> [2L, H, P, D]: slot 2l is the key of layer l, 2l+1 its value
        self.slots = flat.view(length, 2 * layers, heads, -1).permute(1, 2, 0, 3)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """P."""
        return self.slots.shape[2]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the prefix of a layer before its keys and values: [B, H, T, D] -> [B, H, P+T, D]."""

        def before(slot: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            # [H, P, D] -> [B, H, P, D]; under autocast the text is bfloat16 and the prefix is not
            rows = slot.to(text.dtype).expand(len(text), -1, -1, -1)
            return torch.cat([rows, text], dim=2)

        return before(self.slots[2 * layer_idx], key), before(self.slots[2 * layer_idx + 1], value)
