"""The service behind the routes: its variants, which one a request means, and whether that one has room."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from fastapi import Request

from server.api.http.auth import capped_priority, client_of, owner_of
from server.api.http.errors import APIError, unavailable
from server.api.serving.metrics import Metrics, Rejection
from server.api.serving.routing import Routing
from server.api.serving.variants import Variant, Variants
from server.settings import Settings


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


@dataclass
class Service:
    """What every route works with; lives in `app.state.service`."""

    settings: Settings
    variants: Variants
    metrics: Metrics
    routing: Routing
    leaving: bool = False
    """Whether the server has been asked to stop: it is not ready any more, whether or not it still takes requests."""
    draining: bool = False
    """Whether the server takes no new requests."""

    def named(self, name: str, param: str) -> Variant:
        """The variant of that very name. 404 if there is none; `param` is the field that names it."""
        variant = self.variants.get(name)
        if variant is None:
            known = ", ".join(self.variants.names)
            raise APIError(404, f"{param}: no variant {name[:200]!r}; there are: {known}", param=param)
        return variant

    def find(self, name: str, param: str, identity: str | None = None) -> Variant:
        """The variant of that name, or the one that the alias of that name sends a client of that identity
        (`sticky_identity`) to. 404 if there is neither."""
        if name in self.routing.aliases:
            name = self.routing.choose(name, identity)
        elif self.variants.get(name) is None:
            known = ", ".join([*self.variants.names, *self.routing.aliases])
            raise APIError(404, f"{param}: no model {name[:200]!r}; there are: {known}", param=param)
        return self.named(name, param)

    @contextlib.contextmanager
    def admit(self, variant: Variant, places: int = 1) -> Iterator[Places]:
        """Places in the variant's queue, from here to the end of the answer at the latest. 503 if there are none
        now."""
        self._check_room(variant, places)
        held = Places(variant, places)
        try:
            yield held
        finally:
            held.end()

    def _check_room(self, variant: Variant, places: int) -> None:
        if self.draining:
            raise _rejected(variant, "draining", "the server is shutting down")
        if not variant.client.up:
            now = "down" if variant.loaded else "still loading"
            raise _rejected(variant, "engine_down", f"variant {variant.name!r} is {now}")
        room = variant.info.max_running + self.settings.max_queue
        if places > room:
            raise APIError(
                400,
                f"n: {places} choices in all are more than variant {variant.name!r} has room for, {room}",
                param="n",
            )
        if variant.admitted + places > room:
            message = f"variant {variant.name!r} has {variant.admitted} requests in its queue"
            raise _rejected(variant, "queue_full", message)


def _rejected(variant: Variant, reason: Rejection, message: str) -> APIError:
    variant.metrics.on_rejected(reason)
    return unavailable(message)


def service_of(request: Request) -> Service:
    """The service that the request came to."""
    service: Service = request.app.state.service
    return service


@dataclass(frozen=True)
class Origin:
    """What the work of an engine has from the HTTP request that asks for it."""

    endpoint: str
    """The label that metrics of the request get."""
    arrived: float
    """time.monotonic() at which the request came."""
    priority: int
    """The priority in the engine; lower runs first."""
    salt: bytes
    """What prefixes are kept under (`cache_salt`)."""


def origin_of(request: Request, endpoint: str, *, priority: int | None, salt: str | None) -> Origin:
    """The origin of what a request asks for, by the priority and the salt that it gives itself."""
    arrived: float = request.scope["lowkey.arrived"]
    return Origin(endpoint, arrived, capped_priority(request, priority or 0), cache_salt(request, salt))


def sticky_identity(request: Request, user: str | None) -> str | None:
    """What keeps this client on one variant of an alias: the first thing of `sticky.by` that the request has."""
    sticky = service_of(request).routing.sticky
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


def cache_salt(request: Request, given: str | None) -> bytes:
    """What the engine keeps this request's prefixes under: those of one key are no other's, unless
    `shared_prefix_cache` is set. A salt that the request names itself comes on top of the key's name, so that nobody
    can choose another key's."""
    shared = given is None and service_of(request).settings.shared_prefix_cache
    owner = "" if shared else owner_of(request)
    if not owner and given is None:
        return b""
    # A key's name holds no NUL.
    return hashlib.blake2b(f"{owner}\0{given or ''}".encode(), digest_size=16).digest()
