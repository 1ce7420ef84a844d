"""Answers as JSON. What may be long is encoded in pieces: one call of the encoder keeps the event loop waiting, also if
another thread makes it (`aside`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi.responses import Response

T = TypeVar("T")

encoder = msgspec.json.Encoder()

_PIECE_ITEMS = 500
_PIECE_CHARACTERS = 2**18


def json_list(items: Sequence[T], shape: Callable[[T], Any]) -> msgspec.Raw | list[Any]:
    """The list of what `shape` makes of each item, or JSON of it if it is long."""
    if len(items) <= _PIECE_ITEMS:
        return [shape(item) for item in items]
    pieces = [
        encoder.encode([shape(item) for item in items[at : at + _PIECE_ITEMS]])[1:-1]
        for at in range(0, len(items), _PIECE_ITEMS)
    ]
    return msgspec.Raw(b"[" + b",".join(pieces) + b"]")


def json_text(text: str) -> msgspec.Raw:
    """JSON of a text."""
    pieces = [
        encoder.encode(text[at : at + _PIECE_CHARACTERS])[1:-1]
        for at in range(0, len(text), _PIECE_CHARACTERS)
    ]
    return msgspec.Raw(b'"' + b"".join(pieces) + b'"')


def json_response(body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """An HTTP answer of JSON. Values of the body may be what `json_list` and `json_text` made."""
    return Response(encoder.encode(body), media_type="application/json", headers=dict(headers or {}))
