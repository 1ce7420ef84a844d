"""Around every HTTP request: its id and log line, its key and rate limit, the limits on its size and time."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.http.auth import Client, Clients
from server.api.http.context import RequestContext, current
from server.api.http.errors import APIError
from server.api.http.events import CONNECTION, DONE, sse

logger = logging.getLogger("lowkey.api")
request_logger = logging.getLogger("lowkey.request")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROBES = ("/health", "/ready", "/metrics")


class RequestFrame:
    """The outermost layer. It notes when a request came, takes or makes its id, answers where everything else
    failed, and writes the log line at the end.

    Args:
        leaving: whether the server has been asked to stop. Each answer then says that it ends its connection: behind a
            load balancer that picks a server per connection, a client that keeps its own would never come to the
            others. So does an answer to a request of which too much has not come to be read.
        log_texts: whether prompts and completions are logged too.
    """

    def __init__(self, app: ASGIApp, leaving: Callable[[], bool], *, log_texts: bool) -> None:
        self._app = app
        self._leaving = leaving
        self._log_texts = log_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = scope["lowkey.arrived"] = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        context = RequestContext(request_id, self._log_texts)
        token = current.set(context)
        status = 0

        async def tagged_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                tags = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                connection = scope.get(CONNECTION)
                if self._leaving() or (connection is not None and connection.ends_unread(scope)):
                    tags.append((b"connection", b"close"))
                message["headers"] = [*message["headers"], *tags]
            await send(message)

        try:
            await self._app(scope, receive, tagged_send)
        except Exception:
            if status:
                raise
            logger.exception("unexpected error in request %s", request_id)
            answer = APIError(500, "internal error; the server's log has the details")
            await answer.response()(scope, receive, tagged_send)
        finally:
            current.reset(token)
            _log(scope, context, status, time.monotonic() - arrived)


def _log(scope: Scope, context: RequestContext, status: int, seconds: float) -> None:
    # The route's pattern: the path itself is the client's text.
    path = getattr(scope.get("route"), "path", "-")
    level = logging.DEBUG if path in _PROBES else logging.INFO
    fields = {"id": context.request_id, "status": status, "seconds": round(seconds, 6), **context.fields()}
    request_logger.log(level, "%s %s", scope["method"], path, extra={"fields": fields})


class Guard:
    """Lets requests in that have a known key, as many as the key's rate limit allows.

    Args:
        public: paths that need no key.
        on_limit: told of each request that comes too soon.
    """

    def __init__(
        self, app: ASGIApp, clients: Clients, public: list[str], on_limit: Callable[[], None]
    ) -> None:
        self._app = app
        self._clients = clients
        self._public = frozenset(public)
        self._on_limit = on_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                client = await self._admit(scope)
            except APIError as e:
                await e.response()(scope, receive, send)
                return
            scope["lowkey.client"] = client
            context = current.get()
            if context is not None:
                context.client = client
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> Client:
        page = "/" if scope["path"].startswith("/ui/") else scope["path"]
        if page in self._public:
            return self._clients.anyone
        client = self._clients.identify(Headers(scope=scope).get("authorization", ""))
        if scope["method"] != "POST":
            return client
        wait = await client.take_request()
        if wait > 0:
            self._on_limit()
            retry_after = int(wait) + 1
            raise APIError(
                429, f"the rate limit is reached; try again in {retry_after} s", retry_after_s=retry_after
            )
        return client


def _too_large(most: int) -> str:
    return f"the body is over the limit of {most} bytes"


class Limits:
    """Limits what one request may take: bytes of its body, time to send it, time in all.

    Args:
        larger: paths that take a body of another size than `max_body_bytes`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        larger: dict[str, int],
        body_timeout_s: float,
        request_timeout_s: float,
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._larger = larger
        self._body_timeout_s = body_timeout_s
        self._request_timeout_s = request_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        most = self._larger.get(scope["path"], self._max_body_bytes)
        if length.isdigit() and int(length) > most:
            await APIError(413, _too_large(most)).response()(scope, receive, send)
            return
        started: Message | None = None
        complete = False

        async def watched_send(message: Message) -> None:
            nonlocal started, complete
            if message["type"] == "http.response.start":
                started = message
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            async with asyncio.timeout(self._request_timeout_s) as limit:
                await self._app(scope, self._limited(receive, most), watched_send)
        except TimeoutError:
            if not limit.expired():
                raise
            if complete:  # just in time
                return
            error = APIError(504, f"the request took longer than {self._request_timeout_s:g} s")
            if started is None:
                await error.response()(scope, receive, send)
            else:
                is_stream = b"text/event-stream" in dict(started["headers"]).get(b"content-type", b"")
                last = sse(error.body()) + DONE if is_stream else b""
                await send({"type": "http.response.body", "body": last, "more_body": False})

    def _limited(self, receive: Receive, most: int) -> Receive:
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self._body_timeout_s

        async def limited_receive() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is the client leaving, whenever it likes
                return await receive()
            # HTTPException, because FastAPI takes any other error for a body that it can't parse.
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as e:
                raise HTTPException(408, f"no whole body within {self._body_timeout_s:g} s") from e
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > most:
                raise HTTPException(413, _too_large(most))
            return message

        return limited_receive
