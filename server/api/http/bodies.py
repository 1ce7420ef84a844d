"""The bodies of requests: up to megabytes of JSON of any shape, read without holding up others.

What no field asks for is skipped and never becomes an object. What a field asks for is taken apart in small pieces, and
a body that goes on for too long is refused before it has become many objects. Pydantic then looks at what is left.
"""

import itertools
import re
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Annotated, Any, TypeVar, get_args

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from msgspec import UNSET, Raw, UnsetType
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from server.api.http.aside import aside
from server.api.http.errors import APIError, from_validation
from server.api.http.fields import MAX_TOKEN_ID, CheckedFields, CheckedIds

M = TypeVar("M", bound=BaseModel)
Path = tuple[str | int, ...]
"""Where a value is in a body: names of fields and indices of lists, from the outermost inwards."""

MAX_VALUES = 50_000
"""Most entries of lists and objects in one body. Those of lists of token ids, and fields that nothing asks for, are not
counted; in parts of a body that have no form of their own (tools, what templates are given) commas in texts are."""
MAX_ITEMS = 4096
"""Most entries of one list, unless it is one of token ids."""

LONG_BYTES = 2**16
"""Bodies that are longer are read beside the event loop."""
_PIECE_BYTES = 2**16
"""How much of a list of token ids is decoded at once."""
_FEW = 1000
"""How many values are decoded at once."""
_SHORT_BYTES = 1024
"""Lists of numbers that are no longer are left to pydantic, which says best what is wrong with one."""

_Begin = msgspec.defstruct(
    "_Begin", [(f"item_{i}", Raw | UnsetType, UNSET) for i in range(MAX_ITEMS + 1)], array_like=True
)
"""The first entries of a list; the decoder skips the others, however many they are."""

_id_decoder = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKEN_ID)]])

_NOT_A_NUMBER = re.compile(rb"-?(NaN|Infinity)")
_KEY = re.compile(rb'"(\w{1,64})"\s*:')


class JSONRoute(APIRoute):
    """A route whose body is read here instead of by FastAPI, which would parse all of it at once in the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler
        model: type[BaseModel] = self.body_field.field_info.annotation  # type: ignore[assignment]

        async def handle(request: Request) -> Response:
            value = await _read(request, model)
            return await handler(_ReadRequest(request.scope, request.receive, value))

        return handle


class _ReadRequest(Request):
    """A request whose body has been read; FastAPI takes a model's instance as it is."""

    def __init__(self, scope: Scope, receive: Receive, value: BaseModel) -> None:
        super().__init__(scope, receive)
        self._value = value

    async def body(self) -> bytes:
        return b"{}"

    async def json(self) -> Any:
        return self._value


async def _read(request: Request, model: type[M]) -> M:
    """The body as an instance of the model. Raises APIError 400 for one that is something else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(.+\+)?json", kind):
        raise APIError(400, "the body must be JSON, sent with content-type: application/json")
    try:
        body = await request.body()
    except ClientDisconnect:
        raise APIError(499, "the client closed the connection") from None  # which nobody reads
    if len(body) > LONG_BYTES:
        return await aside(parse, body, model)
    return parse(body, model)


def parse(body: bytes, model: type[M]) -> M:
    """A body's text as an instance of the model. Raises APIError 400, which names the field at fault."""
    try:
        values = _Values().of_model(body, model, ())
    except msgspec.ValidationError as e:
        raise APIError(400, f"the body must be a JSON object: {e}") from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise _no_json(body, str(e), model) from e
    except RecursionError:
        raise APIError(400, "the body is nested too deeply") from None
    try:
        return model.model_validate(values)
    except ValidationError as e:
        errors: list[Any] = e.errors(include_url=False)
        raise from_validation(errors) from e


def _no_json(body: bytes, reason: str, model: type[BaseModel]) -> APIError:
    """The error for a body that can't be decoded. It names the field that has NaN or half a surrogate pair: other
    parsers accept both."""
    place = re.search(r"\(byte (\d+)\)", reason)
    at = int(place[1]) if place else len(body)
    if found := _NOT_A_NUMBER.match(body, max(at - 1, 0)) or _NOT_A_NUMBER.match(body, at):
        what = f"JSON has no number {found[0].decode()}"
    elif "utf-16" in reason or "escape" in reason or (place is None and b"\\ud" in body[-16:].lower()):
        what = "is no text: half a surrogate pair, or an escape that is none"
    else:
        return APIError(400, f"the body is no JSON: {reason}")
    keys = [key.decode() for key in _KEY.findall(body, max(at - LONG_BYTES, 0), at)]
    field = next((key for key in reversed(keys) if key in model.model_fields), None)
    return APIError(400, f"{field or 'the body'}: {what}", param=field)


