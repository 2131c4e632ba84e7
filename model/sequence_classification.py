"""The classifiers: BERT as it is, and a frozen BERT with a prefix. One loss for both.

B batch, T text tokens, P prefix tokens, C classes.
"""

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from model.prefix_encoder import PrefixCache, PrefixEncoder


class BertPrefixForSequenceClassification(BertForSequenceClassification):
    """A frozen BERT that reads P virtual tokens in every layer; prefix and head are learnt.

    The virtual tokens are keys and values only: they are attended to and do not attend, so that
    [CLS] stays the first output and the pooler, frozen as in P-tuning v2 and PEFT, reads it.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.prefix_encoder = PrefixEncoder(config)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> SequenceClassifierOutput:
        """Classify int64 [B, T] tokens; logits [B, C]."""
        prefix = PrefixCache(
            self.prefix_encoder(), self.config.num_hidden_layers, self.config.num_attention_heads
        )
        # [B, T] -> [B, P+T]. Always: a mask T wide fails, but only on batches that are padded.
        ones = attention_mask.new_ones(len(attention_mask), prefix.get_seq_length())
        mask = torch.cat([ones, attention_mask], dim=1)
        return super().forward(input_ids, attention_mask=mask, past_key_values=prefix)


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
