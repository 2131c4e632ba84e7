"""Use a trained model: texts in, labels and probabilities out.

K members of an ensemble, N texts, U distinct texts, C classes.
"""

import math
from collections.abc import Iterable, Mapping, Set

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from model.predictions import Predictions
from model.source import ModelSource
from runtime.batches import Encoded, TextRows, encode, length_batches, rows_of
from runtime.files import UserError
from runtime.machine import Machine, in_workers


def as_texts(
    texts: str | Iterable[str],
    drop_blank: bool = False,
    advice: str = "fill it in, or leave it out",
) -> list[str]:
    """Return texts as a list; a single one is a list of one.

    drop_blank: leave out blank ones. advice: what to do with them otherwise.
    Raises: UserError for what is no list of str, and naming the first text that is blank, missing
        or not UTF-8.
    """
    if isinstance(texts, str):
        texts = [texts]
    table = getattr(texts, "ndim", 1) != 1 or isinstance(texts, (bytes, Mapping, Set))
    if table or not isinstance(texts, Iterable):
        kind = type(texts).__name__
        raise UserError(f"texts are of type {kind}: pass a str, or a list or a column of str")
    kept = []
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            missing = pd.api.types.is_scalar(text) and pd.isna(text)
            fault = f"missing: {advice}" if missing else f"of type {type(text).__name__}, not str"
        elif text.encode(errors="replace").decode() != text:
            fault = "not UTF-8: correct it"
        elif text.strip():
            kept.append(text)
            continue
        elif drop_blank:
            continue
        else:
            fault = f"blank: {advice}"
        raise UserError(f"text {number} is {fault}")
    return kept


class Classifier:
    """A trained model with all that it needs to label texts; `model.load` returns one."""

    def __init__(
        self,
        source: ModelSource,
        machine: Machine,
        batch_size: int = 64,
        model: nn.Module | None = None,
    ) -> None:
        """model: None loads the weights of a tuned model. Raises: UserError if they do not fit."""
        self.labels, self.multi_label = source.labels, source.multi_label
        self.max_seq_length, self.tokenizer = source.config.max_seq_length, source.tokenizer
        self.title = source.method.title(source.config)
        self.machine, self.batch_size, self.model = machine, batch_size, model
        if model is None:
            self.model = source.place(source.build(), machine)

    def __call__(self, texts: str | Iterable[str]) -> list[dict]:
        """Label one text or many, such as a list or a column of a table.

        Returns for each text, in order, its `label` (several are joined by "|"), the `confidence`
        in it, and `probabilities`, of every label by name. Raises: UserError, see `as_texts`.
        """
        texts = as_texts(texts)
        if not texts:
            return []
        results = Predictions.from_logits(self.logits(rows_of(texts)), self.multi_label)
        names = ("label", "confidence", "probabilities")
        probabilities = (
            dict(zip(self.labels, row, strict=True)) for row in results.probability.tolist()
        )
        columns = results.named(self.labels), results.confidence.tolist(), probabilities
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def logits(self, rows: TextRows, prefix_index: np.ndarray | None = None) -> torch.Tensor:
        """Compute the logits of all rows, see `predict`.

        prefix_index: each row's place in --prefix_paths, int64 [N].
        """
        data = encode(self.tokenizer, rows, self.max_seq_length, prefix_index)
        return predict(self.model, data, self.batch_size, self.machine)

    def member_logits(self, rows: TextRows) -> torch.Tensor:
        """Compute the logits of each prefix that is being trained: [K, N, C].

        K is 1 for other models, and for opened ones, whose prefixes are averaged already.
        """
        count = getattr(self.model.config, "num_prefixes", 1)
        data = encode(self.tokenizer, rows, self.max_seq_length).for_each_prefix(count)
        logits = predict(self.model, data, self.batch_size, self.machine)
        return logits.view(count, -1, logits.shape[1])


@torch.inference_mode()
def predict(model: nn.Module, data: Encoded, batch_size: int, machine: Machine) -> torch.Tensor:
    """Compute the logits of all rows, in order: float32 [N, C]. Each distinct text is scored once.

    Raises: UserError for a logit that is not finite, since it would count as a prediction.
    """
    if model.training:
        model.eval()
    group = machine.group
    share = math.ceil(len(data.token_ids) / (group.size * machine.workers)) or 1  # all are busy
    mine = group.share(length_batches(data, min(batch_size, share)))
    text_logits = torch.zeros(len(data.token_ids), model.config.num_labels)  # [U, C]

    def classify(texts: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():  # of this thread
            return machine.logits(model, data, texts)

    no_bar = None if group.is_main else True  # None: no bar if the output is not a terminal
    bar = {"desc": "predict", "unit": "batch", "leave": False, "dynamic_ncols": True}
    results = in_workers(classify, mine, machine.workers)
    results = list(tqdm(results, total=len(mine), disable=no_bar, **bar))
    if mine:  # read once, since a GPU would be waited for after each batch
        text_logits[np.concatenate(mine)] = torch.cat(results).cpu()
    if group.size > 1:
        text_logits = text_logits.to(machine.device)
        group.all_reduce_sum([text_logits])
        text_logits = text_logits.cpu()
    if not text_logits.isfinite().all():
        raise UserError(
            "the logits are not finite: the model diverged; train it with a lower --learning_rate"
        )
    return text_logits[data.text_index]  # [U, C] -> [N, C]
