"""The state that training carries from step to step and into checkpoints."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from runtime.checkpoint import BestState, Checkpoint, CheckpointError, ProgressState, Tensors
from runtime.files import UserError, name_list

logger = logging.getLogger(__name__)

WEIGHT, RAW, BEST = "weight/", "raw/", "best/"

# Private API of torch's fused AdamW, here alone; tests marked `upgrade` notice if it changes.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # its state of each parameter


def step_if_finite(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """Do a step, or none if the boolean `finite` is false; a GPU is not waited for its value."""
    optimizer.found_inf = (~finite).float()
    optimizer.step()


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
        ema_decay: float,
        metric: str,
        keep_best: bool,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Set the state before the first step, or restore it; raises as `restore`."""
        self.model, self.optimizer, self.progress = model, optimizer, progress
        self.average = MovingAverage(trainable(model), ema_decay)
        self.best = BestEpoch(metric, keep_best)
        if checkpoint:
            self.restore(checkpoint.state, checkpoint.tensors)
            checkpoint.tensors.clear()  # the caller would keep them in memory during training

    def is_over(self, patience: int) -> bool:
        """Whether all steps are done, or `patience` evaluations in a row brought no improvement."""
        best = self.best.state.epoch
        early = 0 < patience <= self.progress.epoch - best
        if early and self.progress.done < self.progress.total:
            logger.info("stopped early: no improvement since epoch %d", best)
        return early or self.progress.done == self.progress.total

    def finish(self) -> dict[str, float]:
        """Load the averaged or best-epoch weights into the model; return the training figures."""
        self.average.swap()
        with torch.no_grad():
            for name, weight in self.best.weights.items():
                self.model.get_parameter(name).copy_(weight)
        chosen = {"best_epoch": self.best.state.epoch} if self.best.weights else {}
        state = self.progress.read()
        return {
            "train_loss": state.loss_sum / state.examples,
            "train_runtime": state.seconds,
            "train_samples_per_second": state.examples / state.seconds,
            "train_steps": state.done,
            **chosen,
        }

    def state_dict(self) -> tuple[dict, Tensors]:
        """Return JSON-serialisable state, and tensors; call it while the average is applied.

        Tensors: averaged weights as `weight/NAME`, optimizer moments as `MOMENT/NAME`, weights of
        the last step as `raw/NAME`, weights of the best epoch as `best/NAME`.
        """
        best_step = self.best.state.epoch * self.progress.steps_per_epoch
        state = {
            "step": self.progress.done,
            "best_step": best_step,
            "progress": self.progress.read(),
            "best": self.best.state,
        }
        tensors = {RAW + name: weight for name, weight in self.average.weights.items()}
        for name, parameter in trainable(self.model).items():
            tensors[WEIGHT + name] = parameter.detach()
            for moment in MOMENTS:
                tensors[f"{moment}/{name}"] = self.optimizer.state[parameter][moment]
        if best_step != self.progress.done:  # otherwise `weight/NAME` is the best
            tensors |= {BEST + name: weight for name, weight in self.best.weights.items()}
        return state, tensors

    def restore(self, state: dict, tensors: Tensors) -> None:
        """Restore what `state_dict` returned. Raises: CheckpointError if it is of another model."""
        for name, parameter in trainable(self.model).items():
            weight = tensors.get(WEIGHT + name)
            moments = {moment: tensors.get(f"{moment}/{name}") for moment in MOMENTS}
            lacks = any(tensor is None for tensor in (weight, *moments.values()))
            if lacks or weight.shape != parameter.shape:
                raise CheckpointError(f"the checkpoint is of another model: {name} does not fit")
            parameter.data.copy_(weight)
            self.optimizer.state[parameter] = {
                moment: tensor.to(parameter.device) for moment, tensor in moments.items()
            }
        self.average.load(with_prefix(tensors, RAW))
        self.best.state = state["best"]
        if self.best.keep and self.best.state.epoch:
            self.best.weights = with_prefix(tensors, BEST) or with_prefix(tensors, WEIGHT)
        self.progress.state = state["progress"]
        self.progress.start -= state["progress"].seconds  # the time in between does not count


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of a model, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


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
        self.weights = {name: w.detach().clone() for name, w in self.parameters.items()}

    def update(self, step: int) -> None:
        """Update the average with the weights after step number `step`, counted from 1."""
        if self.parameters:
            decay = min(self.decay, (1 + step) / (10 + step))
            now = [parameter.data for parameter in self.parameters.values()]
            torch._foreach_lerp_([*self.weights.values()], now, 1 - decay)

    def swap(self) -> None:
        """Exchange the model's weights and the average; nothing is copied."""
        for name, parameter in self.parameters.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model holds the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def load(self, raw: Tensors) -> None:
        """Copy the average from the model, then load the last step's weights, `raw`, into it."""
        for name, parameter in self.parameters.items():
            self.weights[name].copy_(parameter.data)
            parameter.data.copy_(raw[name])


