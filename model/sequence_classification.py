"""The classifiers: plain BERT, and frozen BERT with a prefix. Both share one loss.

B batch, T text tokens, P virtual tokens, C classes, HD hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers import BertConfig
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput

from model.bert import ATTENTION, LastLayer
from model.prefix_encoder import PrefixEncoder, by_layer, ready_mask


def pool_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average the tokens, as in Sentence-BERT (https://arxiv.org/abs/1908.10084)."""
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


class Pooling(NamedTuple):
    """What the head reads of a text.

    To add one, give it a function, a row in `POOLINGS`, and its name in `--pooling` of
    `arguments.GROUPS`, which imports nothing heavy.
    """

    # from the text's last states, float32 [B, T, HD], and a mask of its tokens, float32 [B, T, 1],
    # to [B, HD]; None: BERT's pooler, a dense layer over [CLS]. That alone can be loaded by
    # transformers and PEFT. With others, the pooler's weights are neither loaded nor stored.
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None

    @property
    def reads_pooler(self) -> bool:
        """Whether it is BERT's own."""
        return self.function is None

    def __call__(self, outputs: ModelOutput, mask: torch.Tensor) -> torch.Tensor:
        """Pool the outputs of BertModel; mask [B, T]: of the text. Returns [B, HD]."""
        if self.function is None:
            return outputs.pooler_output
        states = outputs.last_hidden_state[:, : mask.shape[1]]  # depth "input": virtual ones last
        return self.function(states.float(), mask[..., None].float())


POOLINGS = {"cls": Pooling(None), "mean": Pooling(pool_mean)}


class BertForSequenceClassification(transformers.BertForSequenceClassification):
    """Plain BERT: the same weights and files as in transformers, with less computation.

    With the pooling "cls" it also has the same results.
    """

    def __init__(self, config: BertConfig) -> None:
        config.pooling = getattr(config, "pooling", "cls")
        super().__init__(config)
        self.set_attn_implementation(ATTENTION)
        if POOLINGS[config.pooling].reads_pooler:
            last = config.num_hidden_layers - 1
            self.bert.encoder.layer[last] = LastLayer(config, layer_idx=last)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options
    ) -> SequenceClassifierOutput:
        """Classify int64 [B, T] tokens; logits [B, C]. options: of `prefix_encoder.attend`."""
        inputs = self.bert_inputs(input_ids, attention_mask)
        inputs["attention_mask"] = ready_mask(inputs["attention_mask"])
        outputs = self.bert(**inputs, **options)
        pooled = POOLINGS[self.config.pooling](outputs, attention_mask)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))

    def bert_inputs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the inputs of BertModel."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


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

    def bert_inputs(self, input_ids, attention_mask):
        flat = self.prefix_encoder()
        batch, length = input_ids.shape
        positions = torch.arange(len(flat) + length, device=input_ids.device)
        virtual, text = positions.split([len(flat), length])
        ones = attention_mask.new_ones(batch, len(flat))  # [B, P]
        if self.config.prefix_depth == "all":
            return {
                "input_ids": input_ids,
                "attention_mask": torch.cat([ones, attention_mask], dim=1),
                "position_ids": text[None],
                # `attend` passes its layer: [2, H, G=1, P, D]
                "prefix": by_layer(flat[None], self.config).unbind().__getitem__,
            }
        # Attention knows the order of tokens only from their position embeddings. So the virtual
        # tokens can have the first positions and yet come last: [CLS] stays the first output.
        words = self.get_input_embeddings()(input_ids)  # [B, T, HD]
        return {
            "inputs_embeds": torch.cat([words, flat.expand(batch, -1, -1)], dim=1),
            "attention_mask": torch.cat([attention_mask, ones], dim=1),
            "position_ids": torch.cat([text, virtual])[None],
        }


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
    first, second = logits.float().log_softmax(dim=-1).chunk(2)
    sums = ((first.exp() - second.exp()) * (first - second)).sum(dim=-1) / 2
    return sums.mean(dim=1).sum() if multi_label else sums.sum()


def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    by_row: bool = False,
) -> torch.Tensor:
    """Sum the losses of all rows of a batch, in float32; by_row: return them all, [B].

    int64 labels [B]: cross-entropy. float labels [B, C]: binary cross-entropy, averaged over the
    classes (as in transformers). With a sum, micro-batches of any size add up to the batch.
    weights: of the classes, [C]; with float labels, of the rows that have the label.
    """
    logits = logits.float()
    if labels.is_floating_point():
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits, labels, pos_weight=weights, reduction="none"
        )
        return losses.mean(dim=1) if by_row else losses.mean(dim=1).sum()
    reduction = "none" if by_row else "sum"
    return nn.functional.cross_entropy(logits, labels, weight=weights, reduction=reduction)
