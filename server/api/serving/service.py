"""What every route needs: the state of the server, which variant is meant, and whether it has room."""

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from server.api.ab.window import ABWindow, Pair, Source
from server.api.http.auth import client_of, owner_of
from server.api.http.errors import APIError, unavailable
from server.api.serving.metrics import Metrics, Rejection
from server.api.serving.routing import Routing
from server.api.serving.variants import Variant, Variants
from server.api.states.saved import SavedStates
from server.settings import Settings

if TYPE_CHECKING:
    from server.api.completions.generation import Generation

T = TypeVar("T")


@dataclass
class ServerState:
    """What every route needs; lives in `app.state.lowkey`."""

    settings: Settings
    variants: Variants
    metrics: Metrics
    states: SavedStates
    routing: Routing
    ab: ABWindow
    on_finish: list[Callable[["Generation"], None]] = field(default_factory=list)
    """Told of every generation that has ended, well or not."""
    leaving: bool = False
    """Asked to stop: not ready any more, whether or not requests are still taken."""
    draining: bool = False
    """No new requests."""
    scoring: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One comparison at a time may hold `compare_bytes` of shared memory."""
    timed_comparisons: int = 0
    """How many /v1/compare have run one variant after the other: their order alternates."""

    def observe_pair(self, variant: str, baseline: str, source: Source, pair: Pair) -> None:
        """A variant was measured against a baseline on one prompt."""
        self.metrics.compare_kl.labels(variant, baseline, source).observe(pair.kl)
        self.metrics.compare_agreement.labels(variant, baseline, source).observe(pair.top1_agreement)
        self.ab.add_pair(variant, baseline, source, pair)


def server_state(request: Request) -> ServerState:
    state: ServerState = request.app.state.lowkey
    return state


def named_variant(state: ServerState, name: str, param: str) -> Variant:
    """The variant of that very name. 404 if there is none."""
    variant = state.variants.get(name)
    if variant is None:
        known = ", ".join(state.variants.names)
        raise APIError(404, f"{param}: no variant {name[:200]!r}; there are: {known}", param=param)
    return variant


def find_variant(state: ServerState, name: str, param: str, identity: str | None = None) -> Variant:
    """The variant of that name, or the one that the alias of that name sends a client of that identity
    (`sticky_identity`) to. 404 if there is neither."""
    if name in state.routing.aliases:
        name = state.routing.choose(name, identity)
    elif state.variants.get(name) is None:
        known = ", ".join([*state.variants.names, *state.routing.aliases])
        raise APIError(404, f"{param}: no model {name[:200]!r}; there are: {known}", param=param)
    return named_variant(state, name, param)


def sticky_identity(request: Request, user: str | None) -> str | None:
    """What keeps this client on one variant of an alias: the first thing of `sticky.by` that the request has."""
    sticky = server_state(request).routing.sticky
    for kind in sticky.by:
        match kind:
            case "api_key":
                value = client_of(request).name
            case "user":
                value = user or ""
            case "header":
                value = request.headers.get(sticky.header, "")
        if value:
            return f"{kind}:{value}"
    return None


class Places:
    """Places in a variant's queue, for the requests to its engine that one answer takes."""

    def __init__(self, variant: Variant, count: int) -> None:
        self.variant = variant
        self._held = count
        variant.admitted += count
        variant.answers += 1

    def leave(self) -> None:
        """The engine is done with one of the requests. Its tokens may still be on their way to the client."""
        if self._held:
            self._held -= 1
            self.variant.admitted -= 1

    def end(self) -> None:
        """The answer has ended."""
        self.variant.admitted -= self._held
        self._held = 0
        self.variant.answers -= 1


def cache_salt(request: Request, given: str | None) -> bytes:
    """What the engine keeps this request's prefixes under: those of one key are no other's, unless
    `shared_prefix_cache` is set. A salt that the request names itself comes on top of the key's name, so that nobody
    can choose another key's."""
    shared = given is None and server_state(request).settings.shared_prefix_cache
    owner = "" if shared else owner_of(request)
    if not owner and given is None:
        return b""
    # A key's name holds no NUL.
    return hashlib.blake2b(f"{owner}\0{given or ''}".encode(), digest_size=16).digest()


@contextlib.contextmanager
def admitted(state: ServerState, variant: Variant, places: int = 1) -> Iterator[Places]:
    """Places in the variant's queue, from here to the end of the answer at the latest. 503 if there are none now."""
    _check_admission(state, variant, places)
    held = Places(variant, places)
    try:
        yield held
    finally:
        held.end()


def _check_admission(state: ServerState, variant: Variant, places: int) -> None:
    if state.draining:
        raise _rejected(state, variant, "draining", "the server is shutting down")
    if not variant.client.up:
        now = "down" if variant.loaded else "still loading"
        raise _rejected(state, variant, "engine_down", f"variant {variant.name!r} is {now}")
    room = variant.info.max_running + state.settings.max_queue
    if places > room:
        raise APIError(
            400,
            f"n: {places} choices in all are more than variant {variant.name!r} has room for, {room}",
            param="n",
        )
    if variant.admitted + places > room:
        message = f"variant {variant.name!r} has {variant.admitted} requests in its queue"
        raise _rejected(state, variant, "queue_full", message)


def _rejected(state: ServerState, variant: Variant, reason: Rejection, message: str) -> APIError:
    state.metrics.rejected.labels(variant.name, reason).inc()
    return unavailable(message)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, but cancel it when the client goes away. Nobody reads the error that is then raised."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError(499, "the client closed the connection")
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
