"""What a tool's JSON schema says of its arguments, for formats that write each of them by itself."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from server.text.answers.cursor import SPACE
from server.text.answers.literals import literal_as_json, load, quoted

MAX_DEPTH = 16
"""How deep references and alternatives are followed."""
MAX_SCHEMAS = 1000
"""How many schemas are looked at for one argument. Alternatives that refer to alternatives multiply."""

_ANY: frozenset[str] = frozenset()
_INTEGER = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_NAMES: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}


def flaw_of(schema: Mapping[str, Any]) -> str | None:
    """What is wrong with the form of an object's schema; None if nothing is. What is null counts as left out."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, Mapping | None):
        return f"properties must be an object, got {_shown(properties)}"
    for name, own in (properties or {}).items():
        if not isinstance(own, Mapping | bool):
            return f"properties.{name[:50]} must be a schema, an object or a boolean, got {_shown(own)}"
    if required is not None and not (
        isinstance(required, list) and all(isinstance(r, str) for r in required)
    ):
        return f"required must be a list of names, got {_shown(required)}"
    return None


def _shown(value: Any) -> str:
    return json.dumps(value)[:50]


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """The schema that a reference leads to; any other schema as it is."""
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            break
        schema = _referred(schema["$ref"], root)
    return schema


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schemas of a tool's arguments, by name."""
    found = resolved(schema, schema)
    properties = found.get("properties") if isinstance(found, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def types_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that a schema allows; empty where it leaves that open.

    Args:
        root: the schema that references are looked up in.
    """
    return _types(schema, root, iter(range(MAX_SCHEMAS)), 0)


def _types(schema: Any, root: Mapping[str, Any], left: Iterator[int], depth: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH or next(left, None) is None:
        return _ANY
    if "type" in schema:
        named = schema["type"]
        names = named if isinstance(named, list) else [named]
        return frozenset(name for name in names if isinstance(name, str)) & {*_NAMES.values()}
    if isinstance(values := schema.get("enum"), list):
        return frozenset(_NAMES[type(value)] for value in values)
    if "const" in schema:
        return frozenset({_NAMES[type(schema["const"])]})
    if isinstance(schema.get("$ref"), str):
        return _types(_referred(schema["$ref"], root), root, left, depth + 1)
    for name in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(name), list):
            kinds: frozenset[str] = frozenset()
            for option in options:
                if not (kind := _types(option, root, left, depth + 1)):
                    return _ANY
                kinds |= kind
            return kinds
    if isinstance(parts := schema.get("allOf"), list):
        found = (_types(part, root, left, depth + 1) for part in parts)
        return next(filter(None, found), _ANY)
    return _ANY


def values_of(schema: Any, root: Mapping[str, Any]) -> list[Any] | None:
    """The values that a schema allows, where it lists them; else None. Arguments are those of `types_of`."""
    return _values(schema, root, iter(range(MAX_SCHEMAS)), 0)


def _values(schema: Any, root: Mapping[str, Any], left: Iterator[int], depth: int) -> list[Any] | None:
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH or next(left, None) is None:
        return None
    if isinstance(values := schema.get("enum"), list):
        return values
    if "const" in schema:
        return [schema["const"]]
    if isinstance(schema.get("$ref"), str):
        return _values(_referred(schema["$ref"], root), root, left, depth + 1)
    for name in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(name), list):
            listed: list[Any] = []
            for option in options:
                if (some := _values(option, root, left, depth + 1)) is None:
                    return None
                listed += some
            return listed
    if isinstance(parts := schema.get("allOf"), list):
        found = (_values(part, root, left, depth + 1) for part in parts)
        return next((one for one in found if one is not None), None)
    return [None] if schema.get("type") == "null" else None


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    if not reference.startswith("#"):
        return None
    found: Any = root
    for step in reference.removeprefix("#").split("/")[1:]:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def as_json(text: str, types: frozenset[str]) -> str:
    """JSON of an argument that is written as text: of the first of these types that it is a value of: null, boolean,
    integer, number, object or array; else it is a text. Where the types are open, only objects and arrays are no text.
    """
    value = text.strip(SPACE)
    if "null" in types and value in ("null", "None"):
        return "null"
    if "boolean" in types and value.lower() in ("true", "false"):
        return value.lower()
    if "integer" in types and (match := _INTEGER.fullmatch(value)):
        return match[1]
    if "number" in types and _NUMBER.fullmatch(value):
        return value
    if value[:1] in ("{", "[") and (not types or ("object" if value[0] == "{" else "array") in types):
        for translate in (_as_it_is, literal_as_json):
            try:
                return translate(value)
            except ValueError:
                pass
    return quoted(text)


def _as_it_is(text: str) -> str:
    load(text)
    return text


def literal(value: Any) -> str:
    """How a value of an `enum` is written where arguments are plain text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
