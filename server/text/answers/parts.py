"""The parts of an answer, and what a format of tool calls has to offer."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's arguments, by the tool's name."""


class Content(NamedTuple):
    """Text for the reader."""

    text: str


class Reasoning(NamedTuple):
    """Text that the model thought before its answer."""

    text: str


class Call(NamedTuple):
    """A call of a tool begins."""

    number: int
    """How many calls the answer has before it."""
    name: str


class Arguments(NamedTuple):
    """The arguments of a call go on by this piece of JSON."""

    number: int
    text: str


Part = Content | Reasoning | Call | Arguments


class Calls(Protocol):
    """What is told of the calls in a block of them."""

    def begin(self, name: str) -> None:
        """A call begins."""

    def arguments(self, text: str) -> None:
        """Its arguments go on by this piece of JSON."""

    def complete(self) -> None:
        """All of its arguments have been told."""


class NoCallError(Exception):
    """What stands behind a block's opening tag is no call: it is text, and nothing has been told of it."""


class Block(Protocol):
    """Reads one block of calls from behind its opening tag, as the text comes."""

    def add(self, text: str) -> str | None:
        """Read on: None while the block goes on, else the text behind it.

        Raises:
            NoCallError: it is no block of calls; `unread` has its text.
        """

    def end(self) -> None:
        """No more text comes. What is left in `unread` after that is no part of a call. Raises as `add` does."""

    @property
    def unread(self) -> str:
        """The text that was added and has not become a part of a call."""


class CallFormat(Protocol):
    """How models of one kind write calls."""

    opening: str
    """The tag that a block of calls begins with."""
    tags: tuple[str, ...]
    """All tags that may be tokens of their own."""

    def block(self, tools: Tools, calls: Calls) -> Block:
        """A reader of one block, which calls none but these tools."""

    def rules(self, tools: Tools, quote: Callable[[str], str], *, parallel: bool) -> Iterator[str]:
        """Rules in Lark, as llguidance reads it, one of which, `calls`, is of calls of the tools.

        Args:
            quote: makes a text that isn't empty into an expression that stands for just this text.
            parallel: whether it is of more than one call.

        Raises:
            GrammarError: calls can't be held to what a tool's schema says.
        """
