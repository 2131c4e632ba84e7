"""What the models use of transformers and torch beyond their public API.

`pytest -m upgrade` runs the tests that notice a change of it.

- BertModel passes keyword arguments that it does not know to the attention function of each
  layer: `prefix`, `table_rows` and so on of `prefix_encoder.attend`.
- AttentionInterface and AttentionMaskInterface take a function by name;
  ALL_MASK_ATTENTION_FUNCTIONS has the masks of sdpa: bool, or None if nothing is masked.
- BertCrossAttention.forward works on a BertSelfAttention, which has its weights and their names;
  BertLayer.feed_forward_chunk.
- from_pretrained(output_loading_info=True) lists keys: missing, unexpected and mismatched.
- ACT2CLS has the names of the activations.
- openvino.frontend translates traced modules; openvino.convert_model, which calls it, sends usage
  data to a server.
In runtime/, on which model/ is built:
- batches.py: a tokenizer returns `encodings`, each with `overflowing` and `word_ids`.
- training_state.py: the state of fused AdamW, its `found_inf`, and torch._foreach_lerp_.

B batch, T text tokens, P virtual tokens, HD hidden size, V words of the vocabulary, U words in use.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertPreTrainedModel,
)
from transformers.activations import ACT2CLS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertCrossAttention, BertLayer
from transformers.utils import logging as transformers_logging

from model.prefix_encoder import attend, attend_packed

ACTIVATIONS = tuple(ACT2CLS)
ATTENTION = "optional_prefix"  # without a prefix it is ordinary attention
AttentionInterface.register(ATTENTION, attend)
PACKED_ATTENTION = "optional_prefix_packed"
AttentionInterface.register(PACKED_ATTENTION, attend_packed)
for name in (ATTENTION, PACKED_ATTENTION):
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class LastLayer(BertLayer):
    """The last layer, computed for [CLS] alone, which is all that the pooler reads."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *_, **options
    ) -> torch.Tensor:
        """Map states [B, T, HD] to [B, 1, HD]; the mask is [B, 1, T, T or P+T], or None."""
        # contiguous, else PyTorch multiplies row by row if weights are frozen: other rounding
        first = hidden_states[:, :1].contiguous()
        if "packed" in options:  # of all rows, which are one: [1, N, HD] -> [B, 1, HD]
            first = hidden_states[0].index_select(0, options["packed"][0][:, 0])[:, None]
            options["first_only"] = True
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, :1]
        options.pop("encoder_attention_mask", None)
        # the [CLS] row of self-attention is cross-attention from [CLS] to all states
        context, _ = BertCrossAttention.forward(
            self.attention.self, first, hidden_states, attention_mask, **options
        )
        return self.feed_forward_chunk(self.attention.output(context, first))


class WordsInUse(nn.Module):
    """Word embeddings that are trainable only for the words in use.

    The others never receive a gradient; leaving them out saves gradient and optimizer memory, and
    weight decay does not shrink them. Word embeddings are half of a small BERT's weights, and only
    some of them are in use.
    """

    def __init__(self, table: nn.Embedding, words: torch.Tensor) -> None:
        """Take over a table [V, HD] and train its rows `words`, int64 [U]."""
        super().__init__()
        words = words[words != table.padding_idx]  # nn.Embedding does not train padding either
        self.weight = nn.Parameter(table.weight[words])
        place = torch.full((len(table.weight),), -1, device=words.device)
        place[words] = torch.arange(len(words), device=words.device)
        self.register_buffer("table", table.weight.detach(), persistent=False)
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.register_state_dict_post_hook(WordsInUse.save_table)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids: int64 [B, T] -> float [B, T, HD]."""
        place = self.place[input_ids]
        trained = nn.functional.embedding(place.clamp(min=0), self.weight)
        return torch.where(place[..., None] < 0, self.table[input_ids], trained)

    def save_table(self, state: dict, prefix: str, metadata: dict) -> None:
        """Store a single table, as the nn.Embedding that this module replaced would."""
        state[f"{prefix}weight"] = self.table.index_copy(0, self.words, self.weight.detach())


def train_words_in_use(model: BertPreTrainedModel, token_ids: list[list[int]]) -> None:
    """Train only the words that occur in these texts, if word embeddings are trainable."""
    table = model.bert.get_input_embeddings()
    if table.weight.requires_grad:
        words = torch.from_numpy(np.unique(np.concatenate(token_ids))).to(table.weight.device)
        model.bert.set_input_embeddings(WordsInUse(table, words))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers about missing and unexpected weights, which are checked here."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def read_weights(
    cls: type[BertPreTrainedModel], folder: Path, config: BertConfig
) -> tuple[BertPreTrainedModel, set[str], set[str]]:
    """Build a `cls` with the weights in a folder, float32.

    Returns it with the keys that were missing or of another shape, whose parameters are drawn from
    torch's generator, and with the keys that it has no use for.
    """
    with quiet():
        model, report = cls.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    fresh = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    return model, fresh, set(report["unexpected_keys"])


def to_openvino(module: nn.Module, example: list[torch.Tensor]):
    """Translate a module into an `openvino.Model`. example: inputs to trace it with."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    inputs = tuple(example)
    with torch.inference_mode(), warnings.catch_warnings(action="ignore"):  # about torch.jit
        traced = torch.jit.trace(module, inputs, strict=False, check_trace=False)
    decoder = TorchScriptPythonDecoder(traced, example_input=inputs)  # must outlive its use
    frontend = FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(decoder))
