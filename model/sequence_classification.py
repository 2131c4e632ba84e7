"""The classifiers: BERT as it is, and a frozen BERT with a prefix. One loss for both.

B batch, T text tokens, P prefix tokens, C classes.
"""

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from model.prefix_encoder import ATTENTION, PrefixEncoder, by_layer


class BertPrefixForSequenceClassification(BertForSequenceClassification):
    """A frozen BERT that reads P virtual tokens; prefix and head are learnt.

    `prefix_depth` "all": the virtual tokens are keys and values of every layer; they are attended
    to and do not attend. "input": they are embeddings that pass through the layers as words do.
    Either way text positions start at P and [CLS] is the first output, so that the pooler, frozen
    as in P-tuning v2 and PEFT, reads it.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        attention = config._attn_implementation
        self.set_attn_implementation(ATTENTION.get(attention, attention))
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
