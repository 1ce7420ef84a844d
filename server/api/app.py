"""The FastAPI application of a front end: routes and middleware."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from lowkey import __version__
from server.api.ab import compare, summary
from server.api.ab.record import ABRecord
from server.api.ab.shadow import Shadow
from server.api.completions import chat, completions
from server.api.http import errors
from server.api.http.middleware import Guard, Limits, RequestFrame
from server.api.operations import health, models, ui
from server.api.serving.metrics import Metrics
from server.api.serving.routing import Routing
from server.api.serving.service import Service
from server.api.serving.variants import Variants
from server.api.states import routes as states
from server.api.states.saved import SavedStates
from server.api.tokens import tokenize
from server.settings import Settings
from server.wire.hub import Link


def create_app(
    settings: Settings,
    link: Link,
    around: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
) -> FastAPI:
    """The application of one front end.

    Args:
        link: the way to the hub, which has the engines.
        around: makes what the application lives in.
    """
    metrics = Metrics()
    variants = Variants(settings, metrics, link)
    service = Service(settings, variants, metrics, Routing(settings), link)
    saved_states = SavedStates(settings)
    record = ABRecord(metrics, link)
    shadow = Shadow(service, record)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with around():
            link.listen(service.receive)
            sweeper = asyncio.create_task(saved_states.sweep())
            try:
                yield
            finally:
                sweeper.cancel()
                await shadow.close()
                variants.close()

    app = FastAPI(
        title="Lowkey",
        version=__version__,
        summary="Serves dense and reduced-state linear-attention models side by side.",
        lifespan=lifespan,
        responses=errors.ERRORS,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.saved_states = saved_states
    app.state.ab_record = record
    app.state.observers = [record.add_generation, shadow.offer]  # of completions and chat
    errors.install(app)
    for module in (completions, chat, tokenize, states, compare, summary, models, health, ui):
        app.include_router(module.router)
    _add_middleware(app, service)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    """The last one added is the outermost."""
    settings = service.settings
    app.add_middleware(
        Limits,
        max_body_bytes=settings.max_body_bytes,
        larger={"/v1/states/import": settings.state_budget_bytes + states.IMPORT_ROOM},
        body_timeout_s=settings.body_timeout_s,
        request_timeout_s=settings.request_timeout_s,
    )
    app.add_middleware(
        Guard,
        clients=service.clients,
        public=settings.public_paths,
        on_limit=lambda: service.metrics.on_rate_limit(1),
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            # Whatever is asked for: SDKs send headers of their own, with each release other ones.
            allow_headers=["*"],
            expose_headers=[
                "x-request-id",
                "retry-after",
                "x-lowkey-state-bytes",
                "x-lowkey-tokens-per-second",
            ],
        )
    app.add_middleware(RequestFrame, leaving=lambda: service.leaving, log_texts=settings.log_texts)
