"""From texts to logits: checks, tokens, the queue, and clients that leave."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from fastapi import Request

from runtime.batches import TextRows, tokenize
from serving.batching import Batcher, Full, Job, Refused
from serving.metrics import Metrics
from serving.models import Model, Registry


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


class Engine:
    """The models, the queue and the limits: all that endpoints need."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self.registry, self.settings, self.metrics = registry, settings, Metrics()
        self.batcher = Batcher(
            registry.machine, settings.max_batch_tokens, settings.max_queue, self.metrics
        )
        self.tokenizing = ThreadPoolExecutor(1, "tokenize")  # tokenizers are not thread-safe
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
        if not texts:
            raise ApiError(422, "there is no text", "validation")
        if len(texts) > self.settings.max_texts:
            message = f"more than {self.settings.max_texts} texts: send fewer at a time"
            raise ApiError(413, message, "batch_size")
        for number, text in enumerate(texts):
            if not text.strip():
                raise ApiError(422, f"text {number} is blank", "validation")
            if len(text) > limit:
                message = f"text {number} has more than {limit:,} characters"
                raise ApiError(413, message, "too_large")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ApiError(422, f"text {number} is not valid Unicode", "tokenization")

    def submit(self, model: Model, texts: list[str]) -> Job:
        """Tokenize texts and put them into the queue; in the tokenizing thread. Raises: Full."""
        self.batcher.check_room(len(texts))  # rather than tokenize in vain
        return self.batcher.submit(model, tokenize(model.tokenizer, texts, model.max_seq_length)[0])

    async def score(self, request: Request, model: Model, texts: list[str]) -> Job:
        """Score texts, unless the client leaves; returns the finished job. Raises: ApiError."""
        self.check(texts)
        loop = asyncio.get_running_loop()
        try:
            job = await loop.run_in_executor(self.tokenizing, self.submit, model, texts)
            waiting = asyncio.wrap_future(job.future)
            gone = asyncio.create_task(until_gone(request))
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not waiting.done():
                waiting.cancel()  # the workers leave it out
                raise ApiError(499, "the client has gone", "gone")
            waiting.result()
        except (Full, Refused) as error:
            raise ApiError.of(error) from None
        self.metrics.count_texts(model.name, len(texts))
        self.metrics.queued.observe(job.queue_seconds)
        self.metrics.inference.observe(job.inference_seconds)
        return job

    def logits(self, model: Model, rows: TextRows) -> torch.Tensor:
        """Score rows in a thread that may wait, a part at a time: float32 [N, C].

        Raises: Full or Refused.
        """
        found, texts = [], list(rows.texts)
        for start in range(0, len(texts), self.settings.max_texts):
            part = texts[start : start + self.settings.max_texts]
            job = self.tokenizing.submit(self.submit, model, part).result()
            found.append(job.future.result())
            self.metrics.count_texts(model.name, len(part))
        return torch.cat(found)

    def finished(self, method: str, began: float) -> None:
        """Count an answered request."""
        self.metrics.successes.labels(method).inc()
        self.metrics.duration.observe(time.perf_counter() - began)


async def until_gone(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
