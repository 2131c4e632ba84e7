"""From texts to logits: checks, tokens, the queue, and clients that leave."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from fastapi import Depends, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from runtime.batches import TextRows, tokenize
from serving.batching import Batcher, Full, Job
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
        """Return a served model. Raises: HTTPException."""
        models = self.registry.models
        if name is None:
            if len(models) != 1:
                raise HTTPException(422, "name a model: see /v1/models")
            return next(iter(models.values()))
        if name not in models:
            raise HTTPException(404, "no such model: see /v1/models")
        return models[name]

    def check(self, texts: list[str]) -> None:
        """Check the texts of a request. Raises: HTTPException."""
        limit = self.settings.max_characters
        most = min(self.settings.max_texts, self.settings.max_queue)
        if not texts:
            raise HTTPException(422, "there is no text")
        if len(texts) > most:
            raise HTTPException(413, f"more than {most} texts: send fewer at a time")
        for number, text in enumerate(texts):
            if not text.strip():
                raise HTTPException(422, f"text {number} is blank: leave it out")
            if len(text) > limit:
                message = f"text {number} has more than {limit:,} characters: shorten it"
                raise HTTPException(413, message)
            try:
                text.encode()
            except UnicodeEncodeError:
                message = f"text {number} is not valid Unicode: it has half of a surrogate pair"
                raise HTTPException(422, message) from None

    async def score(
        self, request: Request, model: Model, texts: list[str], truncate: bool = True
    ) -> Job:
        """Score texts; returns the finished job.

        Raises: HTTPException; ClientDisconnect if the client leaves.
        """
        self.check(texts)
        scoring = asyncio.create_task(self.run_job(model, texts, truncate))
        if not await is_first(scoring, request):
            scoring.cancel()  # the workers leave its texts out
            raise ClientDisconnect
        job = scoring.result()
        self.metrics.queued.observe(job.taken - job.arrived)
        self.metrics.inference.observe(job.done - job.taken)
        return job

    async def run_job(self, model: Model, texts: list[str], truncate: bool = True) -> Job:
        """Tokenize texts, queue them and wait for their logits. Raises: HTTPException."""
        arrived, token_ids = time.perf_counter(), []
        self.batcher.check_room(model, len(texts))  # rather than tokenize in vain
        for part in parts(texts, TOKENIZED):  # in between it is the turn of other requests
            ids, is_cut = await asyncio.get_running_loop().run_in_executor(
                self.tokenizing, tokenize, model.backend.tokenizer, part, model.max_seq_length
            )
            token_ids += ids
            if any(is_cut) and not truncate:
                message = f"a text has more than {model.max_seq_length} tokens: leave out truncate"
                raise HTTPException(422, message)
        job = self.batcher.submit(model, token_ids, arrived)
        await asyncio.wrap_future(job.future)
        self.metrics.texts.labels(model.name).inc(len(texts))
        return job

    async def in_thread(
        self, request: Request, model: Model, work: Callable[[Classify], Result]
    ) -> Result:
        """Call `work` in a thread, with a function that scores rows; end it if the client leaves.

        The function waits for room in the queue. Raises: see `score`, and what `work` raises.
        """
        loop, stop = asyncio.get_running_loop(), threading.Event()
        size = max(1, min(TOKENIZED, self.settings.max_queue // 4))  # leaves room for others

        def run_part(texts: list[str]) -> Job:
            while not stop.is_set():
                with suppress(Full):
                    job = asyncio.run_coroutine_threadsafe(self.run_job(model, texts), loop)
                    return job.result()
                time.sleep(0.05)
            raise ClientDisconnect

        def classify(rows: TextRows) -> torch.Tensor:
            """Return the logits, float32 [N, C], a part at a time."""
            return torch.cat([run_part(part).future.result() for part in parts(rows.texts, size)])

        working = loop.run_in_executor(self.waiting, work, classify)
        try:
            await is_first(working, request)
        finally:
            stop.set()
        return await working  # its files are needed until it ends


async def is_first(future: asyncio.Future, request: Request) -> bool:
    """Wait for a future or until the client leaves; returns whether the future is done."""
    while not future.done() and not await request.is_disconnected():
        await asyncio.wait({future}, timeout=1)
    return future.done()


def parts(texts: list[str], size: int) -> list[list[str]]:
    """Cut texts into parts; the last one may be shorter."""
    return [texts[start : start + size] for start in range(0, len(texts), size)]


async def engine_of(request: Request) -> Engine:
    """Return what the endpoints share."""
    return request.app.state.engine


Shared = Annotated[Engine, Depends(engine_of)]
