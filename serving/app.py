"""The HTTP interface: endpoints, their schemas and their errors.

/v1/... follows vLLM and SGLang, /predict, /info and /metrics text-embeddings-inference.
"""

import asyncio
import logging
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.staticfiles import StaticFiles

from evaluation.importance import word_importance
from model.predictions import Predictions
from runtime.batches import TextRows, tokenize
from runtime.files import UserError
from serving.batching import Batcher, Full, Job, Refused
from serving.csv_files import predict_csv
from serving.guards import Guards, error_body
from serving.metrics import Metrics
from serving.models import Model, Registry
from serving.schemas import (
    ClassifyRequest,
    ClassifyResponse,
    LoadRequest,
    PredictRequest,
    Score,
    UnloadRequest,
    refusals,
)

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
MOST_EXPLAINED = 32  # texts of a request, since each of their words is left out once
PAIR = " [SEP] "  # joins two texts, as it joins two columns in training


@dataclass(frozen=True)
class Settings:
    """The limits of a server."""

    max_batch_tokens: int = 512
    max_queue: int = 10_000  # texts
    max_texts: int = 1_000  # of a request
    max_characters: int = 100_000  # of a text
    max_body: int = 8 * 2**20  # bytes
    allowed_hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    api_key: str | None = None
    updates_from: Path | None = None  # the folder that /v1/load_adapter may read


class ApiError(Exception):
    """An error that a client is told. Arguments: the status, a message and a kind."""


# ------------------------------------------------------------------ the server


class Server:
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
        if not texts:
            raise ApiError(422, "there is no text", "validation")
        if len(texts) > self.settings.max_texts:
            message = f"more than {self.settings.max_texts} texts: send fewer at a time"
            raise ApiError(413, message, "batch_size")
        for number, text in enumerate(texts):
            if not text.strip():
                raise ApiError(422, f"text {number} is blank", "validation")
            if len(text) > self.settings.max_characters:
                message = f"text {number} has more than {self.settings.max_characters:,} characters"
                raise ApiError(413, message, "too_large")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ApiError(422, f"text {number} is not valid Unicode", "tokenization")

    def submit(self, model: Model, texts: list[str]) -> Job:
        """Tokenize texts and put them into the queue; in the tokenizing thread. Raises: Full."""
        if self.batcher.size + len(texts) > self.settings.max_queue:  # do not tokenize in vain
            raise Full(max(1, round(self.batcher.size / self.batcher.speed)))
        return self.batcher.submit(model, tokenize(model.tokenizer, texts, model.max_seq_length)[0])

    async def logits(self, request: Request, model: Model, texts: list[str]) -> Job:
        """Score texts, unless the client leaves. Raises: ApiError."""
        self.check(texts)
        loop = asyncio.get_running_loop()
        try:
            job = await loop.run_in_executor(self.tokenizing, self.submit, model, texts)
        except Full as full:
            raise too_busy(full) from None
        waiting, gone = asyncio.wrap_future(job.future), asyncio.create_task(until_gone(request))
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not waiting.done():
            waiting.cancel()  # the workers leave it out
            raise ApiError(499, "the client has gone", "gone")
        try:
            waiting.result()
        except Refused as error:
            raise ApiError(503, str(error), "unavailable") from None
        self.metrics.count_texts(model.name, len(texts))
        self.metrics.queued.observe(job.queue_seconds)
        self.metrics.inference.observe(job.inference_seconds)
        return job

    def logits_of_rows(self, model: Model, rows: TextRows) -> torch.Tensor:
        """Score rows from a thread that may wait; large requests go in parts."""
        found, texts = [], list(rows.texts)
        for start in range(0, len(texts), self.settings.max_texts):
            part = texts[start : start + self.settings.max_texts]
            job = self.tokenizing.submit(self.submit, model, part).result()
            found.append(job.future.result())
            self.metrics.count_texts(model.name, len(part))
        return torch.cat(found)


def too_busy(full: Full) -> ApiError:
    """Return the error of a full queue."""
    return ApiError(429, "too many texts are waiting: try again", "overloaded", full.args[0])


