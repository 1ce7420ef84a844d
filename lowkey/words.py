"""Figures and other people's texts, put so that they can be shown."""

import re
from dataclasses import dataclass
from typing import Literal

Mark = Literal["", "better", "worse"]
MARKS = "▲ better, ▼ worse than the first; a difference within the error that is known of it has no mark."
"""What the marks of a table's cells mean, for its caption."""

_UNWRITABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def counted(count: int, noun: str) -> str:
    """`1 checkpoint`, `2,000 checkpoints`; for nouns whose plural ends in s, or in es after h or s."""
    plural = "" if count == 1 else "es" if noun.endswith(("h", "s")) else "s"
    return f"{count:,} {noun}{plural}"


def in_units(size: float) -> str:
    """A number of bytes for people: `26.3 MB`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return counted(round(size), "byte")


def duration(seconds: float) -> str:
    """Seconds for people: `12 s`, `3 min` or `2.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Judged:
    """A cell of a table, and whether what it says is better or worse than what it is compared with."""

    text: str
    mark: Mark = ""


def judged(text: str, gain: float, error: float = 0.0) -> Judged:
    """A cell with the mark of a difference.

    Args:
        gain: By how much it is better; negative where it is worse.
        error: Half the width of the difference's 95 % interval. A gain within it has no mark.
    """
    return Judged(text, "better" if gain > error else "worse" if gain < -error else "")


def writable(text: object) -> str:
    """What is found in other people's files, as text that can be written and shown: half a surrogate pair, which has no
    UTF-8, and control characters, which would steer a terminal, become their escapes. Tabs and line ends stay."""
    return _UNWRITABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))
