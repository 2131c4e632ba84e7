"""Use a trained model: texts in, labels and probabilities out.

K members of an ensemble, N texts, U distinct texts, C classes.
"""

import math
from argparse import Namespace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from model.bank_start import find_start
from model.predictions import Predictions
from model.start import Start
from runtime.batches import Encoded, TextRows, encode, length_batches, rows_of
from runtime.files import UserError
from runtime.machine import Machine, pick_machine
from runtime.streams import in_streams


class Classifier:
    """A trained model with all that it needs to label texts; `model.load` returns one."""

    def __init__(
        self,
        start: Start,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        machine: Machine,
        batch_size: int = 64,
    ) -> None:
        self.labels, self.multi_label = start.labels, start.multi_label
        self.max_seq_length = start.config.max_seq_length
        self.title = start.method.title(start.config)
        self.model, self.tokenizer, self.machine = model, tokenizer, machine
        self.batch_size = batch_size

    @classmethod
    def load(cls, folder: str | Path, precision: str = "auto", batch_size: int = 64) -> Self:
        """Load a model folder or an adapter folder. Raises: UserError if it is not usable."""
        unset = dict.fromkeys(("problem_type", "max_seq_length", "prefix_paths", "prefix_column"))
        args = Namespace(model_name_or_path=str(folder), do_train=False, seed=0, **unset)
        args.precision, args.per_device_eval_batch_size = precision, batch_size
        return cls.of(find_start(args), args)

    @classmethod
    def of(cls, start: Start, args: Namespace) -> Self:
        """Build the model of `start`, to predict."""
        machine = pick_machine(args.precision)
        tokenizer, model = start.tokenizer(), start.build(args)
        machine.place(model)
        return cls(start, model, tokenizer, machine, args.per_device_eval_batch_size)

    def __call__(self, texts: str | list[str]) -> list[dict]:
        """Label one text or many.

        Returns for each text, in order, its `label` (several are joined by "|"), the `confidence`
        in it, and `probabilities`, of every label by name.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return []
        found = Predictions.of(self.logits(rows_of(texts)), self.multi_label)
        return [
            {
                "label": label,
                "confidence": float(confidence),
                "probabilities": dict(zip(self.labels, probability.tolist(), strict=True)),
            }
            for label, confidence, probability in zip(
                found.named(self.labels), found.confidence, found.probability, strict=True
            )
        ]

    def logits(self, rows: TextRows, prefix_index: np.ndarray | None = None) -> torch.Tensor:
        """Compute the logits of all rows, see `predict`. prefix_index: see `runtime.batches`."""
        data = encode(self.tokenizer, rows, self.max_seq_length, prefix_index)
        return predict(self.model, data, self.batch_size, self.machine)

    def member_logits(self, rows: TextRows) -> torch.Tensor:
        """Compute the logits of each member of an ensemble: [K, N, C]; K is 1 for other models."""
        count = getattr(self.model.config, "num_prefixes", 1)
        data = encode(self.tokenizer, rows, self.max_seq_length).for_each_prefix(count)
        found = predict(self.model, data, self.batch_size, self.machine)
        return found.view(count, -1, found.shape[1])


@torch.inference_mode()
def predict(model: nn.Module, data: Encoded, batch_size: int, machine: Machine) -> torch.Tensor:
    """Compute the logits of all rows, in order: float32 [N, C]. Each distinct text is scored once.

    Raises: UserError for a logit that is not finite, since it would count as a prediction.
    """
    model.eval()
    group = machine.group
    each = math.ceil(len(data.token_ids) / (group.size * machine.streams)) or 1  # all are busy
    mine = group.share(length_batches(data, min(batch_size, each)))
    text_logits = torch.zeros(len(data.token_ids), model.config.num_labels)  # [U, C]
    no_bar = None if group.is_main else True  # None: no bar if the output is not a terminal
    bar = {"desc": "predict", "unit": "batch", "leave": False, "dynamic_ncols": True}

    def classify(texts: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():  # of this thread
            return machine.logits(model, data, texts)

    found = in_streams(classify, mine, machine.streams)
    shown = list(tqdm(found, total=len(mine), disable=no_bar, **bar))
    if mine:  # read once, since a GPU would be waited for after each batch
        text_logits[np.concatenate(mine)] = torch.cat(shown).cpu()
    if group.size > 1:
        text_logits = text_logits.to(machine.device)
        group.all_reduce_sum([text_logits])
        text_logits = text_logits.cpu()
    if not text_logits.isfinite().all():
        raise UserError(
            "the logits are not finite: the model diverged; train it with a lower --learning_rate"
        )
    return text_logits[data.text_index]  # [U, C] -> [N, C]
