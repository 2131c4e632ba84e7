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

MOST_PREFIXES = 32  # of a batch, since it has a copy of each
MOST_PADDING = 64  # tokens, about what another call of the model costs


class Full(Exception):
    """The queue is full. Argument: the seconds after which a client may try again."""


class Refused(Exception):
    """A request cannot be answered at all. Argument: why."""


class Job:
    """The texts of one request; `future` gets their logits, float32 [N, C]."""

    def __init__(self, model: Model, token_ids: list[list[int]], arrived: float) -> None:
        self.model, self.token_ids = model, token_ids
        self.future: Future[Tensor] = Future()
        self.logits: list[Tensor | None] = [None] * len(token_ids)
        self.missing = len(token_ids)
        self.arrived = arrived
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
        self.threads = max(1, torch.get_num_threads() // machine.workers)  # of each worker
        self.workers = [
            threading.Thread(target=self.work, name=f"worker {number}", daemon=True)
            for number in range(machine.workers)
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

    def check_room(self, model: Model, count: int) -> None:
        """Check that there is room for so many texts of a model.

        A model may have as many texts in the queue as are still free, so others always find room
        (Choudhury and Hahne 1998, "Dynamic queue length thresholds for shared-memory packet
        switches"). Raises: Full; Refused if the server is stopping.
        """
        if self.closed:
            raise Refused("the server is stopping")
        if len(self.turns.get(model, ())) + count > self.max_queue - self.size:
            raise Full(max(1, round(self.size / self.speed)))

    def submit(self, model: Model, token_ids: list[list[int]], arrived: float) -> Job:
        """Put a request's texts into the queue. Raises: see `check_room`."""
        job = Job(model, token_ids, arrived)
        with self.changed:
            self.check_room(model, len(token_ids))
            waiting = self.turns.setdefault(model, deque())
            waiting.extend(Item(job, number) for number in range(len(token_ids)))
            self.size += len(token_ids)
            self.metrics.queue_size.set(self.size)
            self.changed.notify_all()  # a large request has work for all
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
            prefixes: dict[Model, int] = {}
            room = self.max_batch_tokens
            while room > 0 and (
                models := [model for model in self.turns if model.backend is backend]
            ):
                for model in models:
                    waiting, share = self.turns[model], max(1, self.max_batch_tokens // 4)
                    prefixes[model] = len(model.adapters)
                    while waiting and room > 0 and share > 0:
                        item = waiting.popleft()
                        self.size -= 1
                        if not item.job.future.done():  # else the client has gone, or it failed
                            batch.append(item)
                            room, share = room - item.cost, share - item.cost
                    if waiting:
                        self.turns.move_to_end(model)
                    else:
                        del self.turns[model]
                    if sum(prefixes.values()) >= MOST_PREFIXES:
                        room = 0
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
                try:
                    self.score(batch, began)
                except Exception as error:  # a worker must not end
                    logger.exception("a batch failed")
                    fail(batch, error)
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
                why = f"the folder of model '{model.name}' has changed: it must be loaded again"
                refused[model] = Refused(why)
        for part in by_length([row for row in rows if row[0] in prepared]):
            found = backend.logits(
                [list(ids) for _, ids in part], [prepared[model] for model, _ in part]
            )
            for (model, ids), logits in zip(part, found, strict=True):
                averaged = average(logits[:, None].float(), model.multi_label)[0]
                if averaged.isfinite().all():
                    for item in rows[model, ids]:
                        finish(item, averaged)
                else:
                    refused[model] = Refused(f"model '{model.name}' has diverged: train it again")
        for (model, _), items in rows.items():
            if model in refused:
                fail(items, refused[model])


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
    """Store a text's logits; the last one completes its request.

    Logits that cannot be stacked are an error of this request alone, not of its batch.
    """
    job = item.job
    with LOCK:
        job.logits[item.number] = logits
        job.missing -= 1
        if job.missing == 0 and is_open(job.future):
            job.done = time.perf_counter()
            try:
                job.future.set_result(torch.stack(job.logits))
            except Exception as error:  # a request that is_open has marked must be answered
                logger.exception("the result of model %s cannot be stored", job.model.name)
                job.future.set_exception(error)


def fail(items: list[Item], error: Exception) -> None:
    """Let the requests of these texts fail."""
    with LOCK:
        for job in {item.job for item in items}:
            if is_open(job.future):
                job.future.set_exception(error)


def is_open(future: Future) -> bool:
    """Mark a request as being answered; False if it has been answered or its client has gone.

    Its result or error must be set before `LOCK` is released: it cannot be marked twice.
    """
    return not future.done() and future.set_running_or_notify_cancel()
