"""How much each client may ask for, counted in one place whatever the number of front ends."""

import time

from server.keys import ApiKey
from server.settings import Settings


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

    def resize(self, per_minute: int) -> None:
        """Allow another number of units a minute from now on. What is owed stays owed."""
        self.wait_s()  # what has come in until now came at the old rate
        self._per_minute = per_minute
        self._level = min(self._level, float(per_minute))


def _resized(bucket: Bucket | None, per_minute: int | None) -> Bucket | None:
    """The bucket with another limit; a full one where there was no limit, and None where there is none any more."""
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute)
    bucket.resize(per_minute)
    return bucket


class ClientLimits:
    """The requests and tokens that one client may still have."""

    def __init__(self, settings: Settings, key: ApiKey | None = None) -> None:
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.replace(settings, key)

    def replace(self, settings: Settings, key: ApiKey | None = None) -> None:
        """Take over new limits. What the client has used up stays used up."""
        requests, tokens = settings.requests_per_minute, settings.tokens_per_minute
        if key is not None:
            requests, tokens = key.requests_per_minute or requests, key.tokens_per_minute or tokens
        self._requests, self._tokens = _resized(self._requests, requests), _resized(self._tokens, tokens)

    def take_request(self) -> float:
        """Count a request against the limits. Returns 0, or the seconds to wait if it is one too many and not
        counted."""
        wait = max((bucket.wait_s() for bucket in (self._requests, self._tokens) if bucket), default=0.0)
        if wait == 0 and self._requests is not None:
            self._requests.take(1)
        return wait

    def take_tokens(self, tokens: int) -> None:
        """Count tokens that were run for the client."""
        if self._tokens is not None:
            self._tokens.take(tokens)


class AllLimits:
    """The limits of each key by its name; "" is everybody together, where no key is asked for."""

    def __init__(self, settings: Settings) -> None:
        self._by_name: dict[str, ClientLimits] = {}
        self.replace(settings)

    def replace(self, settings: Settings) -> None:
        """Take over new keys and limits. A key that keeps its name keeps what it has used up."""
        for name, key in {"": None, **settings.api_keys}.items():
            if name in self._by_name:
                self._by_name[name].replace(settings, key)
            else:
                self._by_name[name] = ClientLimits(settings, key)
        for name in self._by_name.keys() - settings.api_keys.keys() - {""}:
            del self._by_name[name]

    def take_request(self, name: str) -> float:
        """`ClientLimits.take_request` of that key. 0 for one that is gone: its request was let in before that."""
        limits = self._by_name.get(name)
        return 0.0 if limits is None else limits.take_request()

    def take_tokens(self, name: str, tokens: int) -> None:
        """Count tokens that were run for the holder of that key, if there still is one."""
        limits = self._by_name.get(name)
        if limits is not None:
            limits.take_tokens(tokens)
