"""The training loop, without HF's Trainer: `train` and `evaluate`."""

import logging
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from dataset import Split
from evaluation.metrics import compute_metrics, prefixed
from model.classifier import predict
from model.methods import method_of
from model.predictions import Predictions
from model.schedule import advice_after_collapse
from model.sequence_classification import classification_loss, divergence
from runtime.batches import Encoded, chunks, padding_share, training_batches
from runtime.checkpoint import Checkpoint, Tensors
from runtime.files import UserError, name_list, read_json
from runtime.labels import label_key
from runtime.machine import Machine
from runtime.training_state import Progress, TrainingState, step_if_finite

logger = logging.getLogger(__name__)

WriteMetrics = Callable[[dict], None]  # takes a line of metrics.jsonl
Save = Callable[[dict, Tensors], None]  # takes the state and the tensors of a checkpoint
ENOUGH_ROWS = 10  # of fewer, all may get one class by chance


class Stopped(Exception):
    """Training was stopped by a signal and saved. Arguments: the step and the signal number."""


# ------------------------------------------------------------------ optimizer, schedule, weights


def build_optimizer(model: nn.Module, args: Namespace) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, grouped by learning rate and weight decay."""
    method = method_of(model.config)
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = args.head_learning_rate if method.is_head(name) else args.learning_rate
            decay = 0.0 if method.is_exempt(name, parameter) else args.weight_decay
            group = groups.setdefault(
                (rate, decay), {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": decay}
            )
            group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), fused=True)


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Return the share of the peak rate at `step` (from 0): linear warm-up, then linear decay."""
    if step < warmup:
        return (step + 1) / warmup
    return (total - step) / (total - warmup)


def warmup_steps(wanted: float, total: int) -> int:
    """Count the warm-up steps; `wanted` below 1 is a share of all steps, as in transformers 5."""
    return min(round(wanted if wanted >= 1 else wanted * total), total - 1)


def set_learning_rate(optimizer: torch.optim.AdamW, progress: Progress, args: Namespace) -> float:
    """Set the learning rates of the next step, and return the one outside the head."""
    warmup = warmup_steps(args.warmup_steps, progress.total)
    factor = learning_rate_factor(progress.done, progress.total, warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return args.learning_rate * factor


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Return the dropout seed of a step; a resumed run draws the same, without random state."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def class_weights(train: Split, choice: str | None, names: list[str]) -> dict[str, float] | None:
    """Return the weight of each label in the loss, by name; None if all weigh the same.

    "balanced": all labels have the same sum of weights; with several labels a row, rows that have
    a label have the same sum as those that lack it. Otherwise `choice` is a JSON file. Then
    single-label weights are scaled to a mean of 1 over the training rows, which keeps the learning
    rate right.

    Raises: UserError if the file is not usable or names an unknown label.
    """
    if choice is None:
        return None
    counts = train.count_labels(names)
    if choice == "balanced":
        others = {name: len(train) - counts[name] * train.multi_label for name in names}
        weights = {name: max(others[name], 1) / max(counts[name], 1) for name in names}
    elif not Path(choice).is_file():
        raise UserError(f"--class_weights: '{choice}' is neither 'balanced' nor a file")
    else:
        given = read_json(Path(choice), dict[str, Annotated[float, Meta(gt=0, le=1e6)]])
        known = {label_key(name): name for name in names}
        given = {known.get(label_key(name), name): weight for name, weight in given.items()}
        if unknown := sorted(given.keys() - set(names)):
            labels = f"'{name_list(unknown[:1])}'; labels are {name_list(names)}"
            raise UserError(f"--class_weights: {choice} has {labels}")
        weights = {name: given.get(name, 1.0) for name in names}
    if train.multi_label:
        return weights
    mean = sum(weights[name] * count for name, count in counts.items()) / len(train)
    return {name: weight / mean for name, weight in weights.items()}


# ------------------------------------------------------------------------------------ training


def train(
    model: nn.Module,
    train_set: Encoded,
    eval_set: Encoded | None,
    args: Namespace,
    machine: Machine,
    write_metrics: WriteMetrics,
    save: Save,
    checkpoint: Checkpoint | None = None,
    stop_requested: Callable[[], int] = lambda: 0,
) -> dict[str, float]:
    """Train the model in place, and leave it with a moving average of its trainable weights.

    eval_set: evaluated after each epoch; the best one may be kept. save: receives state and tensors
    after epochs and every `save_steps` steps. checkpoint: the run is resumed, and ends as if it had
    never stopped. stop_requested: returns a signal number after the step at which to stop.

    Returns `train_loss` (mean over all examples), `train_runtime` (seconds, with evaluations),
    `train_samples_per_second`, `train_steps` and, if an epoch was chosen, `best_epoch`.
    Raises: UserError before a step whose loss or gradient is not finite changes weights; Stopped.
    """
    step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(train_set) / args.num_prefixes / step_size)
    total, is_main = steps_per_epoch * args.num_train_epochs, machine.group.is_main
    progress = Progress(total, steps_per_epoch, args.logging_steps, write_metrics, is_main)
    best = args.metric_for_best_model, args.load_best_model_at_end
    optimizer = build_optimizer(model, args)
    state = TrainingState(model, optimizer, progress, args.ema_decay, *best, checkpoint)
    one_class = False

    with logging_redirect_tqdm(), progress:
        while not state.is_over(args.early_stopping_patience):
            # order the rows; the order depends on (seed, epoch) alone
            batches = training_batches(
                train_set.row_lengths, step_size, args.seed, progress.epoch, args.num_prefixes
            )
            if not progress.done:
                log_plan(batches, train_set, total, step_size, args)

            # the remaining batches of this epoch, one optimizer step each
            model.train()
            for rows in batches[progress.done % steps_per_epoch :]:
                rate = set_learning_rate(state.optimizer, progress, args)
                loss, norm = training_step(
                    model, state.optimizer, train_set, rows, progress.done, args, machine
                )
                progress.step([train_set.rows[row] for row in rows], loss, norm, rate)
                state.average.update(progress.done)
                if progress.done % steps_per_epoch:  # else saved after the epoch's evaluation
                    due = bool(args.save_steps) and progress.done % args.save_steps == 0
                    save_if_due(state, due, machine, save, stop_requested)

            # evaluate on the validation file, remember the best epoch, save a checkpoint
            if eval_set is not None:
                one_class = evaluate_epoch(state, eval_set, args, machine, write_metrics)
            save_if_due(state, args.save_strategy != "no", machine, save, stop_requested)
    if one_class:
        message = "warning: in the last epoch every prediction is the same class; %s"
        logger.warning(message, advice_after_collapse(vars(args)))
    return state.finish()


