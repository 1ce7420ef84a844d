"""Pieces of the grammars of calls, in Lark as llguidance reads it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from server.text.answers.schemas import MAX_DEPTH, flaw_of, resolved
from server.text.grammar import MAX_LENGTH, GrammarError, json_value

Quote = Callable[[str], str]
"""Makes a text that isn't empty into an expression that stands for just this text (`grammar.quoter`)."""


def bounded(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a grammar, as long as they are no more than a grammar may have: each argument of a tool repeats the
    schema's definitions. Raises GrammarError."""
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_LENGTH:
            raise GrammarError(f"more than {MAX_LENGTH} characters as a grammar, which are the most")
        yield piece


def any_of(rules: Iterable[str]) -> str:
    """One of these. Raises GrammarError for too many."""
    return f"({' | '.join(bounded(rules))})"


def several(rule: str, between: str, *, parallel: bool) -> str:
    """One of it, or more."""
    return f"{rule} ({between} {rule})*" if parallel else rule


def arguments_of(tool: str, schema: Mapping[str, Any]) -> dict[str, tuple[Any, bool]]:
    """The arguments of a tool, for formats that write each of them by itself: by name, the schema of each and whether a
    call must have it.

    Raises:
        GrammarError: the schema says more than what each argument is, or is none.
    """
    own: Any = resolved(schema, schema)
    if not isinstance(own, Mapping) or "$ref" in own:
        raise GrammarError(f"{tool}: $ref: does not lead to the schema of an object within {MAX_DEPTH} steps")
    if (flaw := flaw_of(own)) is not None:
        raise GrammarError(f"{tool}: {flaw}")
    for keyword in ("allOf", "anyOf", "oneOf", "not", "if"):
        if keyword in own:
            raise GrammarError(
                f"{tool}: {keyword}: this model's calls can be held to it within properties only"
            )
    required = own.get("required") or []
    properties = own.get("properties") or {}
    unnamed: dict[str, Any] = {name: {} for name in required if name not in properties}
    return {name: (schema, name in required) for name, schema in {**properties, **unnamed}.items()}


def json_rule(schema: Any, root: Mapping[str, Any]) -> str:
    """JSON of a schema that is a part of another one, whose definitions it may refer to."""
    if isinstance(schema, Mapping):
        schema = {**{name: root[name] for name in ("$defs", "definitions") if name in root}, **schema}
    return json_value(schema)
