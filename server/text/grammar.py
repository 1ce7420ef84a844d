"""Grammars that an answer is held to, as Lark text with a rule `start`, in the dialect that llguidance reads.

JSON schemas stand in that text as they are (`%json`), so one kind of text says everything that an answer can be held
to, and everything can be put together. An engine compiles it (`server.engine.grammars`).
"""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, regex_to_lark
from tokenizers import Tokenizer

MAX_LENGTH = 2**17
"""Most characters of a grammar."""

STACK_BYTES = 2**29
"""Stack of the thread that compiles grammars. The compiler calls itself for each rule that another one refers to: up to
some hundred bytes of stack for each character of a grammar. A stack that is too small would end the process. Only what
is used of it takes memory."""

LIMITS = LLParserLimits(verbose_errors=False)
"""What a grammar may cost to compile and to follow: the library's own limits."""

WHITESPACE = r"\n[ \t]{0,32}|[ \t]{1,2}"
"""The whitespace that JSON may have between its tokens: a break and the next line's indentation, or a few blanks. Free
to write any, a small model may go on with it for ever."""


MAX_REASON = 400
"""Most characters of the reason why a grammar can't be kept, which may quote the grammar."""

_EXCERPT = re.compile(r"\s*(\d+ \||\^+\s*$|<non-verbose/>$)")
"""A line of the grammar, with its number, the mark below one, or a sign that the library's state is not shown."""
_PLACE = re.compile(r"^(?:at )?(\d+)\(\d+\): ")


class GrammarError(Exception):
    """A grammar that can't be kept. The text says why."""


def json_value(schema: Any, *, compact: bool = False) -> str:
    """A JSON value of the schema, as an expression for the right-hand side of a rule.

    Args:
        schema: a JSON schema as Python has it.
        compact: without any whitespace between JSON's tokens.
    """
    if isinstance(schema, dict):
        how = {"whitespace_flexible": False} if compact else {"whitespace_pattern": WHITESPACE}
        schema = {**schema, "x-guidance": how}
    return f"%json {json.dumps(schema)}"


def json_schema(schema: Any, *, compact: bool = False) -> str:
    """The grammar of a JSON value of the schema, for whose arguments see `json_value`."""
    return f"start: {json_value(schema, compact=compact)}"


def json_object(*, compact: bool = False) -> str:
    """The grammar of any JSON object."""
    return json_schema({"type": "object"}, compact=compact)


def regex(pattern: str) -> str:
    """The grammar of texts that match the pattern as a whole."""
    return f"start: /{regex_to_lark(pattern)}/"


def choice(texts: Sequence[str]) -> str:
    """The grammar of exactly these texts. There is at least one."""
    return "start: " + " | ".join(map(json.dumps, texts))


def quoter(tokenizer: Tokenizer) -> Callable[[str], str]:
    """A function that makes a text which isn't empty into an expression for the right-hand side of a rule.

    Where the text has one of the tokenizer's added tokens (`<tool_call>`, `</think>`), that token is what the grammar
    allows, not the letters of its name: a model was trained to write the one and never the others.
    """
    added = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}

    def quote(text: str) -> str:
        parts: list[str] = []
        rest = text
        while rest:
            starts = [(rest.find(name), -len(name), name) for name in added if name and name in rest]
            if not starts:
                parts.append(json.dumps(rest))
                break
            at, _, name = min(starts)
            if at:
                parts.append(json.dumps(rest[:at]))
            parts.append(f"<[{added[name]}]>")
            rest = rest[at + len(name) :]
        return " ".join(parts)

    return quote


def literal(text: str, tokenizer: Tokenizer) -> str:
    """One text as such an expression (`quoter`)."""
    return quoter(tokenizer)(text)


def after(end: str, grammar: str, tokenizer: Tokenizer) -> str:
    """The grammar of any text up to `end`, `end`, up to two blanks or line breaks, and then what `grammar` says."""
    rest = f"/[ \\n]{{0,2}}/ %lark {{\n{grammar}\n}}"
    if tokenizer.token_to_id(end) is not None:
        return f"start: /(.|\\n)*/ {literal(end, tokenizer)} {rest}"
    return f"start: before {rest}\nbefore[lazy]: /(.|\\n)*/ {json.dumps(end)}"


@cache
def compiler() -> ThreadPoolExecutor:
    """The thread of this process that compiles grammars, one after the other."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="lowkey-grammars")
    before = threading.stack_size(STACK_BYTES)
    try:
        executor.submit(int).result()  # starts the thread
    finally:
        threading.stack_size(before)
    return executor


async def check(grammar: str) -> None:
    """Raise GrammarError, with the reason, unless the library can compile the grammar. Whether the model's tokens can
    spell it is for its engine to find."""
    if len(grammar) > MAX_LENGTH:
        raise GrammarError(f"{len(grammar)} characters as a grammar, and {MAX_LENGTH} are the most")
    await asyncio.get_running_loop().run_in_executor(compiler(), _check, grammar)


def _check(grammar: str) -> None:
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    if failed:
        raise GrammarError(reason(messages[0], grammar))


def reason(message: str, grammar: str) -> str:
    """The library's reason in one line of bounded length, without the piece of the grammar that it shows below. It says
    in which line of the grammar it is, where there are several."""
    shown = [line.strip() for line in message.splitlines() if not _EXCERPT.match(line)]
    text = _PLACE.sub(r"line \1: " if "\n" in grammar.strip() else "", " ".join(shown).strip(), count=1)
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
