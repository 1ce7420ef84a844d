"""Who sends requests: API keys, what each may do, and how much of it.

Keys are kept and compared as SHA-256 hashes, in constant time over all of them.
"""

import hashlib
import hmac
import time

from fastapi import Request

from server.api.http.errors import APIError
from server.settings import ApiKey, Settings


class Bucket:
    """Allows `per_minute` units a minute, as many at once after a minute's rest. May go below zero: what a request
    costs is known only once it has run, and is then paid off by waiting."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._updated = time.monotonic()

    def wait_s(self) -> float:
        """Seconds to wait until the bucket has a unit; 0 if it has one now."""
        now = time.monotonic()
        self._level = min(self._per_minute, self._level + (now - self._updated) * self._per_minute / 60)
        self._updated = now
        return max(0.0, (1 - self._level) * 60 / self._per_minute)

    def take(self, units: int) -> None:
        self._level -= units


class Client:
    """The holder of one key, or, where no keys are set, everyone."""

    def __init__(self, name: str, settings: Settings, key: ApiKey | None = None) -> None:
        self.name = name
        self.sha256 = "" if key is None else key.sha256
        self.max_priority = 0 if key is None else key.max_priority
        requests, tokens = settings.requests_per_minute, settings.tokens_per_minute
        if key is not None:
            requests, tokens = key.requests_per_minute or requests, key.tokens_per_minute or tokens
        self._requests = None if requests is None else Bucket(requests)
        self._tokens = None if tokens is None else Bucket(tokens)

    def take_request(self) -> float:
        """Count a request against the limits. Returns 0, or the seconds to wait if it is one too many and not
        counted."""
        wait = max((bucket.wait_s() for bucket in (self._requests, self._tokens) if bucket), default=0.0)
        if wait == 0 and self._requests is not None:
            self._requests.take(1)
        return wait

    def take_tokens(self, tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(tokens)


class Clients:
    """All clients that may send requests."""

    def __init__(self, settings: Settings) -> None:
        self._clients = [Client(name, settings, key) for name, key in settings.api_keys.items()]
        self.anyone = Client("", settings)

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
            if hmac.compare_digest(client.sha256, given):
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
