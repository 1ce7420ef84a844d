"""Several servers as one, on Ray Serve (docs/ray.md): each replica is a whole server with engines of its own, and a
front sends requests that begin alike to the same replica, which has their prefix cached. Needs the extra `ray`.

    serve run server.ray_app:build config=lowkey.toml
"""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.types import ASGIApp, Message

from modeling.sources import as_path
from server.api.http.errors import APIError, unavailable
from server.api.http.events import DONE, sse
from server.api.operations.health import why_not_ready
from server.logs import configure
from server.settings import ConfigurationError, Settings, VariantSettings, load_settings
from server.single import create_server
from server.wire.messages import DEFAULT_SLOTS

logger = logging.getLogger("lowkey.ray")

FRONT_REQUESTS = 8192
"""Requests that one front passes on at once. Ray's default is 5."""
STREAM_INTERVAL_S = 0.05
"""Seconds between two pieces of a stream: each costs three processes more than a token costs the engine."""
BEGINNING = 1024
"""Bytes of a prompt, as JSON, that decide which replica is its home."""
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


@dataclass(frozen=True)
class Call:
    """An HTTP request on its way to a replica."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def scope(self) -> dict[str, Any]:
        """The request as an ASGI scope."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": self.headers,
            "client": None,
            "server": None,
        }


Head = tuple[int, list[tuple[bytes, bytes]]]
"""Status and headers of an answer."""


async def answer_of(
    app: ASGIApp, call: Call, interval_s: float = STREAM_INTERVAL_S
) -> AsyncGenerator[Head | bytes]:
    """The head of the app's answer, then its body as it comes, the first part at once and then one each `interval_s` at
    most. Closing it ends the request, as a client that leaves."""
    messages: asyncio.Queue[Message] = asyncio.Queue()
    ended = asyncio.Event()
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:  # the only other message is that the client has left, and then the task is cancelled
            await asyncio.Event().wait()
        given = True
        return {"type": "http.request", "body": call.body, "more_body": False}

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    async def run() -> None:
        try:
            await app(call.scope(), receive, send)
        finally:
            messages.put_nowait({"type": "end"})
            ended.set()

    task = asyncio.create_task(run())
    try:
        pause_s = 0.0
        while (message := await messages.get())["type"] != "end":
            if message["type"] == "http.response.start":
                yield message["status"], [(bytes(k), bytes(v)) for k, v in message["headers"]]
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await ended.wait()
            parts = [message.get("body", b"")]
            while not messages.empty():
                more = messages.get_nowait()
                if more["type"] == "end":
                    messages.put_nowait(more)
                    break
                parts.append(more.get("body", b""))
            yield b"".join(parts)
            pause_s = interval_s
        await task
    finally:
        task.cancel()
        await asyncio.wait([task])


class Replica:
    """One server with its engines, as a Ray Serve deployment. It takes calls once all of its variants have loaded.

    Raises:
        ConfigurationError: a checkpoint can't be loaded.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        configure(settings.log_level, settings.log_format)
        self._unloadable: str | None = None
        self._app, self._hub = create_server(settings, self._fail)
        self._service = self._app.state.service
        self._life = contextlib.AsyncExitStack()
        await self._life.enter_async_context(self._app.router.lifespan_context(self._app))
        try:
            while not all(variant.loaded for variant in self._service.variants):
                if self._unloadable is not None:
                    raise ConfigurationError(self._unloadable)
                await asyncio.sleep(0.05)
        except BaseException:
            await self._life.aclose()
            raise

    def _fail(self, variant: str, reason: str) -> None:
        self._unloadable = f"variant {variant!r} can't be loaded: {reason}"

    async def answer(self, call: Call) -> AsyncGenerator[Head | bytes]:
        """The answer to a call, as `answer_of` gives it."""
        async with contextlib.aclosing(answer_of(self._app, call)) as parts:
            async for part in parts:
                yield part

    async def check_health(self) -> None:
        """Called by Ray, which replaces a replica that fails three times: what /ready says, as an error."""
        reason = self._unloadable or why_not_ready(self._service)
        if reason:
            raise RuntimeError(reason)

    async def scrape(self) -> list[Metric]:
        """This replica's metrics, each sample with the label `replica`."""
        from ray import serve

        context = serve.get_replica_context()
        return labelled(await self._hub.collect(), context.deployment, context.replica_id.unique_id)

    async def close(self) -> None:
        """End the engines."""
        await self._life.aclose()

    async def __del__(self) -> None:
        """Called, and awaited, by Ray once no request runs any more."""
        await self.close()


