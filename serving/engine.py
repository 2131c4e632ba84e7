"""From texts to logits: checks, tokens, the queue, and clients that leave."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from fastapi import Request

from runtime.batches import TextRows, tokenize
from serving.batching import Batcher, Full, Job, Refused
from serving.metrics import Metrics
from serving.models import Model, Registry

TOKENIZED = 128  # texts at a time
WAITING = 8  # CSV files and explanations at a time; more of them wait

Classify = Callable[[TextRows], torch.Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """The limits of a server."""

    max_batch_tokens: int = 512
    max_queue: int = 2_000  # texts
    max_texts: int = 1_000  # of a request
    max_characters: int = 100_000  # of a text
    max_body: int = 8 * 2**20  # bytes
    allowed_hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    api_key: str | None = None
    updates_from: Path | None = None  # the folder that /v1/load_adapter may read
    allow_origins: tuple[str, ...] = ()  # of pages that may call this server; "*": any


class ApiError(Exception):
    """An error that a client is told."""

    def __init__(self, status: int, message: str, kind: str, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.retry_after = retry_after  # seconds

    @classmethod
    def of(cls, error: Full | Refused) -> "ApiError":
        """Return what a client is told about an error of the queue."""
        if isinstance(error, Refused):
            return cls(503, str(error), "unavailable")
        return cls(429, "too many texts are waiting: try again", "overloaded", error.args[0])


def gone() -> ApiError:
    """Return what ends the work for a client that has left; nobody reads it."""
    return ApiError(499, "the client has gone", "gone")


class Engine:
    """The models, the queue and the limits: all that endpoints need."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self.registry, self.settings, self.metrics = registry, settings, Metrics()
        self.batcher = Batcher(
            registry.machine, settings.max_batch_tokens, settings.max_queue, self.metrics
        )
        self.tokenizing = ThreadPoolExecutor(1, "tokenize")  # tokenizers are not thread-safe
        self.waiting = ThreadPoolExecutor(WAITING, "wait")  # threads that wait for the queue
        self.loading = asyncio.Lock()  # one model at a time

    def find(self, name: str | None) -> Model:
        """Return a served model. Raises: ApiError."""
        models = self.registry.models
        if name is None and len(models) == 1:
            return next(iter(models.values()))
        if name is None:
            raise ApiError(422, "name a model: see /v1/models", "validation")
        if name not in models:
            raise ApiError(404, "no such model: see /v1/models", "not_found")
        return models[name]

    def check(self, texts: list[str]) -> None:
        """Check the texts of a request. Raises: ApiError."""
        limit = self.settings.max_characters
        most = min(self.settings.max_texts, self.settings.max_queue)
        if not texts:
            raise ApiError(422, "there is no text", "validation")
        if len(texts) > most:
            message = f"more than {most} texts: send fewer at a time"
            raise ApiError(413, message, "batch_size")
        for number, text in enumerate(texts):
            if not text.strip():
                raise ApiError(422, f"text {number} is blank: leave it out", "validation")
            if len(text) > limit:
                message = f"text {number} has more than {limit:,} characters: shorten it"
                raise ApiError(413, message, "too_large")
            try:
                text.encode()
            except UnicodeEncodeError:
                message = f"text {number} is not valid Unicode: it has half of a surrogate pair"
                raise ApiError(422, message, "tokenization") from None

    async def score(
        self, request: Request, model: Model, texts: list[str], truncate: bool = True
    ) -> Job:
        """Score texts, unless the client leaves; returns the finished job. Raises: ApiError."""
        arrived = time.perf_counter()
        self.check(texts)
        loop = asyncio.get_running_loop()
        try:
            self.batcher.check_room(model, len(texts))  # rather than tokenize in vain
            token_ids: list[list[int]] = []
            for part in parts(texts, TOKENIZED):  # in between it is the turn of other requests
                ids, is_cut = await loop.run_in_executor(
                    self.tokenizing, tokenize, model.tokenizer, part, model.max_seq_length
                )
                token_ids += ids
                if any(is_cut) and not truncate:
                    message = (
                        f"a text has more than {model.max_seq_length} tokens: leave out truncate"
                    )
                    raise ApiError(422, message, "validation")
            job = self.batcher.submit(model, token_ids, arrived)
            waiting = asyncio.wrap_future(job.future)
            if not await first(waiting, request):
                waiting.cancel()  # the workers leave it out
                raise gone()
            waiting.result()
        except (Full, Refused) as error:
            raise ApiError.of(error) from None
        self.metrics.count_texts(model.name, len(texts))
        self.metrics.queued.observe(job.queue_seconds)
        self.metrics.inference.observe(job.inference_seconds)
        return job

    async def in_thread(
        self, request: Request, model: Model, work: Callable[[Classify], Result]
    ) -> Result:
        """Call `work` in a thread, with a function that scores rows; end it if the client leaves.

        The function waits for room in the queue. Raises: ApiError, and what `work` raises.
        """
        stop = threading.Event()

        def classify(rows: TextRows) -> torch.Tensor:
            """Return the logits, float32 [N, C], a part at a time."""
            found = []
            size = max(1, min(TOKENIZED, self.settings.max_queue // 4))  # leaves room for others
            for part in parts(list(rows.texts), size):
                arguments = model.tokenizer, part, model.max_seq_length
                ids, _ = self.tokenizing.submit(tokenize, *arguments).result()
                job = None
                while job is None:
                    if stop.is_set():
                        raise gone()
                    try:
                        job = self.batcher.submit(model, ids, time.perf_counter())
                    except Full:
                        time.sleep(0.05)
                found.append(job.future.result())
                self.metrics.count_texts(model.name, len(part))
            return torch.cat(found)

        loop = asyncio.get_running_loop()
        working = asyncio.ensure_future(loop.run_in_executor(self.waiting, work, classify))
        if not await first(working, request):
            stop.set()
        try:
            return await working
        except Refused as error:
            raise ApiError.of(error) from None

    def finished(self, method: str, began: float) -> None:
        """Count an answered request."""
        self.metrics.successes.labels(method).inc()
        self.metrics.duration.observe(time.perf_counter() - began)


async def first(future: asyncio.Future, request: Request) -> bool:
    """Wait for a future or until the client leaves; returns whether the future is done."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.create_task(until_gone())
    await asyncio.wait({future, leaving}, return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    return future.done()


def parts(texts: list[str], size: int) -> list[list[str]]:
    """Cut texts into parts; the last one may be shorter."""
    return [texts[start : start + size] for start in range(0, len(texts), size)]
