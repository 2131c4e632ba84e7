"""One queue for all models, and the workers that score it in batches.

A worker takes a batch as soon as it is free, so nothing waits for a batch to fill, and under load
the batches grow by themselves. The models take turns, so none can starve the others.

N texts, C classes.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import NamedTuple

import torch
from starlette.exceptions import HTTPException
from torch import Tensor

from model.predictions import average
from runtime.machine import Machine
from serving.metrics import Metrics
from serving.models import Model

logger = logging.getLogger(__name__)

MOST_PREFIXES = 32  # of a batch, since it has a copy of each
# Tokens of padding, about what another call of the engine costs. OpenVINO computes little for them.
MOST_PADDING = {"torch": 64, "openvino": 512}

Row = tuple[Model, tuple[int, ...]]  # a text to score: its model and tokens


class Full(HTTPException):
    """The queue is full; a client may try again after some seconds."""

    def __init__(self, seconds: int) -> None:
        message = "too many texts are waiting: try again"
        super().__init__(429, message, {"retry-after": str(seconds)})


class Job:
    """The texts of one request; `future` gets their logits, float32 [N, C].

    Times are those of `time.perf_counter`, and complete once the future has a result.
    """

    def __init__(self, model: Model, token_ids: list[list[int]], arrived: float) -> None:
        self.model, self.token_ids = model, token_ids
        self.future: Future[Tensor] = Future()
        self.logits: dict[int, Tensor] = {}  # by the text's number
        self.arrived, self.taken, self.done = arrived, 0.0, 0.0  # taken: the first text

    def finish(self, number: int, outcome: Tensor | Exception) -> None:
        """Store a text's logits; the last ones complete the request, and an error ends it."""
        with suppress(InvalidStateError):  # the client has gone, or another text failed
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
                return
            self.logits[number] = outcome
            if len(self.logits) == len(self.token_ids):
                self.done = time.perf_counter()
                logits = [self.logits[number] for number in range(len(self.logits))]
                self.future.set_result(torch.stack(logits))


class Item(NamedTuple):
    """A text in the queue."""

    job: Job
    number: int
    token_ids: list[int]
    cost: int  # tokens to compute; each prefix of an ensemble counts


class Batcher:
    """The queue and its workers."""

    def __init__(
        self, machine: Machine, max_batch_tokens: int, max_queue: int, metrics: Metrics
    ) -> None:
        self.metrics, self.max_batch_tokens, self.max_queue = metrics, max_batch_tokens, max_queue
        self.most_padding = MOST_PADDING[machine.engine]
        self.turns: OrderedDict[Model, deque[Item]] = OrderedDict()  # the next model comes first
        self.size, self.closed = 0, False
        self.speed = 100.0  # texts per second, a moving average
        self.changed = threading.Condition()
        self.threads = max(1, torch.get_num_threads() // machine.workers)  # of each worker
        self.workers = [
            threading.Thread(target=self.work, name=f"worker {number}", daemon=True)
            for number in range(machine.workers)
        ]
        metrics.queue_size.set_function(lambda: self.size)

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
        switches"). Raises: Full; HTTPException if the server is stopping.
        """
        if self.closed:
            raise HTTPException(503, "the server is stopping")
        if len(self.turns.get(model, ())) + count > self.max_queue - self.size:
            raise Full(max(1, round(self.size / self.speed)))

    def submit(self, model: Model, token_ids: list[list[int]], arrived: float) -> Job:
        """Put a request's texts into the queue. Raises: see `check_room`."""
        job = Job(model, token_ids, arrived)
        with self.changed:
            self.check_room(model, len(token_ids))
            count = max(1, len(model.adapters))
            items = [Item(job, n, ids, count * len(ids)) for n, ids in enumerate(token_ids)]
            self.turns.setdefault(model, deque()).extend(items)
            self.size += len(items)
            self.changed.notify_all()  # a large request has work for all
        return job

    def take(self) -> list[Item]:
        """Wait for texts, and return a batch of one backbone; empty if their clients have gone.

        The model that has waited longest decides on the backbone. The models then take turns of at
        most a quarter of a batch, so a model that floods the queue delays others by a batch.
        """
        batch: list[Item] = []
        room, share = self.max_batch_tokens, max(1, self.max_batch_tokens // 4)
        prefixes: dict[Model, int] = {}
        with self.changed:
            self.changed.wait_for(lambda: self.turns or self.closed)
            backend = next((model.backend for model in self.turns), None)
            while room > 0 and sum(prefixes.values()) < MOST_PREFIXES:
                model = next((model for model in self.turns if model.backend is backend), None)
                if model is None:
                    break
                waiting, turn = self.turns.pop(model), min(room, share)
                while waiting and turn > 0:
                    item = waiting.popleft()
                    self.size -= 1
                    if not item.job.future.done():  # else the client has gone, or it failed
                        batch.append(item)
                        room, turn = room - item.cost, turn - item.cost
                if waiting:
                    self.turns[model] = waiting  # its next turn comes last
                prefixes[model] = len(model.adapters)
        return batch

    def work(self) -> None:
        """Score batches until the queue is closed and empty."""
        torch.set_num_threads(self.threads)
        while self.turns or not self.closed:
            if not (batch := self.take()):
                continue
            began = time.perf_counter()
            try:
                self.score(batch, began)
            except Exception as error:  # a worker must not end
                logger.exception("a batch failed")
                for item in batch:
                    item.job.finish(item.number, error)
            seconds = time.perf_counter() - began
            self.speed += 0.05 * (len(batch) * len(self.workers) / seconds - self.speed)

    def score(self, batch: list[Item], now: float) -> None:
        """Score a batch of one backbone; the same text for the same model is scored once."""
        self.metrics.batch_size.observe(len(batch))
        self.metrics.batch_tokens.observe(sum(item.cost for item in batch))
        backend = batch[0].job.model.backend
        rows: dict[Row, list[Item]] = {}
        for item in batch:
            item.job.taken = item.job.taken or now
            rows.setdefault((item.job.model, tuple(item.token_ids)), []).append(item)
        prepared = {}
        for model in dict.fromkeys(model for model, _ in rows):
            try:
                prepared[model] = backend.prepare(model)
            except Exception as error:  # whatever it is, the other models' rows are scored
                logger.error("model %s cannot be read: %r", model.name, error)
                why = f"the folder of model '{model.name}' has changed: it must be loaded again"
                for item in batch:
                    if item.job.model is model:
                        item.job.finish(item.number, HTTPException(503, why))
        for part in by_length([row for row in rows if row[0] in prepared], self.most_padding):
            token_ids = [list(ids) for _, ids in part]
            scored = backend.logits(token_ids, [prepared[model] for model, _ in part])
            for (model, ids), logits in zip(part, scored, strict=True):
                outcome = average(logits[:, None, : len(model.labels)], model.multi_label)[0]
                if not outcome.isfinite().all():
                    why = f"model '{model.name}' has diverged: train it again"
                    outcome = HTTPException(503, why)
                for item in rows[model, ids]:
                    item.job.finish(item.number, outcome)


def by_length(rows: list[Row], most_padding: int) -> list[list[Row]]:
    """Cut rows into parts of similar length, none with more than so many tokens of padding."""
    parts: list[list[Row]] = []
    padding = most_padding + 1
    for row in sorted(rows, key=lambda row: -len(row[1])):
        padding += len(parts[-1][0][1]) - len(row[1]) if parts else 0
        if padding > most_padding:
            parts.append([])
            padding = 0
        parts[-1].append(row)
    return parts
