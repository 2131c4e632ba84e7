"""The classifiers: plain BERT, and frozen BERT with a prefix. Both share one loss.

B batch, T text tokens, P virtual tokens, C classes, HD hidden size, V words in the vocabulary, U
words in use.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch import nn
from transformers import BertConfig
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertCrossAttention, BertLayer

from model.prefix_encoder import ATTENTION, PrefixEncoder, by_layer, ready_mask


def pool_cls(outputs: ModelOutput, mask: torch.Tensor) -> torch.Tensor:
    """Return the output of BERT's pooler, a dense layer over [CLS]."""
    return outputs.pooler_output


def pool_mean(outputs: ModelOutput, mask: torch.Tensor) -> torch.Tensor:
    """Average the text's tokens, as in Sentence-BERT (https://arxiv.org/abs/1908.10084)."""
    states = outputs.last_hidden_state[
        :, : mask.shape[1]
    ].float()  # at depth "input" these come first
    weights = mask[..., None].float()  # [B, T, 1]
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


class Pooling(NamedTuple):
    """What the head reads of a text."""

    pool: Callable[[ModelOutput, torch.Tensor], torch.Tensor]  # BertModel's, mask [B, T]: [B, HD]
    # whether it is BERT's own, its pooler: all that transformers and PEFT can load; no other
    # pooling may read the pooler, whose weights are then neither loaded nor stored
    is_berts: bool = False


POOLINGS = {"cls": Pooling(pool_cls, is_berts=True), "mean": Pooling(pool_mean)}


class LastLayer(BertLayer):
    """The last layer, computed for [CLS] alone, which is all that the pooler reads."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *_, **options
    ) -> torch.Tensor:
        """Map states [B, T, HD] to [B, 1, HD]; the mask is [B, 1, T, T or P+T], or None."""
        # contiguous, else PyTorch multiplies row by row if weights are frozen: other rounding
        first = hidden_states[:, :1].contiguous()
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, :1]
        options.pop("encoder_attention_mask", None)
        # the [CLS] row of self-attention is cross-attention from [CLS] to all states
        context, _ = BertCrossAttention.forward(
            self.attention.self, first, hidden_states, attention_mask, **options
        )
        return self.feed_forward_chunk(self.attention.output(context, first))


class BertForSequenceClassification(transformers.BertForSequenceClassification):
    """Plain BERT: the same weights and files as in transformers, with less computation.

    With the pooling "cls" it also has the same results.
    """

    def __init__(self, config: BertConfig) -> None:
        config.pooling = getattr(config, "pooling", "cls")
        super().__init__(config)
        self.set_attn_implementation(ATTENTION)
        if POOLINGS[config.pooling].is_berts:
            last = config.num_hidden_layers - 1
            self.bert.encoder.layer[last] = LastLayer(config, layer_idx=last)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> SequenceClassifierOutput:
        """Classify int64 [B, T] tokens; logits [B, C]."""
        return self.classify(attention_mask, input_ids=input_ids, attention_mask=attention_mask)

    def classify(self, mask: torch.Tensor, **inputs) -> SequenceClassifierOutput:
        """Compute logits [B, C] from the inputs of BertModel; `mask` [B, T] marks the text."""
        inputs["attention_mask"] = ready_mask(inputs["attention_mask"])
        pooled = POOLINGS[self.config.pooling].pool(self.bert(**inputs), mask)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))


class BertPrefixForSequenceClassification(BertForSequenceClassification):
    """A BERT that reads P virtual tokens; the tuning method freezes all but prefix and head.

    `prefix_depth` "all": the virtual tokens are keys and values in every layer; they are attended
    to but do not attend. "input": they are embeddings that pass through the layers as words do.
    In both cases, text positions start at P, and [CLS] is the first output and the pooler's input.
    The pooler is frozen, as in P-tuning v2 and PEFT.
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
        positions = torch.arange(len(flat) + length, device=input_ids.device)
        virtual, text = positions.split([len(flat), length])
        ones = attention_mask.new_ones(batch, len(flat))  # [B, P]
        if self.config.prefix_depth == "all":
            return self.classify(
                attention_mask,
                input_ids=input_ids,
                attention_mask=torch.cat([ones, attention_mask], dim=1),
                position_ids=text[None],
                prefix=by_layer(
                    flat, self.config
                ).__getitem__,  # `attend` calls it with its layer's number
            )
        # Attention knows the order of tokens only from their position embeddings. So the virtual
        # tokens can have the first positions and yet come last: [CLS] stays the first output.
        words = self.get_input_embeddings()(input_ids)  # [B, T, HD]
        return self.classify(
            attention_mask,
            inputs_embeds=torch.cat([words, flat.expand(batch, -1, -1)], dim=1),
            attention_mask=torch.cat([attention_mask, ones], dim=1),
            position_ids=torch.cat([text, virtual])[None],
        )


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

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids: int64 [B, T] -> float [B, T, HD]."""
        place = self.place[input_ids]
        trained = nn.functional.embedding(place.clamp(min=0), self.weight)
        return torch.where(place[..., None] < 0, self.table[input_ids], trained)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Save a single table, as the nn.Embedding that this module replaced would."""
        table = self.table.index_copy(0, self.words, self.weight.detach())
        destination[f"{prefix}weight"] = table


def train_words_in_use(model: BertForSequenceClassification, token_ids: list[list[int]]) -> None:
    """If word embeddings are trainable, train only the words that occur in these texts."""
    table = model.bert.get_input_embeddings()
    if table.weight.requires_grad:
        words = torch.from_numpy(np.unique(np.concatenate(token_ids))).to(table.weight.device)
        model.bert.set_input_embeddings(WordsInUse(table, words))


def divergence(logits: torch.Tensor, multi_label: bool) -> torch.Tensor:
    """Sum the divergence of two predictions of each row over a batch, in float32.

    R-Drop (Liang et al. 2021, https://arxiv.org/abs/2106.14448): half of the Kullback-Leibler
    divergence both ways. The paper adds alpha times it to the sum of both cross-entropies, the
    training step to their mean, so --rdrop_alpha 1 is the paper's alpha 2. logits: [2B, C], of all
    rows with one dropout mask, then with another.
    With several labels, it is averaged over the labels, as their loss is.
    """
    if multi_label:  # each label is a choice between two
        logits = torch.stack([logits, torch.zeros_like(logits)], dim=-1)  # [2B, C, 2]
    one, other = logits.float().log_softmax(dim=-1).chunk(2)
    each = ((one.exp() - other.exp()) * (one - other)).sum(dim=-1) / 2
    return each.mean(dim=1).sum() if multi_label else each.sum()


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum the losses of all rows of a batch, in float32.

    int64 labels [B]: cross-entropy. float labels [B, C]: binary cross-entropy, averaged over the
    classes (as in transformers). With a sum, micro-batches of any size add up to the batch.
    weights: of the classes, [C]; with float labels, of the rows that have the label.
    """
    logits = logits.float()
    if labels.is_floating_point():
        each = nn.functional.binary_cross_entropy_with_logits(
            logits, labels, pos_weight=weights, reduction="none"
        )
        return each.mean(dim=1).sum()
    return nn.functional.cross_entropy(logits, labels, weight=weights, reduction="sum")
