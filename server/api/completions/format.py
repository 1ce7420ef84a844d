"""How an endpoint writes its answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.api.completions.generation import Chunk

Shape = Callable[[int, Chunk, str | None], dict[str, Any]]
"""Makes the entry of `choices` from a choice's index, its chunk, and its finish reason."""


@dataclass(frozen=True)
class Format:
    """How an endpoint writes its answers."""

    head: dict[str, Any]
    """Fields of the answer, and of each event of a stream, before `choices`."""
    whole: Shape
    """How it writes a choice in a whole answer."""
    part: Shape
    """How it writes what is new of a choice in an event."""
    first: list[dict[str, Any]] = field(default_factory=list)
    """Entries of `choices` to send in events of their own before any text."""
