"""The training loop, written by hand: `train`, `predict`, `evaluate`.

B batch, C classes, N rows, U distinct texts.
"""

import logging
import math
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from evaluation.metrics import compute_metrics, prefixed
from model.sequence_classification import classification_loss
from runtime.batches import Encoded, length_batches, padding_share, pieces, training_batches
from runtime.checkpoint import learnt, put_back
from runtime.machine import Machine, keep_freed_memory
from runtime.training_state import BestEpoch, MovingAverage, Progress

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on: its message names the step, the rows and the way out."""


class Stopped(Exception):
    """Training was asked to stop and is saved; arguments: at which step, by which signal."""


# -------------------------------------------------------------------------------- the machine


# ------------------------------------------------------------------------- optimizer, schedule


def build_optimizer(model: nn.Module, args: Namespace) -> torch.optim.AdamW:
    """AdamW over what is tuned, each group with its peak learning rate.

    No decay on biases and LayerNorm, nor on the prefix, which is no weight but a free input.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.startswith("prefix_encoder.embedding")
            rate = args.head_learning_rate if name.startswith("classifier.") else args.learning_rate
            decay = 0.0 if exempt else args.weight_decay
            group = groups.setdefault(
                (rate, decay), {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": decay}
            )
            group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), fused=True)


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Share of the peak at a step counted from 0: a linear rise, then a linear fall to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (total - step) / (total - warmup)


def warmup_steps(wanted: float, total: int) -> int:
    """Steps of warm-up: below 1 `wanted` is a share of all, as in transformers 5."""
    return min(round(wanted if wanted >= 1 else wanted * total), total - 1)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of dropout: a function of its arguments alone, so a resumed run cannot drift."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


# ------------------------------------------------------------------------------------ training


