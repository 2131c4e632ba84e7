"""The endpoints. /v1/... follows vLLM and SGLang; /predict, /info and /metrics follow
text-embeddings-inference.
"""

import asyncio
import logging
import tempfile
import time
import uuid
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.background import BackgroundTask

from evaluation.importance import Words, word_importance
from model.predictions import Predictions
from runtime.files import UserError
from serving.batching import Job
from serving.csv_files import predict_csv
from serving.engine import ApiError, Engine
from serving.schemas import (
    CSV_BODY,
    ClassifyRequest,
    ClassifyResponse,
    CsvOptions,
    LoadRequest,
    PredictRequest,
    Score,
    UnloadRequest,
    find_unknown,
    refusals,
)
from serving.uploads import store_upload

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
TIMES = ("x-total-time", "x-queue-time", "x-inference-time")  # headers of answers
DROPPED = "x-dropped-rows"  # malformed ones of a file, with drop_malformed
MOST_EXPLAINED = 32  # texts of a request, since each of their words is left out once


async def check_query(request: Request) -> None:
    """Check the names of the query parameters, but not those of probes. Raises: ApiError."""
    if request.method != "POST":
        return
    params = request.scope["route"].dependant.query_params
    known = [name for one in params for name in one.field_info.annotation.model_fields]
    if message := find_unknown("query parameter", request.query_params, known):
        raise ApiError(422, message, "validation")


router = APIRouter(dependencies=[Depends(check_query)])
page = APIRouter()


async def engine_of(request: Request) -> Engine:
    """Return what the endpoints share."""
    return request.app.state.engine


Shared = Annotated[Engine, Depends(engine_of)]

# ------------------------------------------------------------------ classify


