"""How much each client may ask for, counted in one place whatever the number of front ends."""

import time

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


class ClientLimits:
    """The requests and tokens that one client may still have."""

    def __init__(self, settings: Settings, key: ApiKey | None = None) -> None:
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
        """Count tokens that were run for the client."""
        if self._tokens is not None:
            self._tokens.take(tokens)


def limits_of(settings: Settings) -> dict[str, ClientLimits]:
    """The limits of each key by its name; "" is everybody together, where no key is asked for."""
    return {
        "": ClientLimits(settings),
        **{name: ClientLimits(settings, key) for name, key in settings.api_keys.items()},
    }
