"""One queue for all models, and the workers that score it in batches.

A worker takes a batch as soon as it is free, so nothing waits for a batch to fill, and under load
the batches grow by themselves. The models take turns, so none can starve the others.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from model.predictions import average
from runtime.machine import Machine
from serving.metrics import Metrics
from serving.models import Changed, Model

logger = logging.getLogger(__name__)

MOST_PADDING = 64  # tokens, about what another call of the model costs


class Full(Exception):
    """The queue is full. Argument: the seconds after which a client may try again."""


class Refused(Exception):
    """The model of a request cannot be used any more. Argument: why."""


class Job:
    """The texts of one request; `future` gets their logits, float32 [N, C]."""

    def __init__(self, model: Model, token_ids: list[list[int]]) -> None:
        self.model, self.token_ids = model, token_ids
        self.future: Future[Tensor] = Future()
        self.logits: list[Tensor | None] = [None] * len(token_ids)
        self.missing = len(token_ids)
        self.arrived = time.perf_counter()
        self.taken: float | None = None  # when the first text left the queue
        self.done: float | None = None

    @property
    def queue_seconds(self) -> float:
        """How long the request waited."""
        return (self.taken or self.arrived) - self.arrived

    @property
    def inference_seconds(self) -> float:
        """How long it took from the first text's batch to the last one's."""
        return (self.done or self.arrived) - (self.taken or self.arrived)


class Item(NamedTuple):
    """A text in the queue."""

    job: Job
    number: int

    @property
    def token_ids(self) -> list[int]:
        """The text's tokens."""
        return self.job.token_ids[self.number]

    @property
    def cost(self) -> int:
        """Tokens to compute; each prefix of an ensemble counts."""
        return len(self.token_ids) * max(1, len(self.job.model.adapters))


