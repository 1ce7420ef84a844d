"""The FastAPI application: routes, middleware, and the life of the engines behind it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from lowkey import __version__
from server.api.ab import compare, summary
from server.api.ab.record import ABRecord
from server.api.ab.shadow import Shadow
from server.api.ab.window import ABWindow
from server.api.completions import chat, completions
from server.api.http import errors
from server.api.http.auth import Clients
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


def create_app(settings: Settings, on_fatal: Callable[[str, str], None]) -> FastAPI:
    """The application for one set of variants.

    Args:
        on_fatal: called with a variant's name and the reason when its checkpoint can't be loaded at all.
    """
    metrics = Metrics()
    variants = Variants(settings, metrics, on_fatal)
    service = Service(settings, variants, metrics, Routing(settings))
    saved_states = SavedStates(settings)
    record = ABRecord(metrics, ABWindow(settings.ab_samples))
    shadow = Shadow(service, record)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.variants.start()
        sweeper = asyncio.create_task(saved_states.sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            await shadow.close()
            await service.variants.close()

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
        clients=Clients(settings),
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
