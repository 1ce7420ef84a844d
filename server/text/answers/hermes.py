"""Calls as Hermes, Qwen2.5 and Qwen3 write them: JSON between tags.

    <tool_call>
    {"name": "NAME", "arguments": {"ARGUMENT": value}}
    </tool_call>

Where the name comes first, which is how models write it, the arguments are told as they come: they are the model's own
text, and it may be no JSON.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from server.text.answers.cursor import Cursor, IncompleteError, MismatchError
from server.text.answers.lark import Quote, any_of, json_rule, several
from server.text.answers.literals import load, quoted
from server.text.answers.parts import Block, Calls, NoCallError, Tools

CLOSING = "</tool_call>"
LF = "\n"
ARGUMENTS = ("arguments", "parameters")
"""Names that models give to the arguments."""

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
_STRUCTURE = re.compile(r'["{}\[\]]|[^\s\w,:.+-]')
"""The next bracket or quotation mark outside of strings, or what JSON has not there."""
_IN_STRING = re.compile(r'["\\]')


class Hermes:
    """The format of Hermes, Qwen2.5 and Qwen3."""

    opening = "<tool_call>"
    tags: tuple[str, ...] = (opening, CLOSING)

    def block(self, tools: Tools, calls: Calls) -> Block:
        return _Block(tools, calls)

    def rules(self, tools: Tools, quote: Quote, *, parallel: bool) -> Iterator[str]:
        names = any_of(f"call_{number}" for number in range(len(tools)))
        yield f"calls: {several('call', quote(LF), parallel=parallel)}"
        yield f"call: {quote(self.opening + LF)} {names} {quote(LF + CLOSING)}"
        for number, (name, schema) in enumerate(tools.items()):
            if schema.get("properties"):  # arguments that the schema does not name are not offered
                schema = {"additionalProperties": False, **schema}
            begin = '{"name": ' + quoted(name) + ', "arguments": '
            yield f"call_{number}: {quote(begin)} {json_rule(schema, schema)} {quote('}')}"


class _Block:
    """Reads one `<tool_call>`: follows strings and brackets to the end of the object."""

    def __init__(self, tools: Tools, calls: Calls) -> None:
        self.unread = ""
        self._tools = tools
        self._calls = calls
        self._step: Callable[[], str | None] = self._opening
        self._at = 0
        """How far strings and brackets have been followed."""
        self._depth = 0
        self._in_string = False
        self._begun = False

    def add(self, text: str) -> str | None:
        self.unread += text
        try:
            while (rest := self._step()) is None:
                pass
        except IncompleteError:
            return None
        return rest

    def end(self) -> None:
        if not self._begun:
            raise NoCallError
        if self._step == self._arguments:
            self._tell(len(self.unread))
        elif CLOSING.startswith(self.unread.strip().removeprefix("}").strip()):
            self.unread = ""

    def _follow(self) -> str:
        """Go past the next bracket, or what JSON has not outside of strings; returns it."""
        while True:
            match = (_IN_STRING if self._in_string else _STRUCTURE).search(self.unread, self._at)
            if match is None:
                self._at = len(self.unread)
                raise IncompleteError
            found = match[0]
            if found == "\\" and self._in_string:
                if match.end() == len(self.unread):
                    self._at = match.start()
                    raise IncompleteError
                self._at = match.end() + 1
                continue
            self._at = match.end()
            if found == '"':
                self._in_string = not self._in_string
                continue
            self._depth += (found in "{[") - (found in "}]")
            return found

    def _opening(self) -> str | None:
        cursor = Cursor(self.unread)
        try:
            cursor.space()
            cursor.one_of("{")
        except MismatchError:
            raise NoCallError from None
        self._at, self._depth, self._step = cursor.at, 1, self._object
        return None

    def _object(self) -> str | None:
        """Read up to the arguments, or to the end of the object if what is before them is not as usual."""
        found = self._follow()
        if found not in "{}[]":
            raise NoCallError
        if found == "{" and self._depth == 2 and (head := _HEAD.fullmatch(self.unread[: self._at - 1])):
            if head[1] not in self._tools:
                raise NoCallError
            self._begin(head[1])
            self.unread, self._at = self.unread[self._at - 1 :], 1
            self._step = self._arguments
        elif self._depth <= 0:
            name, arguments = self._call(self.unread[: self._at])
            self._begin(name)
            self._calls.arguments(arguments)
            self._calls.complete()
            self.unread = self.unread[self._at :]
            self._step = self._closing
        return None

    def _begin(self, name: str) -> None:
        self._begun = True
        self._calls.begin(name)

    def _call(self, text: str) -> tuple[str, str]:
        """A whole object's name and arguments."""
        try:
            call: Any = load(text)
        except ValueError:
            raise NoCallError from None
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._tools:
            raise NoCallError
        others = [key for key in call if key != "name"]
        if others and others not in ([key] for key in ARGUMENTS):
            raise NoCallError
        given: Any = call[others[0]] if others else {}
        try:
            arguments = load(given) if isinstance(given, str) else given
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise NoCallError
        return name, json.dumps(arguments)

    def _arguments(self) -> str | None:
        """Tell the arguments as they come."""
        try:
            self._follow()
        except IncompleteError:
            self._tell(self._at)
            raise
        if self._depth == 1:
            self._tell(self._at)
            self._calls.complete()
            self._step = self._end_of_object
        return None

    def _tell(self, count: int) -> None:
        self._calls.arguments(self.unread[:count])
        self.unread, self._at = self.unread[count:], 0

    def _end_of_object(self) -> str | None:
        return self._past("}", self._closing)

    def _closing(self) -> str | None:
        return self._past(CLOSING, None)

    def _past(self, expected: str, then: Callable[[], str | None] | None) -> str | None:
        cursor = Cursor(self.unread)
        try:
            cursor.space()
            cursor.one_of(expected)
        except MismatchError:
            return self.unread
        if then is None:
            return cursor.rest
        self.unread, self._step = cursor.rest, then
        return None