class BestEpoch:
    """The best epoch so far by one metric on the validation file and, with `keep`, its weights."""

    def __init__(self, metric: str, keep: bool) -> None:
        self.metric, self.keep = metric, keep
        self.state, self.weights = BestState(0, None), {}

    def update(self, model: nn.Module, epoch: int, metrics: dict[str, float]) -> bool:
        """Copy the weights if `epoch` is better than all before, and return whether it is."""
        value = -metrics["loss"] if self.metric == "loss" else metrics[self.metric]
        better = value > (self.state.value if self.state.epoch else -math.inf)
        if better:
            self.state = BestState(epoch, value)
            if self.keep:
                self.weights = {name: w.detach().clone() for name, w in trainable(model).items()}
        return better


@dataclass
class Progress:
    """Training progress as the user sees it: a bar, log lines and metrics."""

    total: int
    steps_per_epoch: int
    logging_steps: int
    record: Callable[[dict], None]
    shown: bool = True
    state: ProgressState = field(default_factory=lambda: ProgressState(0, 0, 0.0, [], 0.0, 0.0, 0))
    unread: list[tuple] = field(default_factory=list)  # step, rows, loss and norm of each step
    start: float = field(default_factory=time.perf_counter)

    @property
    def done(self) -> int:
        """Number of completed steps."""
        return self.state.done

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return self.done // self.steps_per_epoch

    def __enter__(self) -> "Progress":
        # `disable=None`: no bar if the output is not a terminal
        disable = None if self.shown else True
        self.bar = tqdm(
            total=self.total, initial=self.done, unit="step", disable=disable, dynamic_ncols=True
        )
        return self

    def __exit__(self, kind, *rest) -> None:
        if kind is None and self.read().recent:  # stopped early
            self.report()
        self.bar.close()

    def step(self, rows: list[int], loss: torch.Tensor, norm: torch.Tensor, rate: float) -> None:
        """Count one step; report the first, every `logging_steps` and the last.

        On a GPU, which would be waited for, loss and norm are read only for a report.
        rows: their numbers in the training file. Raises: UserError, see `read`.
        """
        self.state.done += 1
        self.state.rate = rate
        self.unread.append((self.done, rows, loss, norm))
        due = self.done % self.logging_steps == 0 or self.done in (1, self.total)
        if due or loss.device.type == "cpu":
            self.read()
        self.bar.update()
        if due:
            self.report()

    def read(self) -> ProgressState:
        """Read the losses and norms of the steps since the last call, and return the state.

        Raises: UserError if one is not finite; that step has changed no weight.
        """
        unread, self.unread = self.unread, []
        for step, rows, *tensors in unread:
            loss, norm = (tensor.item() for tensor in tensors)
            if not math.isfinite(loss + norm):
                raise UserError(
                    f"the loss is {loss:g} and the gradient norm {norm:g}, at step {step}, on the "
                    f"training file's rows {name_list(map(str, sorted(rows)))}; the weights were "
                    "not changed: lower --learning_rate"
                )
            self.state.norm = norm
            self.state.examples += len(rows)
            self.state.loss_sum += len(rows) * loss
            self.state.recent.append((len(rows), len(rows) * loss))
        self.state.seconds = time.perf_counter() - self.start
        return self.state

    def report(self) -> None:
        """Record and show the mean loss since the last report."""
        seen, loss_sum = map(sum, zip(*self.state.recent, strict=True))
        self.state.recent.clear()
        line = {
            "step": self.done,
            "epoch": self.done / self.steps_per_epoch,
            "loss": loss_sum / seen,
            "learning_rate": self.state.rate,
            "grad_norm": self.state.norm,
            "samples_per_second": self.state.examples / self.state.seconds,
            "eta_seconds": (self.total - self.done) * self.state.seconds / self.done,
        }
        self.record(line)
        speed = f"loss {line['loss']:.4f}, {line['samples_per_second']:.0f} examples/s"
        self.bar.set_postfix_str(speed)
        if self.bar.disable and not self.done == 1 < self.total:  # too early to tell the time
            left = line["eta_seconds"]
            logger.info("step %d of %d: %s, %.0f s left", self.done, self.total, speed, left)
