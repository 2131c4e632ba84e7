"""The classifiers: BERT as it is, and a frozen BERT with a prefix. One loss for both.

B batch, T text tokens, P prefix tokens, C classes, HD hidden size, V words of the vocabulary, U of
them in use.
"""

import numpy as np
import torch
import transformers
from torch import nn
from transformers import BertConfig
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertCrossAttention, BertLayer

from model.prefix_encoder import ATTENTION, PrefixEncoder, by_layer


def pool_cls(outputs: ModelOutput, mask: torch.Tensor) -> torch.Tensor:
    """BERT's pooler: a dense layer over [CLS]."""
    return outputs.pooler_output


def pool_mean(outputs: ModelOutput, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the text's tokens, as in Sentence-BERT (https://arxiv.org/abs/1908.10084)."""
    states = outputs.last_hidden_state[:, : mask.shape[1]].float()  # virtual tokens come last
    weights = mask[..., None].float()  # [B, T, 1]
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


# From a BertModel's outputs and the mask [B, T] of the text to [B, HD]; `config.pooling` names one.
POOLINGS = {"cls": pool_cls, "mean": pool_mean}


class LastLayer(BertLayer):
    """The last layer, computed for [CLS] alone, which is all that the pooler reads."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *_, **options
    ) -> torch.Tensor:
        """[B, T, HD] -> [B, 1, HD]; the mask is [B, 1, T, T], or P+T wide."""
        first = hidden_states[:, :1]
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, :1]
        options.pop("encoder_attention_mask", None)
        # self-attention, too, is attention of some states to others
        context, _ = BertCrossAttention.forward(
            self.attention.self, first, hidden_states, attention_mask, **options
        )
        return self.feed_forward_chunk(self.attention.output(context, first))


class BertForSequenceClassification(transformers.BertForSequenceClassification):
    """BERT as it is: the same weights, files and results as transformers', with less work."""

    def __init__(self, config: BertConfig) -> None:
        config.pooling = getattr(config, "pooling", "cls")
        super().__init__(config)
        self.set_attn_implementation(ATTENTION)
        if config.pooling == "cls":
            last = config.num_hidden_layers - 1
            self.bert.encoder.layer[last] = LastLayer(config, layer_idx=last)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> SequenceClassifierOutput:
        """Classify int64 [B, T] tokens; logits [B, C]."""
        return self.classify(attention_mask, input_ids=input_ids, attention_mask=attention_mask)

    def classify(self, mask: torch.Tensor, **inputs) -> SequenceClassifierOutput:
        """Logits [B, C] from the inputs of BertModel; `mask`, [B, T], is that of the text."""
        pooled = POOLINGS[self.config.pooling](self.bert(**inputs), mask)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))


class BertPrefixForSequenceClassification(BertForSequenceClassification):
    """A frozen BERT that reads P virtual tokens; prefix and head are trainable.

    `prefix_depth` "all": the virtual tokens are keys and values of every layer; they are attended
    to and do not attend. "input": they are embeddings that pass through the layers as words do.
    In both, text positions start at P and [CLS] is the first output, which the pooler, frozen as
    in P-tuning v2 and PEFT, reads.
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
            return self.classify(
                attention_mask,
                input_ids=input_ids,
                attention_mask=torch.cat([ones, attention_mask], dim=1),
                position_ids=text[None],
                prefix=by_layer(flat, self.config).__getitem__,
            )
        # Attention knows the order of tokens by their positions alone, so the virtual ones, first
        # by position, may come last: [CLS] stays the first output.
        words = self.get_input_embeddings()(input_ids)  # [B, T, HD]
        return self.classify(
            attention_mask,
            inputs_embeds=torch.cat([words, flat.expand(batch, -1, -1)], dim=1),
            attention_mask=torch.cat([attention_mask, ones], dim=1),
            position_ids=torch.cat([text, virtual])[None],
        )


class WordsInUse(nn.Module):
    """Word embeddings of which only those of the words in use are trainable.

    All other embeddings never receive a gradient; leaving them out saves gradient and optimizer
    memory. Word embeddings are half of a small BERT's weights, those in use a part of that.
    """

    def __init__(self, table: nn.Embedding, words: torch.Tensor) -> None:
        """Take over a table [V, HD]; `words`, int64 [U], are those to train."""
        super().__init__()
        words = words[words != table.padding_idx]  # nor does an nn.Embedding train its padding
        self.weight = nn.Parameter(table.weight[words])
        place = torch.full((len(table.weight),), -1, device=words.device)
        place[words] = torch.arange(len(words), device=words.device)
        self.register_buffer("table", table.weight.detach(), persistent=False)
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("place", place, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [B, T] -> float [B, T, HD]."""
        place = self.place[input_ids]
        trained = nn.functional.embedding(place.clamp(min=0), self.weight)
        return torch.where(place[..., None] < 0, self.table[input_ids], trained)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Save as the single table that it replaced."""
        table = self.table.index_copy(0, self.words, self.weight.detach())
        destination[f"{prefix}weight"] = table


def train_words_in_use(model: BertForSequenceClassification, token_ids: list[list[int]]) -> None:
    """If word embeddings are trainable, train only those of the words in these texts."""
    table = model.get_input_embeddings()
    if table.weight.requires_grad:
        words = torch.from_numpy(np.unique(np.concatenate(token_ids))).to(table.weight.device)
        model.set_input_embeddings(WordsInUse(table, words))


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the batch of each row's loss, in float32.

    int64 labels [B]: cross-entropy. float labels [B, C]: binary cross-entropy, averaged over the
    classes (as in transformers). With a sum, micro-batches of any size add up to the batch.
    """
    logits = logits.float()
    if labels.is_floating_point():
        each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return each.mean(dim=1).sum()
    return nn.functional.cross_entropy(logits, labels, reduction="sum")