class Batcher:
    """The queue and its workers."""

    def __init__(
        self, machine: Machine, max_batch_tokens: int, max_queue: int, metrics: Metrics
    ) -> None:
        self.machine, self.metrics = machine, metrics
        self.max_batch_tokens, self.max_queue = max_batch_tokens, max_queue
        self.turns: OrderedDict[Model, deque[Item]] = OrderedDict()  # the next model comes first
        self.size, self.closed = 0, False
        self.speed = 100.0  # texts per second, a moving average
        self.changed = threading.Condition()
        self.threads = max(1, torch.get_num_threads() // machine.streams)  # of each worker
        self.workers = [
            threading.Thread(target=self.work, name=f"worker {number}", daemon=True)
            for number in range(machine.streams)
        ]

    def start(self) -> None:
        """Start the workers."""
        for worker in self.workers:
            worker.start()

    def close(self) -> None:
        """Score what is in the queue, then stop the workers."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for worker in self.workers:
            worker.join()

    def check_room(self, count: int) -> None:
        """Raises: Full if there is no room for so many texts."""
        if self.closed or self.size + count > self.max_queue:
            raise Full(max(1, round(self.size / self.speed)))

    def submit(self, model: Model, token_ids: list[list[int]]) -> Job:
        """Put a request's texts into the queue. Raises: Full if there is no room for all."""
        job = Job(model, token_ids)
        with self.changed:
            self.check_room(len(token_ids))
            waiting = self.turns.setdefault(model, deque())
            waiting.extend(Item(job, number) for number in range(len(token_ids)))
            self.size += len(token_ids)
            self.metrics.queue_size.set(self.size)
            self.changed.notify()
        return job

    def take(self) -> list[Item]:
        """Wait for texts, and return a batch of one backbone; empty once the queue is closed.

        The model that has waited longest decides on the backbone. The models then take turns of at
        most a quarter of a batch, so a model that floods the queue delays others by a batch.
        """
        with self.changed:
            while not self.turns:
                if self.closed:
                    return []
                self.changed.wait()
            backend = next(iter(self.turns)).backend
            batch: list[Item] = []
            room = self.max_batch_tokens
            while room > 0 and (
                models := [model for model in self.turns if model.backend is backend]
            ):
                for model in models:
                    waiting, share = self.turns[model], self.max_batch_tokens // 4
                    while waiting and room > 0 and share > 0:
                        item = waiting.popleft()
                        self.size -= 1
                        if not item.job.future.cancelled():  # else the client has gone
                            batch.append(item)
                            room, share = room - item.cost, share - item.cost
                    if waiting:
                        self.turns.move_to_end(model)
                    else:
                        del self.turns[model]
                    if room <= 0:
                        break
            self.metrics.queue_size.set(self.size)
        return batch

    def work(self) -> None:
        """Score batches until the queue is closed and empty."""
        torch.set_num_threads(self.threads)
        while True:
            batch = self.take()
            if batch:
                began = time.perf_counter()
                self.score(batch, began)
                seconds = time.perf_counter() - began
                self.speed += 0.05 * (len(batch) * len(self.workers) / seconds - self.speed)
            elif self.closed and not self.turns:
                return

    def score(self, batch: list[Item], now: float) -> None:
        """Score a batch of one backbone; the same text for the same model is scored once."""
        self.metrics.batch_size.observe(len(batch))
        self.metrics.batch_tokens.observe(sum(item.cost for item in batch))
        backend = batch[0].job.model.backend
        rows: dict[tuple, list[Item]] = {}
        for item in batch:
            item.job.taken = item.job.taken or now
            rows.setdefault((item.job.model, tuple(item.token_ids)), []).append(item)
        prepared, refused = {}, {}
        for model in dict.fromkeys(model for model, _ in rows):
            try:
                prepared[model] = backend.prepare(model)
            except Exception as error:  # whatever it is, the other models' rows go on
                if not isinstance(error, Changed):
                    logger.exception("model %s cannot be read", model.name)
                refused[model] = Refused(f"the folder of model '{model.name}' has changed")
        for part in by_length([row for row in rows if row[0] in prepared]):
            try:
                found = backend.logits(
                    [list(ids) for _, ids in part], [prepared[model] for model, _ in part]
                )
            except Exception as error:
                logger.exception("a batch failed")
                for row in part:
                    fail(rows[row], error)
                continue
            for (model, ids), logits in zip(part, found, strict=True):
                averaged = average(logits[:, None], model.multi_label)[0]
                for item in rows[model, ids]:
                    finish(item, averaged)
        for model, error in refused.items():
            for row, items in rows.items():
                if row[0] is model:
                    fail(items, error)


def by_length(rows: list[tuple]) -> list[list[tuple]]:
    """Cut rows into parts of similar length, so that none has more than `MOST_PADDING` tokens."""
    parts: list[list[tuple]] = []
    padding = 0
    for row in sorted(rows, key=lambda row: -len(row[1])):
        padding += len(parts[-1][0][1]) - len(row[1]) if parts else 0
        if parts and padding <= MOST_PADDING:
            parts[-1].append(row)
        else:
            parts.append([row])
            padding = 0
    return parts


LOCK = threading.Lock()  # two workers may finish texts of one request at once


def finish(item: Item, logits: Tensor) -> None:
    """Store a text's logits; the last one completes its request."""
    job = item.job
    with LOCK:
        job.logits[item.number] = logits
        job.missing -= 1
        if job.missing == 0 and is_open(job.future):
            job.done = time.perf_counter()
            job.future.set_result(torch.stack(job.logits))


def fail(items: list[Item], error: Exception) -> None:
    """Let the requests of these texts fail."""
    with LOCK:
        for job in {item.job for item in items}:
            if is_open(job.future):
                job.future.set_exception(error)


def is_open(future: Future) -> bool:
    """Whether a request still waits: it has not failed and its client has not gone."""
    return not future.done() and future.set_running_or_notify_cancel()