@router.post(
    "/v1/classify",
    response_model=None,
    responses={200: {"model": ClassifyResponse}, **refusals(404, 408, 413, 429, 503)},
)
async def classify(body: ClassifyRequest, request: Request, engine: Shared) -> Response:
    """Label texts with a tuned model."""
    began = time.perf_counter()
    engine.metrics.requests.labels("classify").inc()
    model = engine.find(body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if body.explain and len(texts) > MOST_EXPLAINED:
        raise ApiError(413, f"explain: at most {MOST_EXPLAINED} texts", "batch_size")
    job = await engine.score(request, model, texts)
    words: list[Words] = []
    if body.explain:
        words = await engine.in_thread(
            request, model, lambda score: word_importance(score, texts, model.multi_label)
        )
    found = Predictions.from_logits(job.future.result(), model.multi_label)
    tokens = sum(map(len, job.token_ids))
    content = {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model.name,
        "data": classified(model.labels, found, body.top_k, words),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    engine.finished("classify", began)
    return timed(content, job, began)


def classified(
    labels: list[str], found: Predictions, top_k: int | None, words: list[Words]
) -> list[dict]:
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
    for one, why in zip(data, words, strict=False):
        one["words"] = why
    return data


@router.post(
    "/predict",
    response_model=None,
    responses={
        200: {"model": list[Score] | list[list[Score]]},
        **refusals(404, 408, 413, 429, 503),
    },
)
async def predict(body: PredictRequest, request: Request, engine: Shared) -> Response:
    """Label texts, as in text-embeddings-inference."""
    began = time.perf_counter()
    engine.metrics.requests.labels("predict").inc()
    model = engine.find(body.model)
    several = isinstance(body.inputs, list) and isinstance(next(iter(body.inputs), ""), list)
    rows = body.inputs if several else [body.inputs]
    rows = [[row] if isinstance(row, str) else row for row in rows]
    if any(len(row) not in (1, 2) for row in rows):
        message = 'each input is a text or a pair of texts; send several as [["one"], ["two"]]'
        raise ApiError(422, message, "validation")
    delimiter = model.form.text_column_delimiter
    joined = [delimiter.join(row) if "".join(row).strip() else "" for row in rows]
    job = await engine.score(request, model, joined, body.truncate)
    logits = job.future.result()
    scores = logits.numpy()
    if not body.raw_scores:
        scores = Predictions.from_logits(logits, model.multi_label).probability
    content = [ranked(model.labels, row) for row in scores]
    engine.finished("predict", began)
    return timed(content if several else content[0], job, began)


def ranked(labels: list[str], scores: np.ndarray, count: int | None = None) -> list[dict]:
    """Return labels with their scores, the highest first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return [{"label": labels[place], "score": float(scores[place])} for place in order]


def timed(content: dict | list, job: Job, began: float) -> Response:
    """Answer with JSON, and with the times in headers, in milliseconds."""
    seconds = time.perf_counter() - began, job.queue_seconds, job.inference_seconds
    headers = {name: f"{1000 * one:.2f}" for name, one in zip(TIMES, seconds, strict=True)}
    return Response(msgspec.json.encode(content), media_type="application/json", headers=headers)


@router.post(
    "/v1/predict_csv",
    response_model=None,
    responses={
        200: {"content": {"text/csv": {}}, "description": "the rows with their predictions"},
        **refusals(404, 408, 413, 429, 503),
    },
    openapi_extra={"requestBody": {"required": True, "content": CSV_BODY}},
)
async def classify_csv(
    request: Request,
    engine: Shared,
    options: Annotated[CsvOptions, Query()],
) -> Response:
    """Label the rows of a CSV file: the body, or the one file of a form, whose fields are options.

    The answer is the same file with predictions added.
    """
    began = time.perf_counter()
    engine.metrics.requests.labels("predict_csv").inc()
    folder = None
    try:
        folder = tempfile.TemporaryDirectory(prefix="predictions-")
        upload = Path(folder.name) / "upload.csv"
        options = await store_upload(request, upload, options)
        model = engine.find(options.model)
        output, dropped = await engine.in_thread(
            request, model, lambda score: predict_csv(score, model, upload, options)
        )
    except BaseException as error:
        if folder:
            folder.cleanup()
        if isinstance(error, UserError):
            raise ApiError(422, str(error), "validation") from None
        if isinstance(error, OSError):
            logger.error("a CSV file could not be stored: %s", error)
            raise ApiError(
                503, "the server cannot store the file: try again later", "unavailable"
            ) from None
        raise
    engine.finished("predict_csv", began)
    return FileResponse(
        output,
        media_type="text/csv",
        filename="predictions.csv",
        headers={DROPPED: str(dropped)},
        background=BackgroundTask(folder.cleanup),
    )


# ------------------------------------------------------------------ models


@router.get("/v1/models", responses=refusals())
async def models(engine: Shared) -> dict:
    """List the served models: labels, sizes and test scores."""
    served = [*engine.registry.models.values()]
    return {"object": "list", "data": [one.describe() for one in served]}


@router.post("/v1/load_adapter", responses=refusals(403, 408, 413))
async def load_adapter(body: LoadRequest, engine: Shared) -> dict:
    """Serve a prefix, or replace one; a damaged or unfitting folder changes nothing."""
    folder = below(updates_of(engine), body.path)
    async with engine.loading:
        try:
            model = await asyncio.to_thread(engine.registry.add, body.name, folder, True)
        except (UserError, OSError) as error:
            logger.warning("not loaded: %s", error)
            message = "refused: it is damaged, no prefix, or tuned on another backbone"
            raise ApiError(422, f"path: {message} (see the server's log)", "refused") from None
    logger.info("loaded %s", body.name)
    return model.describe()


@router.post("/v1/unload_adapter", responses=refusals(403, 404, 408, 413))
async def unload_adapter(body: UnloadRequest, engine: Shared) -> dict:
    """Stop serving a model."""
    updates_of(engine)
    if not engine.registry.remove(body.name):
        raise ApiError(404, "no such model: see /v1/models", "not_found")
    logger.info("unloaded %s", body.name)
    return {"id": body.name, "object": "model", "deleted": True}


def updates_of(engine: Engine) -> Path:
    """Return the folder that models may be loaded from. Raises: ApiError if there is none."""
    if engine.settings.updates_from is None:
        raise ApiError(403, "updates are off: whoever runs the server can allow them", "forbidden")
    return engine.settings.updates_from.resolve()


def below(root: Path, path: str) -> Path:
    """Return the folder that a path names. Raises: ApiError if it is not below `root`."""
    try:
        folder = (root / path).resolve()
    except (OSError, ValueError):
        raise ApiError(422, "path: it is not the name of a folder", "validation") from None
    if folder == root or not folder.is_relative_to(root):
        raise ApiError(422, "path: it must be below the folder of updates", "validation")
    return folder


# ------------------------------------------------------------------ state


@router.get("/health", responses=refusals())
async def health(engine: Shared) -> dict:
    """Whether the workers run."""
    if not all(worker.is_alive() for worker in engine.batcher.workers):
        raise ApiError(503, "a worker has ended: restart the server", "unhealthy")
    return {"status": "ok"}


@router.get("/info", responses=refusals())
async def info(engine: Shared) -> dict:
    """The limits, as in text-embeddings-inference."""
    settings, registry = engine.settings, engine.registry
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


@router.get("/metrics", response_class=PlainTextResponse, responses=refusals())
async def metrics(engine: Shared) -> Response:
    """Metrics for Prometheus."""
    shown, registry = engine.metrics, engine.registry
    shown.served.set(len(registry.models))
    shown.cached_bytes.set(registry.prefixes.bytes)
    shown.reads.set(registry.prefixes.reads)
    return Response(generate_latest(shown.registry), media_type=CONTENT_TYPE_LATEST)


# ------------------------------------------------------------------ the page


def page_file(path: str, name: str) -> None:
    """Serve a file of the page."""
    page.add_api_route(
        path,
        lambda: FileResponse(PAGE / name),
        response_class=FileResponse,
        include_in_schema=False,
    )


page_file("/", "index.html")
page_file("/page.css", "page.css")
page_file("/page.js", "page.js")
