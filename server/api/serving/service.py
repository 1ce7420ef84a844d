"""The service behind the routes: its variants, which one a request means, and whether that one has room."""

import contextlib
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from fastapi import Request

from server.api.http.auth import Clients, capped_priority, client_of, owner_of
from server.api.http.errors import APIError, unavailable
from server.api.serving.metrics import Metrics
from server.api.serving.routing import Routing
from server.api.serving.variants import Variant, Variants
from server.handover import from_json
from server.settings import Settings
from server.wire.hub import (
    Admit,
    AskTotals,
    EndAnswer,
    EngineDown,
    EngineUp,
    HubSilentError,
    LeavePlace,
    Leaving,
    Link,
    Refusal,
    Reload,
    Stop,
    Totals,
    Update,
)


class Places:
    """Places in a variant's queue, for the requests to its engine that one answer takes. A context manager: at its end
    the answer has ended."""

    def __init__(self, variant: Variant, link: Link) -> None:
        self.variant = variant
        self.number = next(_numbers)
        self._link = link

    def leave(self) -> None:
        """The engine is done with one of the requests. Its tokens may still be on their way to the client."""
        self._link.tell(LeavePlace(place=self.number))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.tell(EndAnswer(place=self.number))


_numbers = itertools.count(1)


@dataclass
class Service:
    """What every route works with; lives in `app.state.service`."""

    settings: Settings
    variants: Variants
    metrics: Metrics
    routing: Routing
    link: Link
    leaving: bool = False
    """Whether the server has been asked to stop: it is not ready any more, whether or not it still takes requests."""
    on_stop: Callable[[], None] = lambda: None
    """Called when nothing more is to be answered."""
    clients: Clients = field(init=False)

    def __post_init__(self) -> None:
        self.clients = Clients(self.settings, self.link)

    def receive(self, update: Update) -> None:
        """Take in what the hub tells."""
        match update:
            case EngineUp():
                self.variants[update.variant].engine_up(update.ready, update.address)
            case EngineDown():
                self.variants[update.variant].client.engine_down()
            case Reload():
                self.settings = from_json(update.settings)
                self.routing.replace(self.settings)
                self.clients.replace(self.settings)
            case Leaving():
                self.leaving = True
            case Stop():
                self.on_stop()
            case AskTotals():
                self.link.tell(self.totals(update.number))

    def totals(self, answers: int = 0) -> Totals:
        """All that this front end has counted. `answers` is the `AskTotals` that asks for it; 0 for none."""
        steps = {variant.name: variant.client.last_step for variant in self.variants}
        return Totals(families=self.metrics.families(), steps=steps, answers=answers)

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

    async def admit(self, variant: Variant, count: int = 1) -> Places:
        """Places in the variant's queue, which last until the block of them ends. 503 if there are none now."""
        places = Places(variant, self.link)
        with contextlib.ExitStack() as stack:
            stack.enter_context(places)  # the hub may have given them although nobody waits any more
            question = Admit(place=places.number, variant=variant.name, count=count)
            try:
                refusal: Refusal | None = await self.link.ask(question)
            except HubSilentError as e:
                raise unavailable(str(e)) from e
            if refusal is None:
                stack.pop_all()
                return places
        if refusal.reason == "too_many":
            raise APIError(400, refusal.message, param="n")
        variant.metrics.on_rejected(refusal.reason)
        raise unavailable(refusal.message)


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
