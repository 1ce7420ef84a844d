"""Who sends requests: API keys, and what each may do.

Keys are kept and compared as SHA-256 hashes, in constant time over all of them.
"""

import hashlib
import hmac

from fastapi import Request

from server.api.http.errors import APIError, unavailable
from server.keys import ApiKey
from server.settings import Settings
from server.wire.hub import Charge, HubSilentError, Link, TakeRequest


class Client:
    """The holder of one key, or, where no keys are set, everyone. What it may have is counted by the hub."""

    def __init__(self, name: str, settings: Settings, link: Link, key: ApiKey | None = None) -> None:
        self.name = name
        self.sha256 = () if key is None else key.sha256
        self.max_priority = 0 if key is None else key.max_priority
        limits = [settings.requests_per_minute, settings.tokens_per_minute]
        if key is not None:
            limits += [key.requests_per_minute, key.tokens_per_minute]
        self._is_limited = any(limits)
        self._link = link

    async def take_request(self) -> float:
        """Count a request against the limits. Returns 0, or the seconds to wait if it is one too many and not
        counted. 503 if the hub does not answer."""
        if not self._is_limited:
            return 0.0
        try:
            wait_s: float = await self._link.ask(TakeRequest(client=self.name))
        except HubSilentError as e:
            raise unavailable(str(e)) from e
        return wait_s

    def take_tokens(self, tokens: int) -> None:
        """Count tokens that were run for the client."""
        if self._is_limited:
            self._link.tell(Charge(client=self.name, tokens=tokens))


class Clients:
    """All clients that may send requests."""

    def __init__(self, settings: Settings, link: Link) -> None:
        self._link = link
        self.replace(settings)

    def replace(self, settings: Settings) -> None:
        """Take over new keys and limits. Requests that have been let in already run to their end."""
        self._clients = [Client(name, settings, self._link, key) for name, key in settings.api_keys.items()]
        self.anyone = Client("", settings, self._link)

    def identify(self, authorization: str) -> Client:
        """The client behind an Authorization header; without keys it is not looked at. 401 if there is none."""
        if not self._clients:
            return self.anyone
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorised("this server needs an API key: Authorization: Bearer KEY")
        given = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()
        found = None
        for client in self._clients:  # all of them: the time must not tell which one came close
            for known in client.sha256:
                if hmac.compare_digest(known, given):
                    found = client
        if found is None:
            raise _unauthorised("the API key is not known here")
        return found


def _unauthorised(message: str) -> APIError:
    return APIError(401, message, headers={"www-authenticate": "Bearer"})


def client_of(request: Request) -> Client:
    """The client that sent the request."""
    client: Client = request.scope["lowkey.client"]
    return client


def owner_of(request: Request) -> str:
    """The name of the request's API key; empty where no keys are set. What is kept for one owner is no other's."""
    return client_of(request).name


def capped_priority(request: Request, priority: int) -> int:
    """`priority` (lower runs first), but none more urgent than the key may have."""
    return max(priority, client_of(request).max_priority)
