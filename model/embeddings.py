"""Embeddings of texts by a frozen backbone: features for other classifiers."""

from collections.abc import Callable

import numpy as np
from torch import nn

from model.classifier import predict
from model.loading import load_tokenizer, set_max_seq_length
from model.source import Source
from model.start import read_model_config
from model.tuning import TUNING
from runtime.batches import encode, rows_of
from runtime.machine import Machine

Embed = Callable[[list[str]], np.ndarray]  # N texts -> float32 [N, HD]


def embedder(source: Source, machine: Machine, batch_size: int = 64) -> Embed:
    """Return a function that maps texts to the mean of the backbone's last states, of length 1.

    As in Sentence-BERT (Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084).
    Raises: UserError if the backbone is not usable.
    """
    config, _ = read_model_config(source)
    set_max_seq_length(config, 0, min(128, config.max_position_embeddings))
    config.pooling = TUNING["probe"].pooling
    tokenizer = load_tokenizer(source, config)
    model = TUNING["probe"].build(source, config, fresh_head=True).requires_grad_(False)
    model.classifier, model.config.num_labels = nn.Identity(), config.hidden_size
    machine.place(model)

    def embed(texts: list[str]) -> np.ndarray:
        data = encode(tokenizer, rows_of(texts), config.max_seq_length)
        found = predict(model, data, batch_size, machine)
        return nn.functional.normalize(found).numpy()

    return embed
