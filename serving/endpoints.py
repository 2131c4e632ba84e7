"""The endpoints, each below the bodies that it takes and returns. /v1/... follows vLLM and SGLang;
/predict, /info and /metrics follow text-embeddings-inference.

A new one stands here alone: bodies are pydantic models with extra="forbid", its work is in
`engine.metrics.request(NAME)`, and `refusals` lists its error statuses. Without the API key it
would also be in `guards.PUBLIC`.
"""

import asyncio
import logging
import time
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from evaluation.importance import word_importance
from model.predictions import Predictions
from runtime.files import UserError
from serving.batching import Job
from serving.csv_files import CSV_BODY, CsvOptions, predict_csv, store_upload
from serving.engine import Engine, Shared
from serving.errors import refusals

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
TIMES = ("x-total-time", "x-queue-time", "x-inference-time")  # headers of answers
DROPPED = "x-dropped-rows"  # malformed ones of a file, with drop_malformed
MOST_EXPLAINED = 32  # texts of a request, since each of their words is left out once
QUEUED = refusals(404, 408, 413, 429, 503)

router = APIRouter()


class Score(BaseModel):
    """A label and its probability."""

    label: str
    score: float


def ranked(labels: list[str], scores: list[float], count: int | None = None) -> list[dict]:
    """Return labels with their scores, as `Score`, the highest first."""
    order = sorted(range(len(labels)), key=lambda number: -scores[number])[:count]
    return [{"label": labels[number], "score": scores[number]} for number in order]


def times(job: Job, began: float) -> dict[str, str]:
    """Return the headers with the times of a request, in milliseconds."""
    seconds = time.perf_counter() - began, job.taken - job.arrived, job.done - job.taken
    return {name: f"{1000 * value:.2f}" for name, value in zip(TIMES, seconds, strict=True)}


class ClassifyRequest(BaseModel, extra="forbid"):
    """What /v1/classify takes."""

    model: str | None = Field(None, description="A served model; optional if there is one only.")
    input: str | list[str] = Field(description="A text, or several; long ones are cut.")
    top_k: int | None = Field(None, ge=1, description="Also return the k likeliest labels.")
    explain: bool = Field(False, description="Also return what each word contributes.")


class Classified(BaseModel):
    """One text's prediction."""

    index: int
    label: str
    confidence: float
    probs: list[float]
    num_classes: int
    scores: list[Score] | None = None
    words: list[tuple[str, float]] | None = None


class Usage(BaseModel):
    """The tokens of a request."""

    prompt_tokens: int
    total_tokens: int


class ClassifyResponse(BaseModel):
    """What /v1/classify returns."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classified]
    usage: Usage


@router.post("/v1/classify", response_model_exclude_none=True, responses=QUEUED)
async def classify(
    body: ClassifyRequest, request: Request, response: Response, engine: Shared
) -> ClassifyResponse:
    """Label texts with a tuned model."""
    with engine.metrics.request("classify") as began:
        model = engine.find(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        if body.explain and len(texts) > MOST_EXPLAINED:
            raise HTTPException(413, f"explain: at most {MOST_EXPLAINED} texts")
        job = await engine.score(request, model, texts)
        predictions = Predictions.from_logits(job.future.result(), model.multi_label)
        words = [None] * len(texts)
        if body.explain:
            words = await engine.in_thread(
                request, model, lambda score: word_importance(score, texts, model.multi_label)
            )
        data = []
        for index, label in enumerate(predictions.named(model.labels)):
            probs = predictions.probability[index].tolist()
            entry = Classified(
                index=index,
                label=label,
                confidence=predictions.confidence[index],
                probs=probs,
                num_classes=len(probs),
                scores=ranked(model.labels, probs, body.top_k) if body.top_k else None,
                words=words[index],
            )
            data.append(entry)
        tokens = sum(map(len, job.token_ids))
        response.headers.update(times(job, began))
        return ClassifyResponse(
            id=f"classify-{uuid.uuid4().hex}",
            object="list",
            created=int(time.time()),
            model=model.name,
            data=data,
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        )


class PredictRequest(BaseModel, extra="forbid"):
    """What /predict takes: a text, a pair of texts, or a list of lists of one text or two."""

    inputs: str | list[str] | list[list[str]]
    model: str | None = None
    raw_scores: bool = Field(False, description="Logits instead of probabilities.")
    truncate: bool = Field(True, description="Cut long texts; if false, refuse them.")
    truncation_direction: Literal["Right", "right"] = Field("Right", description="Cut the end.")


@router.post("/predict", response_model=list[Score] | list[list[Score]], responses=QUEUED)
async def predict(body: PredictRequest, request: Request, engine: Shared) -> Response:
    """Label texts, as in text-embeddings-inference."""
    with engine.metrics.request("predict") as began:
        model = engine.find(body.model)
        several = isinstance(body.inputs, list) and isinstance(next(iter(body.inputs), ""), list)
        rows = body.inputs if several else [body.inputs]
        rows = [[row] if isinstance(row, str) else row for row in rows]
        if any(len(row) not in (1, 2) for row in rows):
            message = 'each input is a text or a pair of texts; send several as [["one"], ["two"]]'
            raise HTTPException(422, message)
        delimiter = model.form.text_column_delimiter
        texts = [delimiter.join(row) if "".join(row).strip() else "" for row in rows]
        job = await engine.score(request, model, texts, body.truncate)
        predictions = Predictions.from_logits(job.future.result(), model.multi_label)
        scores = predictions.logits if body.raw_scores else predictions.probability
        content = [ranked(model.labels, row) for row in scores.tolist()]
        content = msgspec.json.encode(content if several else content[0])  # twice as fast
        return Response(content, headers=times(job, began), media_type="application/json")


@router.post(
    "/v1/predict_csv",
    responses={
        200: {"content": {"text/csv": {}}, "description": "the rows with their predictions"},
        **QUEUED,
    },
    openapi_extra={"requestBody": CSV_BODY},
)
async def classify_csv(
    request: Request, engine: Shared, options: Annotated[CsvOptions, Query()]
) -> Response:
    """Label the rows of a CSV file: the body, or the one file of a form, whose fields are options.

    The answer is the same file with predictions added.
    """
    with engine.metrics.request("predict_csv"), ExitStack() as files:
        try:
            folder = files.enter_context(TemporaryDirectory(prefix="predictions-"))
            upload = Path(folder, "upload.csv")
            options = await store_upload(request, upload)  # also those of a form
            model = engine.find(options.model)
            output, dropped = await engine.in_thread(
                request, model, lambda score: predict_csv(score, model, upload, options)
            )
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        except OSError as error:
            logger.error("a CSV file could not be stored: %s", error)
            raise HTTPException(503, "the server cannot store the file: try again later") from None
        return FileResponse(
            output,
            media_type="text/csv",
            filename="predictions.csv",
            headers={DROPPED: str(dropped)},
            background=BackgroundTask(files.pop_all().close),
        )


@router.get("/v1/models")
async def models(engine: Shared) -> dict:
    """List the served models: labels, sizes and test scores."""
    served = [*engine.registry.models.values()]
    return {"object": "list", "data": [model.entry for model in served]}


class LoadRequest(BaseModel, extra="forbid"):
    """What /v1/load_adapter takes."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[^/\\\s]+$")
    path: str = Field(min_length=1, description="Below the folder of updates.")