async def until_gone(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def timed(content: dict | list, job: Job, began: float) -> Response:
    """Answer with JSON, and with the times in headers, in milliseconds."""
    times = {
        "x-total-time": time.perf_counter() - began,
        "x-queue-time": job.queue_seconds,
        "x-inference-time": job.inference_seconds,
    }
    headers = {name: f"{1000 * seconds:.2f}" for name, seconds in times.items()}
    return Response(msgspec.json.encode(content), media_type="application/json", headers=headers)


def ranked(labels: list[str], scores: np.ndarray, count: int | None = None) -> list[dict]:
    """Return labels with their scores, the highest first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return [{"label": labels[place], "score": float(scores[place])} for place in order]


def classified(labels: list[str], found: Predictions, top_k: int | None) -> list[dict]:
    """Return the entries of `ClassifyResponse.data`."""
    data = [
        {
            "index": number,
            "label": label,
            "confidence": float(confidence),
            "probs": probability.tolist(),
            "num_classes": len(labels),
        }
        for number, (label, confidence, probability) in enumerate(
            zip(found.named(labels), found.confidence, found.probability, strict=True)
        )
    ]
    if top_k:
        for one, probability in zip(data, found.probability, strict=True):
            one["scores"] = ranked(labels, probability, top_k)
    return data


def create_app(registry: Registry, settings: Settings) -> FastAPI:
    """Build the application; its workers run between start-up and shutdown."""
    server = Server(registry, settings)
    metrics = server.metrics

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.batcher.start()
        yield
        await asyncio.to_thread(server.batcher.close)  # what is in the queue is answered

    app = FastAPI(
        title="Tuned text classifiers",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = server
    app.add_middleware(Guards, max_body=settings.max_body, api_key=settings.api_key)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.allowed_hosts))

    # -------------------------------------------------------------- errors

    def answer(request: Request, status: int, message: str, kind: str, retry: int = 0) -> Response:
        metrics.failures.labels(kind).inc()
        headers = {"retry-after": str(retry)} if retry else None
        return JSONResponse(error_body(request.url.path, status, message, kind), status, headers)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return answer(request, *error.args)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return answer(request, 400, "the body is not JSON", "validation")
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return answer(request, 422, f"{where}: {first['msg']}".strip(": "), "validation")

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        kind = {404: "not_found", 408: "timeout", 413: "too_large"}.get(error.status_code)
        response = answer(request, error.status_code, str(error.detail), kind or "validation")
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return answer(request, 500, "the server failed: see its log", "internal")

    # -------------------------------------------------------------- classify

    @app.post(
        "/v1/classify",
        response_model=None,
        responses={200: {"model": ClassifyResponse}, **refusals(404, 408, 413, 422, 429, 503)},
    )
    async def classify(body: ClassifyRequest, request: Request) -> Response:
        """Label texts with a tuned model."""
        began = time.perf_counter()
        metrics.requests.labels("classify").inc()
        model = server.find(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        job = await server.logits(request, model, texts)
        found = Predictions.of(job.future.result(), model.multi_label)
        words = []
        if body.explain:
            if len(texts) > MOST_EXPLAINED:
                raise ApiError(413, f"explain: at most {MOST_EXPLAINED} texts", "batch_size")
            try:
                words = await asyncio.to_thread(
                    word_importance,
                    lambda rows: server.logits_of_rows(model, rows),
                    texts,
                    model.multi_label,
                )
            except Full as full:
                raise too_busy(full) from None
        data = classified(model.labels, found, body.top_k)
        for one, why in zip(data, words, strict=False):
            one["words"] = why
        tokens = sum(map(len, job.token_ids))
        content = {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": model.name,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        metrics.successes.labels("classify").inc()
        metrics.duration.observe(time.perf_counter() - began)
        return timed(content, job, began)

    @app.post(
        "/predict",
        response_model=None,
        responses={
            200: {"model": list[Score] | list[list[Score]]},
            **refusals(404, 408, 413, 422, 429, 503),
        },
    )
    async def predict(body: PredictRequest, request: Request) -> Response:
        """Label texts, as in text-embeddings-inference."""
        began = time.perf_counter()
        metrics.requests.labels("predict").inc()
        model = server.find(body.model)
        several = isinstance(body.inputs, list) and isinstance(next(iter(body.inputs), ""), list)
        rows = body.inputs if several else [body.inputs]
        rows = [[row] if isinstance(row, str) else row for row in rows]
        if any(len(row) not in (1, 2) for row in rows):
            raise ApiError(422, "each input is a text or a pair of texts", "validation")
        job = await server.logits(request, model, [PAIR.join(row) for row in rows])
        logits = job.future.result()
        scores = logits.numpy()
        if not body.raw_scores:
            scores = Predictions.of(logits, model.multi_label).probability
        content = [ranked(model.labels, row) for row in scores]
        metrics.successes.labels("predict").inc()
        metrics.duration.observe(time.perf_counter() - began)
        return timed(content if several else content[0], job, began)

    @app.post(
        "/v1/predict_csv",
        response_model=None,
        responses={
            200: {"content": {"text/csv": {}}, "description": "the rows with their predictions"},
            **refusals(404, 408, 413, 422, 429, 503),
        },
        openapi_extra={"requestBody": {"required": True, "content": {"text/csv": {}}}},
    )
    async def classify_csv(
        request: Request,
        model: str | None = None,
        text_column_names: Annotated[str, Query(description="Separated by commas.")] = "text",
        csv_encoding: str = "utf-8",
    ) -> Response:
        """Label the rows of a CSV file, as `main.py --do_predict` does."""
        metrics.requests.labels("predict_csv").inc()
        found, body = server.find(model), await request.body()
        folder = tempfile.TemporaryDirectory(prefix="predictions-")
        try:
            output = await asyncio.to_thread(
                predict_csv,
                lambda rows: server.logits_of_rows(found, rows),
                found,
                body,
                Path(folder.name),
                text_column_names,
                csv_encoding,
            )
        except BaseException as error:
            folder.cleanup()
            if isinstance(error, UserError):
                raise ApiError(422, str(error), "validation") from None
            if isinstance(error, Full):
                raise too_busy(error) from None
            if isinstance(error, Refused):
                raise ApiError(503, str(error), "unavailable") from None
            if isinstance(error, OSError):
                logger.error("a CSV file could not be stored: %s", error)
                raise ApiError(503, "the server cannot store the file", "unavailable") from None
            raise
        metrics.successes.labels("predict_csv").inc()
        return FileResponse(
            output,
            media_type="text/csv",
            filename="predictions.csv",
            background=BackgroundTask(folder.cleanup),
        )

    # -------------------------------------------------------------- models

    @app.get("/v1/models", responses=refusals())
    async def models() -> dict:
        """List the served models: labels, sizes and test scores."""
        return {"object": "list", "data": [one.describe() for one in registry.models.values()]}

    @app.post("/v1/load_adapter", responses=refusals(403, 408, 413, 422))
    async def load_adapter(body: LoadRequest) -> dict:
        """Serve a prefix, or replace one; a damaged or unfitting folder changes nothing."""
        if settings.updates_from is None:
            raise ApiError(403, "updates are off: start with --allow_updates FOLDER", "forbidden")
        root = settings.updates_from.resolve()
        try:
            folder = (root / body.path).resolve()
        except (OSError, ValueError):
            raise ApiError(422, "path: not a path", "validation") from None
        if folder == root or not folder.is_relative_to(root):
            raise ApiError(422, "path: it must be below the folder of updates", "validation")
        async with server.loading:
            try:
                model = await asyncio.to_thread(registry.add, body.name, folder, True)
            except (UserError, OSError) as error:
                logger.warning("not loaded: %s", error)
                message = "refused: it is damaged, no prefix, or tuned on another backbone"
                raise ApiError(422, f"path: {message} (see the server's log)", "refused") from None
        logger.info("loaded %s", body.name)
        return model.describe()

    @app.post("/v1/unload_adapter", responses=refusals(403, 404, 408, 413, 422))
    async def unload_adapter(body: UnloadRequest) -> dict:
        """Stop serving a model."""
        if settings.updates_from is None:
            raise ApiError(403, "updates are off: start with --allow_updates FOLDER", "forbidden")
        if not registry.remove(body.name):
            raise ApiError(404, "no such model: see /v1/models", "not_found")
        logger.info("unloaded %s", body.name)
        return {"id": body.name, "object": "model", "deleted": True}

    # -------------------------------------------------------------- state

    @app.get("/health", responses=refusals())
    async def health() -> dict:
        """Whether the workers run."""
        if not all(worker.is_alive() for worker in server.batcher.workers):
            raise ApiError(503, "a worker has ended: restart the server", "unhealthy")
        return {"status": "ok"}

    @app.get("/info", responses=refusals())
    async def info() -> dict:
        """The limits, as in text-embeddings-inference."""
        return {
            "model_id": next(iter(registry.models), None),
            "models": len(registry.models),
            "model_dtype": "bfloat16" if registry.machine.precision == "bf16" else "float32",
            "max_batch_tokens": settings.max_batch_tokens,
            "max_client_batch_size": settings.max_texts,
            "max_queue_texts": settings.max_queue,
            "max_characters": settings.max_characters,
            "max_body_bytes": settings.max_body,
            "auto_truncate": True,
        }

    @app.get("/metrics", response_class=PlainTextResponse, responses=refusals())
    async def show_metrics() -> Response:
        """Metrics for Prometheus."""
        metrics.served.set(len(registry.models))
        metrics.cached_bytes.set(registry.prefixes.bytes)
        metrics.reads.set(registry.prefixes.reads)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app
