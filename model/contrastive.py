"""A start for few training texts: move texts of a label together, then fit the head to them.

As in SetFit (Tunstall et al. 2022, https://arxiv.org/abs/2209.11055), with two differences: a batch
yields all its pairs, and training goes on from here as usual. B rows of a batch, N rows, C classes,
HD hidden size.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from model.sequence_classification import classification_loss
from runtime.batches import Encoded, chunks
from runtime.machine import Machine

ROWS = 16  # of a step
SCORED_ROWS = 64


def pair_loss(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how far the cosines of pairs are from 1 for equal labels, and from 0 for others.

    Both kinds weigh the same, however many pairs they have. states: [B, HD]; labels: [B] or [B, C].
    """
    states, labels = nn.functional.normalize(states.float(), dim=1), labels.reshape(len(labels), -1)
    same = (labels[:, None] == labels[None]).all(dim=2)
    errors = (states @ states.T - same.float()) ** 2
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    kinds = [errors[same & others], errors[~same]]
    return sum((kind.mean() for kind in kinds if len(kind)), torch.zeros_like(errors[0, 0])) / 2


def row_batches(rows: int, seed: int) -> Iterator[np.ndarray]:
    """Draw batches of `ROWS` rows forever, each row once in an epoch; an epoch's rest is left."""
    order, size = np.random.default_rng(seed), min(ROWS, rows)
    while True:
        shuffled = order.permutation(rows)
        yield from (shuffled[at : at + size] for at in range(0, rows - size + 1, size))


def fit_head(states: torch.Tensor, labels: torch.Tensor, head: nn.Linear, weights) -> None:
    """Set the head to a logistic regression on states, [N, HD], scaled to a mean norm of 1."""
    scale = states.norm(dim=1).mean()
    weight, bias = torch.zeros_like(head.weight), torch.zeros_like(head.bias)
    new = [weight.requires_grad_(), bias.requires_grad_()]
    solver = torch.optim.LBFGS(new, max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        logits = nn.functional.linear(states / scale, *new)
        total = classification_loss(logits, labels, weights) + sum((x**2).sum() for x in new) / 2
        total.backward()
        return total

    solver.step(loss)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias)


def start(
    model: nn.Module, data: Encoded, machine: Machine, steps: int, rate: float, seed: int
) -> None:
    """Train what is tuned below the head for some steps, in place, and fit the head.

    rate: it rises to it for a tenth of the steps, and then falls to 0.
    """
    labels = machine.send(torch.from_numpy(data.labels))
    weights = data.label_weights and machine.send(torch.tensor(data.label_weights))
    head, model.classifier = model.classifier, nn.Identity()  # logits are then what it reads
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0)
    torch.manual_seed(seed)
    model.train()
    for step, rows in zip(range(steps), row_batches(len(data), seed), strict=False):
        factor = min((step + 1) / max(steps / 10, 1), 1) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = rate * factor
        pair_loss(machine.logits(model, data, data.text_index[rows]), labels[rows]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        parts = chunks(data.text_index, SCORED_ROWS)
        states = torch.cat([machine.logits(model, data, part) for part in parts])
    model.classifier = head
    fit_head(states, labels, head, weights)
