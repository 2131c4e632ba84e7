"""The application: endpoints, guards, errors and the page."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from serving.endpoints import DROPPED, TIMES, router
from serving.engine import Engine, Settings
from serving.errors import HANDLERS, check_query, refusals
from serving.guards import Guards
from serving.models import Registry


def create_app(registry: Registry, settings: Settings) -> FastAPI:
    """Build the application; its workers run between start-up and shutdown."""
    engine = Engine(registry, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.batcher.start()
        yield
        await asyncio.to_thread(engine.batcher.close)  # what is in the queue is answered

    app = FastAPI(
        title="Tuned text classifiers",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # it would load a viewer from elsewhere, and so would redoc
        redoc_url=None,
        exception_handlers=HANDLERS,
        dependencies=[Depends(check_query)],
        responses=refusals(400, 401, 422),
    )
    app.state.engine = engine
    app.add_middleware(Guards, max_body=settings.max_body, api_key=settings.api_key)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.allowed_hosts))
    app.include_router(router)
    if settings.allow_origins:  # around all else: browsers show a page no error without its headers
        app.middleware_stack = CORSMiddleware(
            app.build_middleware_stack(),
            allow_origins=settings.allow_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["retry-after", DROPPED, *TIMES],
        )
    return app
