"""Which variant answers: aliases split over variants by weight, and which requests are repeated as shadow traffic."""

import hashlib
import logging
import random
from itertools import accumulate

from server.settings import Settings, ShadowRule, Sticky, check_routing

logger = logging.getLogger("lowkey.routing")


def unit_interval(*parts: str) -> float:
    """A number in [0, 1) that depends on nothing but `parts`: the first 53 bits of their SHA-256."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


class Routing:
    """The part of the configuration that may change while the server runs.

    An alias divides [0, 1) among its variants in the order of the configuration, each as much as its weight. A client's
    place in it depends on the seed, the alias and the client alone, so that a new weight moves only the clients between
    the old and the new boundary.
    """

    def __init__(self, settings: Settings) -> None:
        self._variants = set(settings.variants)
        self._take(settings)

    def _take(self, settings: Settings) -> None:
        self.aliases: dict[str, dict[str, float]] = settings.aliases
        self.sticky: Sticky = settings.sticky
        self.shadow: list[ShadowRule] = settings.shadow

    def replace(self, settings: Settings) -> None:
        """Take over new aliases, stickiness and shadow rules. ValueError, and nothing changed, if they name a variant
        that is not running."""
        check_routing(settings, self._variants)
        self._take(settings)

    def choose(self, alias: str, identity: str | None) -> str:
        """The variant for a client of that identity; for None one that is drawn."""
        weights = self.aliases[alias]
        if identity is None:
            u = random.random()
        else:
            u = unit_interval(str(self.sticky.seed), alias, identity)
        edges = list(accumulate(weights.values()))
        for name, edge in zip(weights, edges, strict=True):
            if u * edges[-1] < edge:
                return name
        return next(reversed([name for name, weight in weights.items() if weight > 0]))  # u * sum rounded up

    def shares(self, alias: str) -> dict[str, float]:
        """What part of an alias each variant has; they add up to 1."""
        weights = self.aliases[alias]
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def shadows(self, variant: str) -> list[str]:
        """The variants on which a request that `variant` has answered is to be repeated: drawn anew each time."""
        return [
            rule.target for rule in self.shadow if rule.source == variant and random.random() < rule.fraction
        ]