@cache
def _form_of(model: type[BaseModel]) -> tuple[Any, dict[str, type[BaseModel] | None]]:
    """Two things about a model: a struct of the fields that it has or refuses, which leaves them undecoded; and by the
    field's name in JSON the model that the type of each field contains, None if there is none."""

    def model_in(kind: Any) -> type[BaseModel] | None:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        return next(filter(None, map(model_in, get_args(kind))), None)

    inner = {field.alias or name: model_in(field.annotation) for name, field in model.model_fields.items()}
    if issubclass(model, CheckedFields):
        inner = dict.fromkeys(model.no_ops) | inner
    return msgspec.defstruct(model.__name__, [(name, Raw | UnsetType, UNSET) for name in inner]), inner


class _Values:
    """Makes one body's values, of which it may have `MAX_VALUES`."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def of_model(self, text: bytes, model: type[BaseModel], path: Path) -> dict[str, Any]:
        """The fields that the model has, and the others too if it allows them."""
        form, inner = _form_of(model)
        known = msgspec.json.decode(text, type=form)
        fields = {name: bytes(raw) for name in inner if (raw := getattr(known, name)) is not UNSET}
        values = {name: self._value(raw, inner[name], (*path, name)) for name, raw in fields.items()}
        if model.model_config.get("extra") == "allow":
            self._take(_weight(text) - sum(map(_weight, fields.values())), path)
            others = msgspec.json.decode(text, type=dict[str, Raw])
            values |= {
                name: _decoded(bytes(raw), (*path, name))
                for name, raw in others.items()
                if name not in values
            }
        return values

    def _value(self, text: bytes, model: type[BaseModel] | None, path: Path) -> Any:
        """One value, which is an object of `model` or a list of them if its field has such a type."""
        kind = text[:1]
        if kind == b"{" and model is not None:
            return self.of_model(text, model, path)
        if kind == b"[":
            if len(text) > _SHORT_BYTES and text.translate(None, b"0123456789, \t\r\n") == b"[]":
                return _ids(text, path)
            if model is not None or _weight(text) > _FEW:
                return [
                    self._value(item, model, (*path, i)) for i, item in enumerate(self._items(text, path))
                ]
        if kind in (b"[", b"{"):
            self._take(_weight(text), path)
        return _decoded(text, path)

    def _items(self, text: bytes, path: Path) -> list[bytes]:
        """The entries of a list, each still as JSON text."""
        begin = msgspec.structs.astuple(msgspec.json.decode(text, type=_Begin))
        items = [bytes(item) for item in itertools.takewhile(lambda item: item is not UNSET, begin)]
        if len(items) > MAX_ITEMS:
            raise _refused(path, f"a list may have {MAX_ITEMS} entries, unless all are token ids")
        self._take(len(items), path)
        return items

    def _take(self, values: int, path: Path) -> None:
        """Count values that are about to be decoded. Raises APIError if the body has too many."""
        self._left -= values
        if self._left < 0:
            raise _refused(
                path, f"here the body comes to more than {MAX_VALUES} entries of lists and objects"
            )


def _weight(text: bytes) -> int:
    """An upper bound of how many values the text has: commas in strings are counted too."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _ids(text: bytes, path: Path) -> CheckedIds:
    """A list of token ids, decoded in pieces."""
    ids, at, end = CheckedIds(), text.index(b"[") + 1, text.rindex(b"]")
    while at < end:
        cut = text.find(b",", at + _PIECE_BYTES, end)
        cut = end if cut < 0 else cut
        try:
            ids += _id_decoder.decode(b"[" + text[at:cut] + b"]")
        except msgspec.DecodeError as e:
            raise _refused(path, f"a token id is at least 0 and below {MAX_TOKEN_ID + 1}") from e
        at = cut + 1
    return ids


def _decoded(text: bytes, path: Path) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise _refused(path, str(e)) from e


def _refused(path: Path, why: str) -> APIError:
    where = ".".join(map(str, path))
    return APIError(400, f"{where}: {why}", param=str(path[0]))
