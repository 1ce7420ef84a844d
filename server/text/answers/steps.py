"""What readers of blocks of calls have in common, whatever the format."""

import re
from collections.abc import Callable, Mapping

from server.text.answers.cursor import IncompleteError, MismatchError
from server.text.answers.parts import Calls, NoCallError, Tools


class Steps:
    """Reads a block step by step. A step takes what it has read out of `unread`, and says by `_step` which one is next.
    It returns None, or the text behind the block if that has ended."""

    def __init__(self, tools: Tools, calls: Calls, first: Callable[[], str | None]) -> None:
        self.unread = ""
        self._tools = tools
        self._calls = calls
        self._step = first
        self._begun = False
        """Whether a call has been told."""

    def add(self, text: str) -> str | None:
        """Read on (`Block.add`). What mismatches ends the block if a call has been told, else it is no call."""
        self.unread += text
        try:
            while (rest := self._step()) is None:
                pass
        except IncompleteError:
            return None
        except MismatchError:
            if self._begun:
                return self.unread
            raise NoCallError from None
        return rest

    def end(self) -> None:
        """No more text comes (`Block.end`)."""
        if not self._begun:
            raise NoCallError


class NestedSteps(Steps):
    """Steps that follow strings and brackets."""

    brackets: tuple[str, str]
    """Those that open and those that close."""
    structure: re.Pattern[str]
    """The next bracket or quotation mark outside of strings, or what no call has there."""
    in_string: Mapping[str, re.Pattern[str]]
    """The next end of a string, or escape in it, by its quotation mark."""

    _at = 0
    """How far strings and brackets have been followed."""
    _depth = 0
    _quote = ""
    """What ends the string that is being followed; empty outside of strings."""

    def _follow(self) -> str:
        """Go past the next bracket, or what no call has outside of strings; returns it. Raises IncompleteError."""
        while True:
            pattern = self.in_string[self._quote] if self._quote else self.structure
            match = pattern.search(self.unread, self._at)
            if match is None:
                self._at = len(self.unread)
                raise IncompleteError
            found = match[0]
            if found == "\\" and self._quote:
                if match.end() == len(self.unread):
                    self._at = match.start()
                    raise IncompleteError
                self._at = match.end() + 1
                continue
            self._at = match.end()
            if found in self.in_string:
                self._quote = "" if self._quote else found
                continue
            opening, closing = self.brackets
            self._depth += (found in opening) - (found in closing)
            return found
