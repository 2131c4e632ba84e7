"""The application: endpoints, guards, errors and the page."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from serving.endpoints import DROPPED, TIMES, page, router
from serving.engine import ApiError, Engine, Settings
from serving.guards import Guards, error_body
from serving.models import Registry
from serving.schemas import UNKNOWN

PROBLEMS = {  # that FastAPI and pydantic say less well; by field, or by their own words
    "input": "send a text or a list of texts",
    "inputs": "send a text, a pair of texts, or a list of lists of one text or two",
    "name": "send a name of 1 to 200 characters, without blanks and slashes",
    "There was an error parsing the body": "the body is not UTF-8, or is nested too deeply",
    "Not Found": "nothing has this address: see /openapi.json",
    "Method Not Allowed": "this address does not take this method: see /openapi.json",
}
KINDS = {404: "not_found", 408: "timeout", 413: "too_large"}  # of errors of the framework


def create_app(registry: Registry, settings: Settings) -> FastAPI:
    """Build the application; its workers run between start-up and shutdown."""
    engine = Engine(registry, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.batcher.start()
        yield
        await asyncio.to_thread(engine.batcher.close)  # what is in the queue is answered

    no_docs = {"docs_url": None, "redoc_url": None}  # they would load a viewer from elsewhere
    app = FastAPI(title="Tuned text classifiers", version="1", lifespan=lifespan, **no_docs)
    app.state.engine = engine
    app.add_middleware(Guards, max_body=settings.max_body, api_key=settings.api_key)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.allowed_hosts))
    for error, handler in HANDLERS.items():
        app.add_exception_handler(error, handler)
    app.include_router(router)
    app.include_router(page)
    if settings.allow_origins:  # around all else: browsers show a page no error without its headers
        app.middleware_stack = CORSMiddleware(
            app.build_middleware_stack(),
            allow_origins=settings.allow_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["retry-after", DROPPED, *TIMES],
        )
    return app


# ------------------------------------------------------------------ errors


async def on_api_error(request: Request, error: ApiError) -> Response:
    """Tell the client, in the form that the path's clients know."""
    request.app.state.engine.metrics.failures.labels(error.kind).inc()
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else None
    content = error_body(request.url.path, error.status, error.message, error.kind)
    return JSONResponse(content, error.status, headers)


async def on_invalid(request: Request, error: RequestValidationError) -> Response:
    """Name the first field that does not fit."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return await on_api_error(request, ApiError(400, "the body is not JSON", "validation"))
    _, *where = map(str, first["loc"])  # after "body" or "query"
    if first["type"] != "missing" and where and where[0] in PROBLEMS:
        first["msg"], where = PROBLEMS[where[0]], where[:1]
    message = ": ".join(filter(None, [".".join(where), first["msg"]]))
    if not where and first["type"] != UNKNOWN:  # it is no JSON, or not an object
        message = "send a JSON object, and the header content-type: application/json"
        message += " (CSV files: to /v1/predict_csv)"
    return await on_api_error(request, ApiError(422, message, "validation"))


async def on_http(request: Request, error: HTTPException) -> Response:
    """Pass on an error of the framework or of the guards."""
    kind = KINDS.get(error.status_code, "validation")
    message = PROBLEMS.get(error.detail, error.detail)
    found = await on_api_error(request, ApiError(error.status_code, message, kind))
    found.headers.update(error.headers or {})
    return found


async def on_bug(request: Request, error: Exception) -> Response:
    """Say nothing about what is inside; the server's log has the traceback."""
    return await on_api_error(request, ApiError(500, "the server failed: see its log", "internal"))


HANDLERS = {
    ApiError: on_api_error,
    RequestValidationError: on_invalid,
    HTTPException: on_http,
    Exception: on_bug,
}