def log_plan(
    batches: list[np.ndarray], train_set: Encoded, total: int, step_size: int, args: Namespace
) -> None:
    """Log the number of steps, and the share of padding in the batches of an epoch."""
    size = args.per_device_train_batch_size
    micro = [part for batch in batches for part in chunks(batch, size)]
    share = 100 * padding_share(train_set.row_lengths, micro)
    each = f" for each of {args.num_prefixes} prefixes" * (args.num_prefixes > 1)
    logger.info("%d steps of %d examples%s, %.1f %% padding", total, step_size, each, share)


def save_if_due(
    state: TrainingState,
    due: bool,
    machine: Machine,
    save: Save,
    stop_requested: Callable[[], int],
) -> None:
    """Save a checkpoint if one is due or a stop is requested. Raises: Stopped after the latter."""
    stop = max(machine.group.gather(stop_requested()))
    if due or stop:
        with state.average.applied():
            save(*state.state_dict())
    if stop:
        raise Stopped(state.progress.done, stop)


def evaluate_epoch(
    state: TrainingState,
    eval_set: Encoded,
    args: Namespace,
    machine: Machine,
    write_metrics: WriteMetrics,
) -> bool:
    """Evaluate the averaged weights at the end of an epoch, and keep them if they are the best.

    Returns whether every prediction is the same class.
    """
    step, epoch = state.progress.done, state.progress.epoch
    with state.average.applied():
        metrics, one_class = evaluate(state.model, eval_set, args, machine)
        better = state.best.update(state.model, epoch, metrics)
    write_metrics({"step": step, "epoch": epoch, **prefixed("eval", metrics)})
    shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    shown += ", all predictions the same class" * one_class
    best = " (best)" * (better and args.load_best_model_at_end)
    logger.info("epoch %d: validation %s%s", epoch, shown, best)
    return one_class


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_set: Encoded,
    rows: np.ndarray,
    step: int,
    args: Namespace,
    machine: Machine,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do optimizer step number `step` (from 0) on `rows`; return mean loss and gradient norm.

    Every row of a step weighs the same, however unequal the micro-batches or the processes' shares.
    So apart from dropout, accumulation and several processes reproduce one large batch.

    A step whose loss or norm is not finite changes no weight. No value is read here, so that a GPU
    is never waited for; `Progress` reads loss and norm, and fails if they are not finite.
    """
    # forward and backward over micro-batches, with a dropout seed for this step
    torch.manual_seed(step_seed(args.seed, step, machine.group.rank))
    loss = torch.zeros((), device=machine.device)
    weights = train_set.label_weights
    weights = None if weights is None else machine.send(torch.tensor(weights))
    mine = machine.group.share(rows)  # possibly none, and then there is nothing to cut
    for part in chunks(mine, args.per_device_train_batch_size) if len(mine) else ():
        if args.rdrop_alpha:  # every row twice, each time with another dropout mask
            part = np.tile(part, 2)
        logits = machine.logits(model, train_set, train_set.text_index[part])
        labels = machine.send(torch.from_numpy(train_set.labels[part]))
        part_loss = classification_loss(logits, labels, weights) / len(rows)
        if args.rdrop_alpha:
            apart = divergence(logits, labels.is_floating_point()) / len(rows)
            part_loss = part_loss / 2 + args.rdrop_alpha * apart
        part_loss.backward()
        loss += part_loss.detach()

    # sum over all processes
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if machine.group.size > 1:
        for parameter in parameters:
            if parameter.grad is None:  # in a process whose share is empty
                parameter.grad = torch.zeros_like(parameter)
        machine.group.all_reduce_sum([loss, *(parameter.grad for parameter in parameters)])

    # clip, then step
    norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    step_if_finite(optimizer, torch.isfinite(loss + norm))
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


# ---------------------------------------------------------------------------------- evaluation


def evaluate(
    model: nn.Module, data: Encoded, args: Namespace, machine: Machine
) -> tuple[dict[str, float], bool]:
    """Compute the metrics of the whole file at once, see `compute_metrics`.

    Also returns whether every prediction is the same class, though the labels are not.
    """
    logits = predict(model, data, args.per_device_eval_batch_size, machine)
    predictions = Predictions.from_logits(logits, data.labels.ndim == 2)
    one_class = data.labels.ndim == 1 and len(set(predictions.label)) == 1 < len(set(data.labels))
    return compute_metrics(predictions, data.labels), one_class and len(data) >= ENOUGH_ROWS
