"""Calls as Qwen3-Coder and Qwen3.5 write them: XML with each argument as plain text.

    <tool_call>
    <function=NAME>
    <parameter=ARGUMENT>
    value
    </parameter>
    </function>
    </tool_call>

An argument is a text unless the tool's schema says otherwise. Those that can be nothing else are told as they come.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from server.text.answers.cursor import Cursor, IncompleteError, MismatchError, is_name, overlap
from server.text.answers.lark import Quote, any_of, arguments_of, json_rule, several
from server.text.answers.literals import quoted
from server.text.answers.parts import Block, Calls, Tools
from server.text.answers.schemas import as_json, literal, properties_of, types_of, values_of
from server.text.answers.steps import Steps
from server.text.grammar import GrammarError

CLOSING = "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
LF = "\n"


class Qwen3Coder:
    """The format of Qwen3-Coder and Qwen3.5."""

    opening = "<tool_call>"
    tags: tuple[str, ...] = (opening, CLOSING)

    def block(self, tools: Tools, calls: Calls) -> Block:
        return _Block(tools, calls)

    def rules(self, tools: Tools, quote: Quote, *, parallel: bool) -> Iterator[str]:
        yield f"calls: {several('call', quote(LF), parallel=parallel)}"
        yield f"call: {any_of(f'call_{number}' for number in range(len(tools)))}"
        # The first closing tag ends a text: to the reader one within would, if what follows looks like the call's end.
        yield f"text[suffix={quoted(END_PARAMETER)}]: /(?s:.*)/"
        for number, (name, schema) in enumerate(tools.items()):
            yield from _call_rules(f"call_{number}", name, schema, quote)


def _call_rules(rule: str, tool: str, schema: Mapping[str, Any], quote: Quote) -> Iterator[str]:
    """The Lark rules of a call, with the arguments in the order of the schema."""
    parts = [quote(f"<tool_call>{LF}{FUNCTION}{tool}>{LF}")]
    for number, (name, (own, required)) in enumerate(arguments_of(tool, schema).items()):
        if not is_name(name):
            raise GrammarError(
                f"{tool}: an argument can't be called {quoted(name[:50])} in this model's calls"
            )
        parts.append(f"{rule}_{number}" + ("" if required else "?"))
        yield f"{rule}_{number}: {quote(f'{PARAMETER}{name}>{LF}')} {_value(own, schema, quote)} {quote(LF)}"
    yield f"{rule}: {' '.join(parts)} {quote(END_FUNCTION + LF + CLOSING)}"


def _value(own: Any, schema: Mapping[str, Any], quote: Quote) -> str:
    """What follows an argument's opening tag, its closing tag included."""
    close = quote(LF + END_PARAMETER)
    if values := values_of(own, schema):
        return f"{any_of(quote(literal(value)) for value in values)} {close}"
    types = types_of(own, schema)
    return "text" if not types or "string" in types else f"{json_rule(own, schema)} {close}"


class _Block(Steps):
    """Reads one `<tool_call>`. What follows a closing tag tells whether it ends a value: one may have the tag in it."""

    def __init__(self, tools: Tools, calls: Calls) -> None:
        super().__init__(tools, calls, self._header)
        self._schema: Mapping[str, Any] = {}
        self._names: set[str] = set()
        """Names of the call's arguments so far."""
        self._types: frozenset[str] = frozenset()
        """What the argument may be that is being read."""
        self._at_start = False
        """Whether nothing of the argument's value has been read."""
        self._value: list[str] = []
        """What has been read of it, if it is told at its end."""

    def end(self) -> None:
        super().end()
        if self._step == self._argument:
            self._tell(len(self.unread))
            self._calls.arguments("".join(self._value))
        elif self._step == self._footer and CLOSING.startswith(self.unread.strip()):
            self.unread = ""

    def _header(self) -> str | None:
        cursor = Cursor(self.unread)
        cursor.space()
        cursor.one_of(FUNCTION)
        name = cursor.name()
        if name not in self._tools:
            raise MismatchError
        self._names = set()
        argument = self._following(cursor)
        self._begun = True
        self._schema = self._tools[name]
        self._calls.begin(name)
        self._go_on(cursor, argument)
        return None

    def _following(self, cursor: Cursor) -> str | None:
        """What comes next in a call: the name of an argument that it does not have yet, or None for its end."""
        cursor.space()
        if cursor.one_of(PARAMETER, END_FUNCTION) == END_FUNCTION:
            return None
        name = cursor.name()
        if name in self._names:
            raise MismatchError
        return name

    def _go_on(self, cursor: Cursor, argument: str | None) -> None:
        """Go on behind what `_following` has found."""
        self.unread = cursor.rest
        if argument is None:
            self._calls.arguments("}" if self._names else "{}")
            self._calls.complete()
            self._step = self._footer
            return
        self._types = types_of(properties_of(self._schema).get(argument), self._schema)
        before, after = (", " if self._names else "{"), ('"' if self._as_it_comes else "")
        self._calls.arguments(f"{before}{quoted(argument)}: {after}")
        self._names.add(argument)
        self._value, self._at_start, self._step = [], True, self._argument

    @property
    def _as_it_comes(self) -> bool:
        return self._types == {"string"}

    def _argument(self) -> str | None:
        if self._at_start:
            if not self.unread:
                raise IncompleteError
            self.unread = self.unread.removeprefix("\n")
            self._at_start = False
        at = self.unread.find(END_PARAMETER)
        if at < 0:
            self._tell(len(self.unread) - overlap(self.unread, END_PARAMETER, f"\n{END_PARAMETER}"))
            raise IncompleteError
        cursor = Cursor(self.unread, at + len(END_PARAMETER))
        try:
            argument = self._following(cursor)
        except MismatchError:  # the tag is a part of the value
            self._tell(at + len(END_PARAMETER))
            return None
        self._tell(at - self.unread.startswith("\n", max(at - 1, 0), at))
        self._calls.arguments('"' if self._as_it_comes else as_json("".join(self._value), self._types))
        self._go_on(cursor, argument)
        return None

    def _tell(self, count: int) -> None:
        """The value goes on by the first so many characters that are unread."""
        text, self.unread = self.unread[:count], self.unread[count:]
        if not self._as_it_comes:
            self._value.append(text)
        elif text:
            self._calls.arguments(quoted(text)[1:-1])

    def _footer(self) -> str | None:
        cursor = Cursor(self.unread)
        cursor.space()
        if cursor.one_of(CLOSING, FUNCTION) == FUNCTION:
            self._step = self._header
            return None
        return cursor.rest
