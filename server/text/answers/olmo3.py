"""Calls as Olmo 3 writes them: in the manner of Python, one on each line, with values in JSON.

    <function_calls>NAME(ARGUMENT=value, ARGUMENT=value)
    NAME()</function_calls>

A call is told at its end.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from server.text.answers.cursor import MAX_NAME, Cursor, IncompleteError, MismatchError
from server.text.answers.lark import Quote, any_of, arguments_of, json_rule, several
from server.text.answers.literals import is_keyword, keywords_as_json, quoted
from server.text.answers.parts import Block, Calls, Tools
from server.text.answers.steps import NestedSteps
from server.text.grammar import GrammarError

CLOSING = "</function_calls>"
LF = "\n"

_NAME = re.compile(r"[^\s(){}<>=,\"'\[\]]+")


class Olmo3:
    """The format of Olmo 3."""

    opening = "<function_calls>"
    tags: tuple[str, ...] = (opening, CLOSING)

    def block(self, tools: Tools, calls: Calls) -> Block:
        return _Block(tools, calls)

    def rules(self, tools: Tools, quote: Quote, *, parallel: bool) -> Iterator[str]:
        inside = several("call", quote(LF), parallel=parallel)
        yield f"calls: {quote(self.opening)} {inside} {quote(CLOSING)}"
        yield f"call: {any_of(f'call_{number}' for number in range(len(tools)))}"
        for number, (name, schema) in enumerate(tools.items()):
            yield from _call_rules(f"call_{number}", name, schema, quote)


def _call_rules(rule: str, tool: str, schema: Mapping[str, Any], quote: Quote) -> Iterator[str]:
    """The Lark rules of a call, with the arguments in the order of the schema: `_first_N` is what may come from
    argument N on where none stands before it, `_more_N` where one does."""
    arguments = arguments_of(tool, schema)
    yield f"{rule}: {quote(f'{tool}(')} {rule}_first_0 {quote(')')}"
    for number, (name, (own, required)) in enumerate(arguments.items()):
        if not is_keyword(name):
            raise GrammarError(
                f"{tool}: an argument can't be called {quoted(name[:50])} in this model's calls"
            )
        yield f"{rule}_{number}: {quote(f'{name}=')} {json_rule(own, schema)}"
        first = f"{rule}_{number} {rule}_more_{number + 1}"
        more = f"{quote(', ')} {first}"
        if not required:
            first, more = f"{first} | {rule}_first_{number + 1}", f"{more} | {rule}_more_{number + 1}"
        yield f"{rule}_first_{number}: {first}"
        yield f"{rule}_more_{number}: {more}"
    for kind in ("first", "more"):
        yield f'{rule}_{kind}_{len(arguments)}: ""'


class _Block(NestedSteps):
    """Reads one `<function_calls>`."""

    brackets = "([{", ")]}"
    structure = re.compile(r"[\"'()\[\]{}]|[^\s\w,:.+=-]")
    in_string: Mapping[str, re.Pattern[str]] = {'"': re.compile(r'["\\]'), "'": re.compile(r"['\\]")}

    def __init__(self, tools: Tools, calls: Calls) -> None:
        super().__init__(tools, calls, self._name)
        self._called = ""
        """The name of the call whose arguments are being read."""
        self._start = 0
        """Where they begin."""

    def end(self) -> None:
        super().end()
        if self._step == self._name and CLOSING.startswith(self.unread.strip()):
            self.unread = ""

    def _name(self) -> str | None:
        cursor = Cursor(self.unread)
        cursor.space()
        if self._begun and cursor.rest.startswith("<"):
            cursor.one_of(CLOSING)
            return cursor.rest
        match = _NAME.match(self.unread, cursor.at)
        end = cursor.at if match is None else match.end()
        if end == len(self.unread) and end - cursor.at <= MAX_NAME:
            raise IncompleteError
        if match is None or match[0] not in self._tools or not self.unread.startswith("(", end):
            raise MismatchError
        self._called, self._start, self._at, self._depth, self._quote = match[0], end + 1, end + 1, 1, ""
        self._step = self._arguments
        return None

    def _arguments(self) -> str | None:
        while self._depth:
            if self._follow() not in "([{)]}":
                raise MismatchError
        try:
            arguments = keywords_as_json(self.unread[self._start : self._at - 1])
        except ValueError:
            raise MismatchError from None
        self._begun = True
        self._calls.begin(self._called)
        self._calls.arguments(arguments)
        self._calls.complete()
        self.unread = self.unread[self._at :]
        self._step = self._name
        return None
