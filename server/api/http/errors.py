"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, code = HTTP status."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from server.wire.exchange import EngineError, EngineUnavailableError, StateError, UnkeptGrammarError

MAX_LISTED = 10
"""How many of a request's validation errors an answer lists."""
MAX_ECHO = 200
"""How many characters of a bad value an error shows."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "service_unavailable",
    504: "timeout_error",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: int = Field(description="The HTTP status.")


class Error(BaseModel):
    error: ErrorDetail


_ERROR: dict[str, Any] = {"model": Error, "description": "An error; `param` names the field at fault."}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": _ERROR, "5XX": _ERROR}
"""How the OpenAPI document describes errors."""


class APIError(Exception):
    """An error that becomes the HTTP answer. `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def from_engine(error: EngineError) -> APIError:
    """The HTTP answer to an engine's error: 503 where another try may help, 409 for a saved state that is no good (any
    more), 400 for a grammar that can't be kept to, else 500."""
    if isinstance(error, EngineUnavailableError):
        return unavailable(str(error))
    if isinstance(error, StateError):
        return APIError(409, f"state_id: {error}", param="state_id")
    if isinstance(error, UnkeptGrammarError):
        return APIError(400, f"the answer can't be held to the grammar that was asked for: {error}")
    return APIError(500, str(error))


def unavailable(message: str) -> APIError:
    """The answer 503, which says to try again in a second."""
    return APIError(503, message, retry_after_s=1)


def _location(error: dict[str, Any]) -> tuple[str | int, ...]:
    """The path of the field at fault, without the place that FastAPI found it in."""
    location: tuple[str | int, ...] = error["loc"]
    return location[1:] if location[:1] in (("query",), ("path",)) else location


def _one(error: dict[str, Any]) -> str:
    where = ".".join(map(str, _location(error))) or "body"
    message = error["msg"]
    if error["type"] == "refused":
        return str(message)
    if error["type"] in ("missing", "too_long"):
        return f"{where}: {message}"
    return f"{where}: {message}, got {echo(error.get('input'))}"


def echo(value: Any) -> str:
    """The beginning of the value's `repr`, without making all of it."""
    text = ""
    for piece in _pieces_of(value):
        text += piece
        if len(text) > MAX_ECHO:
            return text[:MAX_ECHO] + "..."
    return text


def _pieces_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield repr(value[: MAX_ECHO + 1])
    elif isinstance(value, list | dict):
        yield "[" if isinstance(value, list) else "{"
        for number, key in enumerate(value):
            yield ", " if number else ""
            if isinstance(value, dict):
                yield from _pieces_of(key)
                yield ": "
                key = value[key]
            yield from _pieces_of(key)
        yield "]" if isinstance(value, list) else "}"
    else:
        yield repr(value)


def from_validation(errors: list[dict[str, Any]]) -> APIError:
    """The first ten of pydantic's errors as one 400. There is at least one."""
    listed = [_one(error) for error in errors[:MAX_LISTED]]
    if len(errors) > MAX_LISTED:
        listed.append(f"and {len(errors) - MAX_LISTED} more")
    location = _location(errors[0])
    first = location[0] if location else errors[0].get("ctx", {}).get("field")
    param = first if isinstance(first, str) else None
    return APIError(400, "; ".join(listed), param=param)


def install(app: FastAPI) -> None:
    """Give every error that leaves the app OpenAI's shape."""

    @app.exception_handler(APIError)
    async def _api_error(_: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(list(error.errors())).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        # Not request.url: it is made with the client's Host header, whatever that is.
        detail = f"{request.method} {request.scope['path'][:MAX_ECHO]}: {error.detail}"
        return APIError(error.status_code, detail, headers=error.headers).response()