def labelled(families: list[Metric], deployment: str, replica: str) -> list[Metric]:
    """A server's metrics with labels that tell this replica from others."""
    for family in families:
        family.samples = [
            sample._replace(labels={**sample.labels, "deployment": deployment, "replica": replica})
            for sample in family.samples
        ]
    return families


class _Together:
    """Metrics of several replicas, each family once, as `generate_latest` wants them."""

    def __init__(self, replicas: Sequence[Sequence[Metric]]) -> None:
        self._families: dict[str, Metric] = {}
        for family in (family for families in replicas for family in families):
            known = self._families.setdefault(family.name, family)
            if known is not family:
                known.samples += family.samples

    def collect(self) -> list[Metric]:
        return list(self._families.values())


class _Asked(msgspec.Struct):
    """What the front reads of a JSON body. Whether it makes sense the replica says."""

    model: Any = None
    prompt: Any = None
    messages: Any = None


def home_of(body: bytes) -> tuple[str, str]:
    """The model that a request is for, and a key that requests whose prefix is worth sharing have in common; "" for
    either if there is none.

    A prompt's first `BEGINNING` bytes count; of a chat all up to the first user message, so that a conversation stays
    where its state is, and conversations that share a system prompt only are spread.
    """
    try:
        asked = msgspec.json.decode(body, type=_Asked)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # the last two come as they are
        return "", ""
    model = asked.model if isinstance(asked.model, str) else ""
    beginning = b""
    if asked.messages and isinstance(asked.messages, list):
        roles = [message.get("role") if isinstance(message, dict) else None for message in asked.messages]
        first = roles.index("user") if "user" in roles else 0
        beginning = msgspec.json.encode(asked.messages[: first + 1])
    elif asked.prompt:
        beginning = msgspec.json.encode(asked.prompt)[:BEGINNING]
    if not beginning:
        return model, ""
    return model, hashlib.sha256(f"{model}\0".encode() + beginning).hexdigest()[:16]


class Front:
    """Takes the HTTP requests and passes each on to a replica that has its model, the same if prompts begin alike.

    Args:
        handles: deployment name -> handle; the first answers requests that name no model of another one.
        models: variant or alias -> deployment name.
        limits: whose `max_body_bytes` and `body_timeout_s` hold here.
        errors: what Ray raises when a replica is gone or all are full.
    """

    def __init__(
        self,
        handles: Mapping[str, Any],
        models: Mapping[str, str],
        limits: Settings,
        errors: tuple[type[Exception], ...],
    ) -> None:
        self._handles = dict(handles)
        self._models = dict(models)
        self._limits = limits
        self._errors = errors

    async def __call__(self, request: Request) -> Response:
        """The answer of a replica, or 503 where there is none."""
        try:
            body = await self._body(request)
            headers = [(bytes(k), bytes(v)) for k, v in request.scope["headers"]]
            path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
            call = Call(request.method, path, request.scope["query_string"], headers, body)
            if path == "/metrics":
                return await self._metrics(call)
            if path == "/v1/models" and len(self._handles) > 1:
                return await self._all_models(call)
            model, key = home_of(body)
            return await self._pass_on(call, model or path.removeprefix("/v1/models/"), key)
        except APIError as e:
            return e.response()
        except self._errors as e:
            logger.warning("%s: %s", request.scope["path"], e)
            return unavailable("no replica could answer; try again").response()

    async def _body(self, request: Request) -> bytes:
        most, seconds = self._limits.max_body_bytes, self._limits.body_timeout_s
        parts, size = [], 0
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        raise APIError(413, f"the body is over the limit of {most} bytes")
        except TimeoutError as e:
            raise APIError(408, f"no whole body within {seconds:g} s") from e
        return b"".join(parts)

    async def _pass_on(self, call: Call, model: str, key: str) -> Response:
        deployment = self._models.get(model) or next(iter(self._handles))
        handle = self._handles[deployment].options(method_name="answer", stream=True, session_id=key)
        parts = handle.remote(call)
        status, headers = await anext(parts)
        # Ray adds the id itself, to the request and to the answer.
        headers = [(name, value) for name, value in headers if name != b"x-request-id"]
        kind = dict(headers).get(b"content-type", b"")
        response: Response
        if kind.startswith(b"application/json"):  # whole, so that what a replica can't finish is a 503
            response = Response(b"".join([part async for part in parts]), status)
        else:
            is_stream = kind.startswith(b"text/event-stream")
            response = StreamingResponse(self._rest(parts, is_stream=is_stream), status)
        response.raw_headers = headers
        return response

    async def _rest(self, parts: Any, *, is_stream: bool) -> AsyncGenerator[bytes]:
        try:
            async for part in parts:
                yield part
        except self._errors as e:
            logger.warning("a replica went away in the middle of an answer: %s", e)
            if not is_stream:
                raise  # the connection is closed before the announced length
            yield sse(unavailable("the replica went away; try again").body()) + DONE
        finally:
            parts.cancel()

    async def _metrics(self, call: Call) -> Response:
        """Metrics of all replicas, for a client whom one replica lets in."""
        answer = await self._pass_on(call, "", "")
        if answer.status_code != 200:
            return answer
        found = await asyncio.gather(
            *(
                handle.broadcast("scrape").results_async(return_exceptions=True)
                for handle in self._handles.values()
            )
        )
        replicas = [families for one in found for families in one if not isinstance(families, Exception)]
        return Response(generate_latest(_Together(replicas)), media_type=CONTENT_TYPE_LATEST)

    async def _all_models(self, call: Call) -> Response:
        """/v1/models of every deployment as one list, or the first answer that is none."""
        models: list[Any] = []
        for name in self._handles:
            parts = self._handles[name].options(method_name="answer", stream=True).remote(call)
            status, _ = await anext(parts)
            answer = msgspec.json.decode(b"".join([part async for part in parts]))
            if status != 200:
                return JSONResponse(answer, status)
            models += answer["data"]
        return JSONResponse({"object": "list", "data": models})


