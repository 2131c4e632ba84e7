"""The state that training carries from step to step and into checkpoints."""

import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from runtime.checkpoint import Checkpoint, CheckpointError, Tensors
from runtime.files import UserError

logger = logging.getLogger(__name__)

WEIGHT, RAW, BEST = "weight/", "raw/", "best/"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of each parameter


class TrainingState:
    """Optimizer, moving average, best epoch and progress: the whole state of the loop.

    Dropout and the order of the rows are functions of seed, step and epoch, so there is no random
    state to store.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        progress: "Progress",
        args: Namespace,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Set the state before the first step, or restore it from `checkpoint`."""
        self.model, self.optimizer, self.progress = model, optimizer, progress
        self.average = MovingAverage(trainable(model), args.ema_decay)
        self.best = BestEpoch(args.metric_for_best_model, args.load_best_model_at_end)
        if checkpoint:
            self.load_state_dict(checkpoint.state, checkpoint.tensors)
            checkpoint.tensors.clear()  # the caller would keep them in memory during training

    def is_over(self, patience: int) -> bool:
        """Whether all steps are done, or `patience` evaluations in a row brought no improvement."""
        if self.progress.done == self.progress.total:
            return True
        if self.best.patience_is_over(self.progress.epoch, patience):
            logger.info("stopped early: no improvement since epoch %d", self.best.epoch)
            return True
        return False

    def finish(self) -> dict[str, float]:
        """Give the model its averaged or best-epoch weights; returns the training figures."""
        self.average.swap()
        chosen = {"best_epoch": self.best.epoch} if self.best.restore(self.model) else {}
        return {**self.progress.summary(), "train_steps": self.progress.done, **chosen}

    def state_dict(self) -> tuple[dict, Tensors]:
        """Return JSON-serialisable state, and tensors; call it while the average is applied.

        Tensors: averaged weights as `weight/NAME`, optimizer moments as `MOMENT/NAME`, weights of
        the last step as `raw/NAME`, weights of the best epoch as `best/NAME`.
        """
        best_step = self.best.epoch * self.progress.steps_per_epoch
        state = {"step": self.progress.done, "best_step": best_step}
        state |= {"progress": self.progress.state_dict(), "best": self.best.state_dict()}
        tensors = {RAW + name: weight for name, weight in self.average.weights.items()}
        for name, parameter in trainable(self.model).items():
            tensors[WEIGHT + name] = parameter.detach()
            for moment in MOMENTS:
                tensors[f"{moment}/{name}"] = self.optimizer.state[parameter][moment]
        if best_step != self.progress.done:  # otherwise `weight/NAME` is the best
            tensors |= {BEST + name: weight for name, weight in self.best.weights.items()}
        return state, tensors

    def load_state_dict(self, state: dict, tensors: Tensors) -> None:
        """Restore what `state_dict` returned.

        Raises: CheckpointError if the tensors do not fit this model.
        """
        for name, parameter in trainable(self.model).items():
            try:
                weight = tensors[WEIGHT + name]
                moments = {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS}
            except KeyError as error:
                raise CheckpointError(f"the checkpoint lacks {error}") from None
            if weight.shape != parameter.shape:
                raise CheckpointError(
                    f"{name} has shape {list(weight.shape)} in the checkpoint, but "
                    f"{list(parameter.shape)} in the model"
                )
            with torch.no_grad():
                parameter.copy_(weight)
            device = parameter.device
            self.optimizer.state[parameter] = {k: one.to(device) for k, one in moments.items()}
        self.average.load(with_prefix(tensors, RAW))
        self.best.load_state_dict(
            state["best"], with_prefix(tensors, BEST) or with_prefix(tensors, WEIGHT)
        )
        self.progress.load_state_dict(state["progress"])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of a model, by name."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """Select the tensors whose names start with `prefix`, by the rest of their names."""
    return {k.removeprefix(prefix): one for k, one in tensors.items() if k.startswith(prefix)}


class MovingAverage:
    """Exponential moving average of the trainable weights: steadier than the weights of one step.

    Polyak & Juditsky 1992. The decay rises gradually to `decay`, as in TensorFlow, so that the
    start is soon forgotten. With a decay of 0 there is no average; the weights themselves are used.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay, self.parameters = decay, parameters if decay else {}
        self.weights = {name: one.detach().clone() for name, one in self.parameters.items()}

    def update(self, step: int) -> None:
        """Update the average with the weights after step number `step`, counted from 1."""
        if self.parameters:
            decay = min(self.decay, (1 + step) / (10 + step))
            now = [parameter.detach() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.weights.values()), now, 1 - decay)

    def swap(self) -> None:
        """Exchange the model's weights and the average; nothing is copied."""
        for name, parameter in self.parameters.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights within the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def load(self, raw: Tensors) -> None:
        """Copy the average from the model, then load the last step's weights, `raw`, into it."""
        for name, parameter in self.parameters.items():
            self.weights[name].copy_(parameter.detach())
            with torch.no_grad():
                parameter.copy_(raw[name])


