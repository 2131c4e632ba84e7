"""The classifiers: BERT as it is, and a frozen BERT with a prefix. One loss for both.

B batch, T text tokens, P prefix tokens, C classes, V words of the vocabulary, U of them in use.
"""

import torch
import transformers
from torch import nn
from transformers import BertConfig
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertCrossAttention, BertLayer

from model.prefix_encoder import ATTENTION, PrefixEncoder, by_layer, to_the_bit


class LastLayer(BertLayer):
    """The last layer, computed for [CLS] alone, which is all that the pooler reads.

    Not where a model is to compute `to_the_bit` as others do.
    """

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *_, **options
    ) -> torch.Tensor:
        """[B, T, HD] -> [B, 1, HD], or [B, T, HD]; the mask is [B, 1, T, T], or P+T wide."""
        if to_the_bit(self):
            return super().forward(hidden_states, attention_mask, **options)
        first = hidden_states[:, :1]
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, :1]
        options.pop("encoder_attention_mask", None)
        # self-attention too is attention of some states to others
        context, _ = BertCrossAttention.forward(
            self.attention.self, first, hidden_states, attention_mask, **options
        )
        return self.feed_forward_chunk(self.attention.output(context, first))


class BertForSequenceClassification(transformers.BertForSequenceClassification):
    """BERT as it is: the same weights, files and results, with less work."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        attention = config._attn_implementation
        self.set_attn_implementation(ATTENTION.get(attention, attention))
        last = config.num_hidden_layers - 1
        self.bert.encoder.layer[last] = LastLayer(config, layer_idx=last)
        self.post_init()


class WordsInUse(nn.Module):
    """Word embeddings of which only those of the words in use are tuned.

    The others have no gradient in any step. Left out they need no memory for it, no moments and no
    work: word embeddings are half of a small BERT's weights, those in use a part of that.
    """

    def __init__(self, table: nn.Embedding, words: torch.Tensor) -> None:
        """Take over a table [V, HD]; `words`, int64 [U], are those to tune."""
        super().__init__()
        words = words[words != table.padding_idx]  # which is not tuned in an nn.Embedding either
        self.weight = nn.Parameter(table.weight[words])
        place = torch.full((len(table.weight),), -1, device=words.device)
        place[words] = torch.arange(len(words), device=words.device)
        self.register_buffer("table", table.weight.detach(), persistent=False)
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("place", place, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [B, T] -> float [B, T, HD]."""
        place = self.place[input_ids]
        tuned = nn.functional.embedding(place.clamp(min=0), self.weight)
        return torch.where(place[..., None] < 0, self.table[input_ids], tuned)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """As the one table that it was."""
        table = self.table.index_copy(0, self.words, self.weight.detach())
        destination[f"{prefix}weight"] = table


class BertPrefixForSequenceClassification(BertForSequenceClassification):
    """A frozen BERT that reads P virtual tokens; prefix and head are learnt.

    `prefix_depth` "all": the virtual tokens are keys and values of every layer; they are attended
    to and do not attend. "input": they are embeddings that pass through the layers as words do.
    Either way text positions start at P and [CLS] is the first output, so that the pooler, frozen
    as in P-tuning v2 and PEFT, reads it.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.prefix_encoder = PrefixEncoder(config)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> SequenceClassifierOutput:
        """Classify int64 [B, T] tokens; logits [B, C]."""
        flat = self.prefix_encoder()
        batch, length = input_ids.shape
        place = torch.arange(len(flat) + length, device=input_ids.device)
        virtual, text = place.split([len(flat), length])
        ones = attention_mask.new_ones(batch, len(flat))  # [B, P]
        if self.config.prefix_depth == "all":
            return super().forward(
                input_ids,
                attention_mask=torch.cat([ones, attention_mask], dim=1),
                position_ids=text[None],
                prefix=by_layer(flat, self.config).__getitem__,
            )
        # Attention knows the order of tokens by their positions alone, so the virtual ones, first
        # by position, may stand last: [CLS] stays the first output.
        words = self.get_input_embeddings()(input_ids)  # [B, T, HD]
        return super().forward(
            inputs_embeds=torch.cat([words, flat.expand(batch, -1, -1)], dim=1),
            attention_mask=torch.cat([attention_mask, ones], dim=1),
            position_ids=torch.cat([text, virtual])[None],
        )


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the batch of each row's loss, in float32.

    int64 labels [B]: cross-entropy. float labels [B, C]: binary cross-entropy, its mean over
    the classes (as in transformers). The sum lets micro-batches of any size add up to the batch.
    """
    logits = logits.float()
    if labels.is_floating_point():
        each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return each.mean(dim=1).sum()
    return nn.functional.cross_entropy(logits, labels, reduction="sum")