def _one_or_more(value: Any) -> Any:
    return {"Lowkey": value} if isinstance(value, str) else value


class Args(BaseModel):
    """What `serve run` and `serve deploy` may be told."""

    model_config = ConfigDict(extra="forbid")

    config: Annotated[dict[str, Path], BeforeValidator(_one_or_more), Field(min_length=1)]
    """A TOML file of settings, or deployment name -> file: variants that are to be scaled each by itself."""


def settings_of(args: Args) -> dict[str, Settings]:
    """Deployment name -> settings, paths made absolute: a replica runs in another directory.

    Raises:
        ConfigurationError: a file is no good, names no variant, or names one that another file has.
    """
    found: dict[str, Settings] = {}
    names: dict[str, str] = {}
    for deployment, file in args.config.items():
        settings = load_settings(file)
        if not settings.variants:
            raise ConfigurationError(f"{file}: variants: no model to serve")
        for name in (*settings.variants, *settings.aliases):
            if name in names:
                raise ConfigurationError(f"{file}: {name!r} is in the settings of {names[name]} too")
            names[name] = deployment
        values = {name: getattr(settings, name) for name in Settings.model_fields}
        values["variants"] = {name: _absolute(variant) for name, variant in settings.variants.items()}
        values["state_dir"] = settings.state_dir and settings.state_dir.absolute()
        found[deployment] = Settings.model_construct(**values)
    return found


def _absolute(variant: VariantSettings) -> VariantSettings:
    source = as_path(variant.source)
    return variant.model_copy(update={"source": str(source.absolute())}) if source.is_dir() else variant


def build(args: Args) -> Any:
    """The application, a `ray.serve.Application`, for `serve run` and `serve deploy`.

    Raises:
        ConfigurationError: see `settings_of`.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import RayServeException

    settings = settings_of(args)
    models = {model: name for name, own in settings.items() for model in (*own.variants, *own.aliases)}
    # Whichever replica is home to a prompt: when it is full, all others are asked before the request waits.
    router = RequestRouterConfig(
        request_router_class=ROUTER, request_router_kwargs={"num_fallback_replicas": 10_000}
    )
    replicas = {
        name: serve.deployment(
            Replica,
            name=name,
            max_ongoing_requests=(own.max_requests or DEFAULT_SLOTS) * len(own.variants),
            max_queued_requests=own.max_queue,
            graceful_shutdown_timeout_s=own.drain_s,
            max_constructor_retry_count=3,
            request_router_config=router,
        ).bind(own)
        for name, own in settings.items()
    }
    first = next(iter(settings.values()))
    front = serve.deployment(
        Front,
        name="Front",
        max_ongoing_requests=FRONT_REQUESTS,
        graceful_shutdown_timeout_s=first.drain_s,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(replicas, models, first, (RayError, RayServeException))