class BestEpoch:
    """The best epoch so far by one metric on the validation file and, with `keep`, its weights."""

    def __init__(self, metric: str, keep: bool) -> None:
        self.metric, self.keep = metric, keep
        self.epoch, self.value = 0, -math.inf
        self.weights: Tensors = {}

    def update(self, model: nn.Module, epoch: int, metrics: dict[str, float]) -> bool:
        """Copy the weights if `epoch` is better than all before, and return whether it is."""
        value = -metrics["loss"] if self.metric == "loss" else metrics[self.metric]
        if not value > self.value:
            return False
        self.epoch, self.value = epoch, value
        if self.keep:
            self.weights = {n: one.detach().clone() for n, one in trainable(model).items()}
        return True

    def patience_is_over(self, epoch: int, patience: int) -> bool:
        """Whether the last `patience` evaluations, up to `epoch`, brought no improvement."""
        return 0 < patience <= epoch - self.epoch

    def restore(self, model: nn.Module) -> bool:
        """Put the best weights back into the model; returns whether there are any."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                model.get_parameter(name).copy_(weight)
        return bool(self.weights)

    def state_dict(self) -> dict:
        """Return JSON-serialisable state, without the weights."""
        return {"epoch": self.epoch, "value": self.value if self.epoch else None}

    def load_state_dict(self, state: dict, weights: Tensors) -> None:
        """Restore what `state_dict` returned, and the weights of the best epoch."""
        if state["epoch"]:
            self.epoch, self.value = state["epoch"], state["value"]
            self.weights = weights if self.keep else {}


@dataclass
class Progress:
    """Training progress as the user sees it: a bar, log lines and metrics."""

    total: int
    steps_per_epoch: int
    logging_steps: int
    record: Callable[[dict], None]
    shown: bool = True
    done: int = 0
    examples: int = 0
    loss_sum: float = 0.0
    recent: list[tuple[int, float]] = field(default_factory=list)  # examples, loss sum of each step
    unread: list[tuple] = field(default_factory=list)  # step, rows, loss and norm of each step
    start: float = field(default_factory=time.perf_counter)

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return self.done // self.steps_per_epoch

    @property
    def within_epoch(self) -> bool:
        """Whether the last step did not end an epoch."""
        return self.done % self.steps_per_epoch > 0

    def state_dict(self) -> dict:
        """Return JSON-serialisable state; floats survive bit for bit."""
        self.read()
        names = ("done", "examples", "loss_sum", "recent", "norm", "rate")
        state = {name: getattr(self, name) for name in names}
        return state | {"seconds": time.perf_counter() - self.start}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned; the time in between does not count."""
        for name in ("done", "examples", "loss_sum", "norm", "rate"):
            setattr(self, name, state[name])
        self.recent = [tuple(pair) for pair in state["recent"]]
        self.start = time.perf_counter() - state["seconds"]

    def __enter__(self) -> "Progress":
        # `disable=None`: no bar if the output is not a terminal
        self.bar = tqdm(
            total=self.total,
            initial=self.done,
            unit="step",
            disable=None if self.shown else True,
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, kind, *rest) -> None:
        if kind is None:
            self.read()
            if self.recent:  # stopped early
                self.report()
        self.bar.close()

    def step(self, rows: list[int], loss: torch.Tensor, norm: torch.Tensor, rate: float) -> None:
        """Count one step; report the first, every `logging_steps` and the last.

        Loss and norm are read at once on the CPU, but only for a report on a GPU, which would be
        waited for. rows: their numbers in the training file. Raises: UserError, see `read`.
        """
        self.done += 1
        self.unread.append((self.done, rows, loss, norm))
        self.rate = rate
        due = self.done % self.logging_steps == 0 or self.done in (1, self.total)
        if due or loss.device.type == "cpu":
            self.read()
        self.bar.update()
        if due:
            self.report()

    def read(self) -> None:
        """Read the losses and norms of the steps since the last call.

        Raises: UserError if one is not finite; that step has changed no weight.
        """
        unread, self.unread = self.unread, []
        for step, rows, *tensors in unread:
            loss, self.norm = (tensor.item() for tensor in tensors)
            if not (math.isfinite(loss) and math.isfinite(self.norm)):
                numbers = ", ".join(map(str, sorted(rows)[:8])) + ", ..." * (len(rows) > 8)
                raise UserError(
                    f"the loss is {loss:g} and the gradient norm {self.norm:g}, at step {step}, "
                    f"on the training file's rows {numbers}; the weights were not changed: lower "
                    "--learning_rate"
                )
            self.examples += len(rows)
            self.loss_sum += len(rows) * loss
            self.recent.append((len(rows), len(rows) * loss))

    def report(self) -> None:
        """Record and show the mean loss since the last report."""
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
        if self.bar.disable and not self.done == 1 < self.total:  # too early to tell the time
            left = line["eta_seconds"]
            logger.info("step %d of %d: %s, %.0f s left", self.done, self.total, speed, left)

    def summary(self) -> dict[str, float]:
        """Return the figures of the whole training."""
        elapsed = time.perf_counter() - self.start
        return {
            "train_loss": self.loss_sum / self.examples,
            "train_runtime": elapsed,
            "train_samples_per_second": self.examples / elapsed,
        }
