"""The FastAPI application: routes, middleware, and the life of the engines behind it."""

import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import chat, compare, completions, errors, health, models, states, tokenize
from server.api.answers import ERRORS
from server.api.errors import APIError
from server.api.generation import ServerState
from server.api.saved import SavedStates
from server.metrics import Metrics
from server.settings import Settings
from server.variants import Variants

logger = logging.getLogger("lowkey.api")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestFrame:
    """Around every HTTP request: its time of arrival, its id in and out, the limit on its body, the last resort.

    Args:
        max_body_bytes: of every path but those in `limits`.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, limits: dict[str, int]) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["lowkey.arrived"] = time.monotonic()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        started = False

        async def tagged_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        limit = self._limits.get(scope["path"], self._max_body_bytes)
        too_large = HTTPException(413, f"the body is over the limit of {limit} bytes")
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise too_large  # FastAPI takes any error of another type for a body that it can't parse
            return message

        length = headers.get(b"content-length", b"0")
        try:
            if length.isdigit() and int(length) > limit:
                await APIError(413, str(too_large.detail)).response()(scope, receive, tagged_send)
                return
            await self._app(scope, limited_receive, tagged_send)
        except Exception:
            if started:
                raise
            logger.exception("unexpected error in request %s", request_id)
            answer = APIError(500, "internal error; the server's log has the details")
            await answer.response()(scope, receive, tagged_send)


def create_app(settings: Settings, on_fatal: Callable[[str], None]) -> FastAPI:
    """The application for one set of variants.

    Args:
        on_fatal: called with a variant's name when its checkpoint can't be loaded at all.
    """
    metrics = Metrics()
    state = ServerState(settings, Variants(settings, metrics, on_fatal), metrics, SavedStates(settings))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        state.variants.start()
        try:
            yield
        finally:
            await state.variants.close()

    app = FastAPI(
        title="Lowkey",
        version=version("lowkey"),
        summary="Serves dense and reduced-state linear-attention models side by side.",
        lifespan=lifespan,
        responses=ERRORS,
    )
    app.state.lowkey = state
    errors.install(app)
    for module in (completions, chat, tokenize, states, compare, models, health):
        app.include_router(module.router)
    app.add_middleware(
        RequestFrame,
        max_body_bytes=settings.max_body_bytes,
        limits={"/v1/states/import": settings.state_budget_bytes + states.IMPORT_ROOM},
    )
    return app
