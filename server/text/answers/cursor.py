"""Reading text that may not have come to its end yet."""

import re

SPACE = " \t\r\n"
"""The white space of JSON and of the formats of calls."""
MAX_SPACE = 32
"""Most white space between two tags."""
MAX_NAME = 256
"""Most characters of a name in a tag."""

_NAME = re.compile(r"([^<>\r\n]+)>")


def is_name(text: str) -> bool:
    """Whether a tag can have this name (`Cursor.name`)."""
    return len(text) <= MAX_NAME and _NAME.fullmatch(f"{text}>") is not None


class IncompleteError(Exception):
    """The text ends before it is clear what it says."""


class MismatchError(Exception):
    """The text says something else than what is looked for."""


class Cursor:
    """A place in a text, which moves over what is found there. Each method raises IncompleteError or MismatchError."""

    def __init__(self, text: str, at: int = 0) -> None:
        self.text = text
        self.at = at

    @property
    def rest(self) -> str:
        """The text from here on."""
        return self.text[self.at :]

    def space(self) -> None:
        """Go past white space."""
        ahead = self.text[self.at : self.at + MAX_SPACE + 1]
        count = len(ahead) - len(ahead.lstrip(SPACE))
        if count > MAX_SPACE:
            raise MismatchError
        self.at += count

    def one_of(self, *expected: str) -> str:
        """Go past one of these texts, none of which begins another one; returns which."""
        for text in expected:
            if self.text.startswith(text, self.at):
                self.at += len(text)
                return text
        ahead = self.text[self.at : self.at + max(map(len, expected))]
        if any(text.startswith(ahead) for text in expected):
            raise IncompleteError
        raise MismatchError

    def name(self) -> str:
        """Go past a name and the > that closes its tag; returns the name."""
        ahead = self.text[self.at : self.at + MAX_NAME + 1]
        if match := _NAME.match(ahead):
            self.at += match.end()
            return match[1]
        if len(ahead) <= MAX_NAME and not re.search(r"[<>\r\n]", ahead):
            raise IncompleteError
        raise MismatchError


def overlap(text: str, *tags: str) -> int:
    """Length of the longest end of the text that begins one of the tags but is not all of it."""
    longest = max(map(len, tags))
    return next(
        (
            length
            for length in range(min(longest - 1, len(text)), 0, -1)
            if any(tag.startswith(text[-length:]) and tag != text[-length:] for tag in tags)
        ),
        0,
    )