def train(
    model: nn.Module,
    train_set: Encoded,
    eval_set: Encoded | None,
    args: Namespace,
    machine: Machine,
    *,
    record: Callable[[dict], None],
    save: Callable[[dict, dict[str, torch.Tensor]], None],
    start: tuple[dict, dict[str, torch.Tensor]] | None = None,
    stopped: Callable[[], int] = int,
) -> dict[str, float]:
    """Tune, in place, the parameters that require gradients.

    What is evaluated, saved and left at the end is a `MovingAverage` over the steps. With an
    `eval_set` each epoch is evaluated, and the model ends as its best one where
    `args.load_best_model_at_end`. `record` gets a dict for each logged step and evaluation;
    `save` gets state and tensors after each epoch, and every `args.save_steps`, unless
    `args.save_strategy` is "no". With these as `start` the run goes on, and ends as if it had
    never stopped; there is no random state, see `step_seed`. `stopped` is asked after each step:
    where it gives the number of a signal, the step is saved and training ends.

    Returns `train_loss` (mean over all examples), `train_runtime` (seconds, evaluations
    included), `train_samples_per_second`, `train_steps` and, where chosen, `best_epoch`.
    Raises: TrainingError, before the weights change, where loss or gradient is not finite;
        Stopped, after the step is saved.
    """
    keep_freed_memory()
    optimizer = build_optimizer(model, args)
    step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    lengths = train_set.lengths[train_set.text_of_row]
    steps_per_epoch = math.ceil(len(train_set) / step_size)
    total = steps_per_epoch * args.num_train_epochs
    warmup = warmup_steps(args.warmup_steps, total)
    average = MovingAverage(model, args.ema_decay)
    best = BestEpoch(args.metric_for_best_model, args.load_best_model_at_end)
    progress = Progress(total, steps_per_epoch, args.logging_steps, record, machine.group.first)
    if start:
        state, tensors = start
        put_back(tensors, model, optimizer)
        average.go_on(tensors)
        progress.go_on(state["progress"])
        best.go_on(state["best"], tensors)

    def keep() -> None:
        best_step = best.epoch * steps_per_epoch
        state = {"step": progress.done, "best_step": best_step}
        state |= {"progress": progress.state(), "best": best.state()}
        with average.applied():
            tensors = learnt(model, optimizer) | average.tensors()
            save(state, tensors | best.tensors(now=best_step == progress.done))

    with logging_redirect_tqdm(), progress:
        while progress.done < total and not best.patience_is_over(
            progress.epoch, args.early_stopping_patience
        ):
            epoch = progress.epoch
            # the order of the rows: a function of (seed, epoch)
            batches = training_batches(lengths, step_size, args.seed, epoch)
            if epoch == 0:
                micro = [m for b in batches for m in pieces(b, args.per_device_train_batch_size)]
                share = 100 * padding_share(lengths, micro)
                logger.info("%d steps of %d examples, %.1f %% padding", total, step_size, share)

            # one optimizer step for each batch that is left
            model.train()
            for rows in batches[progress.done % steps_per_epoch :]:
                factor = learning_rate_factor(progress.done, total, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
                loss, norm = training_step(
                    model, optimizer, train_set, rows, progress.done, args, machine
                )
                progress.step(len(rows), loss, norm, args.learning_rate * factor)
                average.update(progress.done)
                ends = progress.done % steps_per_epoch == 0
                due = args.save_steps and progress.done % args.save_steps == 0
                stop = machine.group.highest(stopped())
                if not ends and (due or stop):  # an epoch's end is kept after its evaluation
                    keep()
                if not ends and stop:
                    raise Stopped(progress.done, stop)

            # evaluate on the validation file; remember the best
            if eval_set is not None:
                with average.applied():
                    metrics = evaluate(model, eval_set, args, machine)
                    better = best.update(model, epoch + 1, metrics)
                record({"step": progress.done, "epoch": epoch + 1, **prefixed("eval", metrics)})
                shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
                logger.info("epoch %d: validation %s%s", epoch + 1, shown, " (best)" * better)

            # keep this epoch
            stop = machine.group.highest(stopped())
            if args.save_strategy != "no" or stop:
                keep()
            if stop:
                raise Stopped(progress.done, stop)

    if progress.done < total:
        logger.info("stopped early: no better epoch since %d", best.epoch)
    average.swap()
    chosen = {"best_epoch": best.epoch} if best.restore(model) else {}
    return {**progress.summary(), "train_steps": progress.done, **chosen}


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_set: Encoded,
    rows: np.ndarray,
    step: int,
    args: Namespace,
    machine: Machine,
) -> tuple[float, float]:
    """The optimizer's step number `step`, on `rows`; returns mean loss and gradient norm.

    Every row weighs 1 / len(rows), so the last, partial window of an epoch counts right, and but
    for dropout accumulation and several processes equal the big batch.
    """
    # forward and backward over micro-batches, with the step's own dropout
    torch.manual_seed(step_seed(args.seed, step, machine.group.rank))
    loss = torch.zeros((), device=machine.device)
    mine = machine.group.share(rows)
    for part in pieces(mine, args.per_device_train_batch_size) if len(mine) else ():
        logits = machine.logits(model, train_set, train_set.text_of_row[part])
        labels = torch.from_numpy(train_set.labels[part]).to(machine.device)
        part_loss = classification_loss(logits, labels) / len(rows)
        part_loss.backward()
        loss += part_loss.detach()

    # add up what all processes found
    tuned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if machine.group.size > 1:
        for parameter in tuned:
            if parameter.grad is None:  # of a process whose share is empty
                parameter.grad = torch.zeros_like(parameter)
        machine.group.add_up([loss, *(parameter.grad for parameter in tuned)])
    loss = loss.item()

    # clip; refuse what is not finite while the weights are still good
    norm = nn.utils.clip_grad_norm_(tuned, args.max_grad_norm).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        numbers = ", ".join(str(train_set.rows[row]) for row in sorted(rows)[:8])
        raise TrainingError(
            f"the loss is {loss:g} and its gradient's norm {norm:g}, at step {step + 1}, on the "
            f"training file's rows {numbers}{', ...' if len(rows) > 8 else ''}; "
            "the weights were not changed by it: lower --learning_rate"
        )

    # step
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


# ---------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def predict(model: nn.Module, data: Encoded, args: Namespace, machine: Machine) -> torch.Tensor:
    """Logits of every row, in the rows' order: float32 [N, C]. No text is scored twice.

    Raises: TrainingError where one is not finite, since it would count as a prediction.
    """
    keep_freed_memory()
    model.eval()
    group = machine.group
    mine = group.share(length_batches(data, args.per_device_eval_batch_size))
    of_text = torch.zeros(len(data.token_ids), model.config.num_labels)  # [U, C]
    for texts in tqdm(
        mine, desc="predict", unit="batch", disable=None if group.first else True, leave=False,
        dynamic_ncols=True,
    ):  # fmt: skip
        of_text[texts] = machine.logits(model, data, texts).cpu()
    if group.size > 1:
        of_text = of_text.to(machine.device)
        group.add_up([of_text])
        of_text = of_text.cpu()
    if not of_text.isfinite().all():
        raise TrainingError("the model's logits are not finite: it diverged, lower --learning_rate")
    return of_text[data.text_of_row]  # [U, C] -> [N, C]


def evaluate(
    model: nn.Module, data: Encoded, args: Namespace, machine: Machine
) -> dict[str, float]:
    """Metrics over the whole file at once, see `compute_metrics`."""
    logits = predict(model, data, args, machine)
    if data.labels.ndim == 1 and len(logits.argmax(dim=1).unique()) == 1:
        logger.warning(
            "warning: every prediction is the same class: the model has collapsed, or has not "
            "learnt yet; try another --learning_rate, --warmup_steps or more epochs"
        )
    return compute_metrics(logits, data.labels)
