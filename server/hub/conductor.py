"""The life of a server, from its first engine to its last answer: what signals do, and when it is over."""

import logging
import time
from collections.abc import Callable

from server.hub.hub import Hub
from server.keys import ApiKey
from server.service_manager import notify
from server.settings import ConfigurationError, Settings, check_routing

logger = logging.getLogger("lowkey.server")

TICK_S = 0.1
"""Seconds between two looks at how things are."""
ALIVE_S = 1.0
"""Seconds between two signs of life for the service manager."""

ROUTING = {"aliases": "[aliases]", "sticky": "[sticky]", "shadow": "shadow = []"}
"""Settings of routing, which SIGHUP reads again, and how a file says that there are none."""
RELOADED = (*ROUTING, "api_keys", "api_keys_file")
"""All settings that SIGHUP reads again."""


def _differences(old: dict[str, ApiKey], new: dict[str, ApiKey]) -> str:
    """Whose keys or limits are new, changed or gone, by name; empty if nothing is."""
    changed = {name for name in old.keys() & new.keys() if old[name] != new[name]}
    parts = {"new": new.keys() - old.keys(), "changed": changed, "gone": old.keys() - new.keys()}
    return "".join(f"; {what}: {', '.join(sorted(names))}" for what, names in parts.items() if names)


class Conductor:
    """On SIGTERM or SIGINT refuses new work and lets the running requests end; while it does, the server still listens,
    so that /ready and new requests get their 503.

    Args:
        reload: reads the settings again, at SIGHUP.
        url: what to open in a browser.
        complete: whether all front ends that there should be have come.
    """

    def __init__(
        self,
        hub: Hub,
        reload: Callable[[], Settings],
        url: str,
        complete: Callable[[], bool] = lambda: True,
    ) -> None:
        self._hub = hub
        self._reload = reload
        self._url = url
        self._complete = complete
        self._drain_at = self._drain_until = self._told_at = 0.0
        self._announced = self._drain_announced = False
        self.over = False
        """Whether nothing more is to be answered."""
        self.signals = 0
        """How many times the server has been asked to stop."""

    def listening(self) -> None:
        """Requests are taken from now on."""
        logger.info("running on %s (Ctrl-C to quit)", self._url)

    def hang_up(self) -> None:
        """SIGHUP: take over what may change while the server runs, and say what may not. Requests don't notice.

        What was set and is not any more keeps the old: a file that somebody is just writing looks like that.
        """
        old = self._hub.settings
        try:
            new = self._reload()
            missing = [name for name in ROUTING if name in old.model_fields_set - new.model_fields_set]
            if missing:
                empty = ", ".join(ROUTING[name] for name in missing)
                raise ConfigurationError(
                    f"no more {', '.join(missing)} there; to do without, say so: {empty}"
                )
            if old.api_keys and not new.api_keys:
                raise ConfigurationError(
                    "no API key is left there; a server that asks for keys is opened to everybody by a restart only"
                )
            check_routing(new, set(old.variants))
        except (ConfigurationError, ValueError) as e:
            logger.error("SIGHUP: the old configuration stays: %s", e)
            self._hub.metrics.on_reload_failed()
            return
        others = sorted(
            name
            for name in Settings.model_fields
            if name not in RELOADED and getattr(old, name) != getattr(new, name)
        )
        taken = {name: getattr(new, name) for name in RELOADED if name in new.model_fields_set}
        self._hub.reload(old.model_copy(update=taken))
        logger.info(
            "SIGHUP: read aliases %s, sticky and %d shadow rules, API keys of %d clients%s",
            sorted(new.aliases),
            len(new.shadow),
            len(new.api_keys),
            _differences(old.api_keys, new.api_keys),
        )
        dropped = sorted(old.aliases.keys() - new.aliases.keys())
        if dropped:
            logger.warning("SIGHUP: aliases that are gone, and answered with 404: %s", ", ".join(dropped))
        if others:
            logger.warning("SIGHUP: changed too, but read at the start only: %s", ", ".join(others))

    def exit(self) -> None:
        """SIGTERM or SIGINT: let what runs end. Once more: at once."""
        self.signals += 1
        notify("STOPPING=1\nSTATUS=Letting the requests that run end")
        settings, now, again = self._hub.settings, time.monotonic(), self._hub.leaving
        self._hub.leave()
        self._drain_at = now if again else now + settings.drain_delay_s
        self._drain_until = now if again else self._drain_at + settings.drain_s
        self._hub.draining = self._drain_at <= now

    async def tick(self) -> None:
        """To be called each `TICK_S`: say when all models are up, and once a drain is over, say so. Requests that
        outlast it get their error event first."""
        hub = self._hub
        self._tell_that_it_lives()
        if not self._announced and self._complete() and all(engine.up for engine in hub.engines.values()):
            self._announced = True
            logger.info("ready: %s; open %s", ", ".join(hub.engines), self._url)
            notify(f"READY=1\nSTATUS=Serving {', '.join(hub.engines)} on {self._url}")
        if hub.leaving and time.monotonic() >= self._drain_at:
            hub.draining = True
        if not hub.draining or self.over:
            return
        running, left = hub.answers, self._drain_until - time.monotonic()
        if running and left > 0:
            if not self._drain_announced:
                self._drain_announced = True
                logger.info("draining: %d requests run, up to %.0f s; once more to stop now", running, left)
            return
        if running:
            await hub.close_engines()
        self.over = True

    def _tell_that_it_lives(self) -> None:
        """Once a second: the service manager may end a process that says nothing for long (`WatchdogSec`)."""
        now = time.monotonic()
        if now - self._told_at >= ALIVE_S:
            self._told_at = now
            notify("WATCHDOG=1")
