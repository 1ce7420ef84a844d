"""Calls as Hermes, Qwen2.5 and Qwen3 write them: JSON between tags.

    <tool_call>
    {"name": "NAME", "arguments": {"ARGUMENT": value}}
    </tool_call>

Where the name comes first, which is how models write it, the arguments are told as they come: they are the model's own
text, and it may be no JSON.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from server.text.answers.cursor import Cursor, IncompleteError
from server.text.answers.lark import Quote, any_of, json_rule, several
from server.text.answers.literals import load, quoted
from server.text.answers.parts import Block, Calls, NoCallError, Tools
from server.text.answers.steps import NestedSteps

CLOSING = "</tool_call>"
LF = "\n"
ARGUMENTS = ("arguments", "parameters")
"""Names that models give to the arguments."""

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')


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


class _Block(NestedSteps):
    """Reads one `<tool_call>`: follows strings and brackets to the end of the object."""

    brackets = "{[", "}]"
    structure = re.compile(r'["{}\[\]]|[^\s\w,:.+-]')
    in_string: Mapping[str, re.Pattern[str]] = {'"': re.compile(r'["\\]')}

    def __init__(self, tools: Tools, calls: Calls) -> None:
        super().__init__(tools, calls, self._opening)

    def end(self) -> None:
        super().end()
        if self._step == self._arguments:
            self._tell(len(self.unread))
        elif CLOSING.startswith(self.unread.strip().removeprefix("}").strip()):
            self.unread = ""

    def _opening(self) -> str | None:
        cursor = Cursor(self.unread)
        cursor.space()
        cursor.one_of("{")
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
        cursor.space()
        cursor.one_of(expected)
        if then is None:
            return cursor.rest
        self.unread, self._step = cursor.rest, then
        return None
