"""What training carries from step to step, and into checkpoints, besides the optimizer."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

logger = logging.getLogger(__name__)


class MovingAverage:
    """Exponential moving average of what is tuned: steadier than the weights of any one step.

    Polyak & Juditsky 1992. The decay rises to its value, as in TensorFlow, so that the start is
    soon forgotten. A decay of 0: there is no average, and the weights themselves stand for it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        tuned = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.decay, self.tuned = decay, tuned if decay else {}
        self.weights = {name: one.detach().clone() for name, one in self.tuned.items()}

    def update(self, step: int) -> None:
        """Take in the weights after step number `step`, counted from 1."""
        if self.tuned:
            decay = min(self.decay, (1 + step) / (10 + step))
            now = [parameter.detach() for parameter in self.tuned.values()]
            torch._foreach_lerp_(list(self.weights.values()), now, 1 - decay)

    def swap(self) -> None:
        """Exchange the model's weights and the average; nothing is copied."""
        for name, parameter in self.tuned.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Meanwhile the model's weights are the average."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def tensors(self) -> dict[str, torch.Tensor]:
        """While it is applied: the weights that training goes on with, as `raw/NAME`."""
        return {f"raw/{name}": weight for name, weight in self.weights.items()}

    def go_on(self, tensors: dict[str, torch.Tensor]) -> None:
        """From the tensors of a checkpoint, of which the average is in the model already."""
        for name, parameter in self.tuned.items():
            self.weights[name].copy_(parameter.detach())
            with torch.no_grad():
                parameter.copy_(tensors[f"raw/{name}"])


class BestEpoch:
    """The best epoch so far by one metric of the validation file, and, to `keep`, its weights."""

    def __init__(self, metric: str, keep: bool) -> None:
        self.metric, self.keep = metric, keep
        self.epoch, self.value = 0, -math.inf
        self.weights: dict[str, torch.Tensor] = {}

    def update(self, model: nn.Module, epoch: int, metrics: dict[str, float]) -> bool:
        """Whether `epoch` is better than all before it; a tie is not. Copies its weights."""
        value = -metrics["loss"] if self.metric == "loss" else metrics[self.metric]
        if not value > self.value:
            return False
        self.epoch, self.value = epoch, value
        if self.keep:
            self.weights = {
                name: parameter.detach().clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
        return True

    def patience_is_over(self, epoch: int, patience: int) -> bool:
        """Whether `patience` evaluations, the last that of `epoch`, brought no better one."""
        return 0 < patience <= epoch - self.epoch

    def state(self) -> dict:
        """What JSON takes of it."""
        return {"epoch": self.epoch, "value": self.value if self.epoch else None}

    def tensors(self, now: bool) -> dict[str, torch.Tensor]:
        """The weights as `best/NAME`; none where the model's are the best just now."""
        return {} if now else {f"best/{name}": weight for name, weight in self.weights.items()}

    def go_on(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        """From `state` and the tensors of a checkpoint."""
        if not state["epoch"]:
            return
        self.epoch, self.value = state["epoch"], state["value"]
        for kind in ("weight/", "best/") if self.keep else ():  # the latter wins, if there
            found = {k.removeprefix(kind): one for k, one in tensors.items() if k.startswith(kind)}
            self.weights = found or self.weights

    def restore(self, model: nn.Module) -> bool:
        """Put the best weights back, where they were kept."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                model.get_parameter(name).copy_(weight)
        return bool(self.weights)


@dataclass
class Progress:
    """What the user sees of the training: a bar, lines of the log, and the records."""

    total: int
    steps_per_epoch: int
    logging_steps: int
    record: Callable[[dict], None]
    shown: bool = True
    done: int = 0
    examples: int = 0
    loss_sum: float = 0.0
    recent: list[tuple[int, float]] = field(default_factory=list)  # examples and loss sum
    start: float = field(default_factory=time.perf_counter)

    @property
    def epoch(self) -> int:
        """Whole epochs that are done."""
        return self.done // self.steps_per_epoch

    def state(self) -> dict:
        """What JSON takes of it; floats come back to the bit."""
        return {
            "done": self.done,
            "examples": self.examples,
            "loss_sum": self.loss_sum,
            "recent": self.recent,
            "norm": self.norm,
            "rate": self.rate,
            "seconds": time.perf_counter() - self.start,
        }

    def go_on(self, state: dict) -> None:
        """From a `state`; time spent since it was taken does not count."""
        self.done, self.examples, self.loss_sum = (
            state["done"],
            state["examples"],
            state["loss_sum"],
        )
        self.recent = [tuple(pair) for pair in state["recent"]]
        self.norm, self.rate = state["norm"], state["rate"]
        self.start = time.perf_counter() - state["seconds"]

    def __enter__(self) -> "Progress":
        # `disable=None`: no bar where the output is no terminal
        self.bar = tqdm(
            total=self.total,
            initial=self.done,
            unit="step",
            disable=None if self.shown else True,
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, kind, *rest) -> None:
        if self.recent and kind is None:  # stopped early
            self.report()
        self.bar.close()

    def step(self, examples: int, loss: float, norm: float, rate: float) -> None:
        """Count one step; every `logging_steps`, and at the end, report."""
        self.done += 1
        self.examples += examples
        self.loss_sum += examples * loss
        self.recent.append((examples, examples * loss))
        self.norm, self.rate = norm, rate
        self.bar.update()
        if self.done % self.logging_steps == 0 or self.done == self.total:
            self.report()

    def report(self) -> None:
        """Record the mean loss since the last report, and show it."""
        seen, loss_sum = map(sum, zip(*self.recent, strict=True))
        self.recent.clear()
        elapsed = time.perf_counter() - self.start
        line = {
            "step": self.done,
            "epoch": self.done / self.steps_per_epoch,
            "loss": loss_sum / seen,
            "learning_rate": self.rate,
            "grad_norm": self.norm,
            "samples_per_second": self.examples / elapsed,
            "eta_seconds": (self.total - self.done) * elapsed / self.done,
        }
        self.record(line)
        speed = f"loss {line['loss']:.4f}, {line['samples_per_second']:.0f} examples/s"
        self.bar.set_postfix_str(speed)
        if self.bar.disable:
            left = line["eta_seconds"]
            logger.info("step %d of %d: %s, %.0f s left", self.done, self.total, speed, left)

    def summary(self) -> dict[str, float]:
        """The whole training in figures."""
        elapsed = time.perf_counter() - self.start
        return {
            "train_loss": self.loss_sum / self.examples,
            "train_runtime": elapsed,
            "train_samples_per_second": self.examples / elapsed,
        }