@router.post("/v1/load_adapter", responses=refusals(403, 408, 413))
async def load_adapter(body: LoadRequest, engine: Shared) -> dict:
    """Serve a prefix, or replace one; a damaged or unfitting folder changes nothing."""
    root, folder = updates_root(engine), Path()
    with suppress(OSError, ValueError):  # it is not the name of a folder
        folder = (root / body.path).resolve()
    if root not in folder.parents:
        raise HTTPException(422, "path: it must name a folder below the folder of updates")
    async with engine.loading:
        try:
            model = await asyncio.to_thread(engine.registry.add, body.name, folder, True)
        except (UserError, OSError) as error:
            logger.warning("not loaded: %s", error)
            message = "refused: it is damaged, no prefix, worse in 8 bits, or of another backbone"
            raise HTTPException(422, f"path: {message} (see the server's log)") from None
    logger.info("loaded %s", body.name)
    return model.entry


class UnloadRequest(BaseModel, extra="forbid"):
    """What /v1/unload_adapter takes."""

    name: str


@router.post("/v1/unload_adapter", responses=refusals(403, 404, 408, 413))
async def unload_adapter(body: UnloadRequest, engine: Shared) -> dict:
    """Stop serving a model."""
    updates_root(engine)
    if engine.registry.models.pop(body.name, None) is None:
        raise HTTPException(404, "no such model: see /v1/models")
    logger.info("unloaded %s", body.name)
    return {"id": body.name, "object": "model", "deleted": True}


def updates_root(engine: Engine) -> Path:
    """Return the folder that models may be loaded from. Raises: HTTPException if there is none."""
    if engine.settings.updates_from is None:
        raise HTTPException(403, "updates are off: whoever runs the server can allow them")
    return engine.settings.updates_from.resolve()


@router.get("/health")
async def health(engine: Shared) -> dict:
    """Whether the workers run."""
    if not all(worker.is_alive() for worker in engine.batcher.workers):
        raise HTTPException(503, "a worker has ended: restart the server")
    return {"status": "ok"}


@router.get("/info")
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


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(engine: Shared) -> Response:
    """Metrics for Prometheus."""
    shown, registry = engine.metrics, engine.registry
    shown.served.set(len(registry.models))
    shown.cached_bytes.set(registry.prefixes.bytes)
    shown.reads.set(registry.prefixes.reads)
    return Response(generate_latest(shown.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
@router.get("/page.css", include_in_schema=False)
@router.get("/page.js", include_in_schema=False)
async def page_file(request: Request) -> FileResponse:
    """Serve a file of the page."""
    return FileResponse(PAGE / (request.scope["route"].path[1:] or "index.html"))
