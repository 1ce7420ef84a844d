"""/v1/states: run a prompt once, go on from its state many times."""

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import IO, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect

from server.api.http.auth import owner_of
from server.api.http.bodies import JSONRoute
from server.api.http.context import current
from server.api.http.errors import APIError, from_engine, unavailable
from server.api.http.tasks import unless_disconnected
from server.api.serving.prompts import encode_prompt
from server.api.serving.service import Service, cache_salt, service_of
from server.api.serving.sizes import saved_bytes
from server.api.serving.variants import Variant
from server.api.states.saved import SavedStates, saved_states, unknown
from server.api.states.schemas import DeletedState, State, StateList, StateRequest
from server.api.states.store import (
    Header,
    OtherModelError,
    StateFileError,
    StateStore,
    check_opens,
    header_length,
    parse_header,
)
from server.wire.exchange import EngineError

router = APIRouter(prefix="/v1/states", route_class=JSONRoute)

PIECE_BYTES = 2**20
IMPORT_ROOM = 2**20
"""How many bytes a body may have over the budget, so that the answer can say which limit it breaks."""


def _check_budget(store: StateStore, size: int) -> None:
    if size > store.budget_bytes:
        raise APIError(
            413, f"a state of {size} bytes is over the server's budget for saved states, {store.budget_bytes}"
        )


@router.post("", response_model=State)
async def create_state(body: StateRequest, request: Request) -> dict[str, Any]:
    """Run a prompt and keep the state after its last token."""
    service, states = service_of(request), saved_states(request)
    store = states.store
    variant = service.find(body.model, "model")
    with await service.admit(variant):
        # One token must have room after it.
        ids = await encode_prompt(variant, body.prompt, 1)
        _check_budget(store, saved_bytes(variant.info, len(ids)))
        salt = cache_salt(request, body.cache_salt)
        path = store.new_file()
        try:
            await unless_disconnected(request, states.save(variant, ids, path, salt))
            context = current.get()
            if context is not None:
                context.charge(len(ids))
            saved = await asyncio.to_thread(store.keep, path, owner_of(request))
        except EngineError as e:
            raise from_engine(e) from e
        finally:
            path.unlink(missing_ok=True)
    return saved.describe()


@router.get("", response_model=StateList)
async def list_states(request: Request) -> dict[str, Any]:
    """The caller's states, the newest first."""
    found = await asyncio.to_thread(saved_states(request).store.list, owner_of(request))
    return {"object": "list", "data": [saved.describe() for saved in found]}


@router.get("/{state_id}", response_model=State)
async def get_state(state_id: str, request: Request) -> dict[str, Any]:
    """What a state is, and until when it is kept if nobody uses it."""
    return (await saved_states(request).find(state_id, owner_of(request))).describe()


@router.delete("/{state_id}", response_model=DeletedState)
async def delete_state(state_id: str, request: Request) -> dict[str, Any]:
    """Forget a state."""
    store = saved_states(request).store
    if not await asyncio.to_thread(store.delete, state_id, owner_of(request)):
        raise unknown(state_id)
    return {"id": state_id, "object": "state", "deleted": True}


@router.get(
    "/{state_id}/content",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "A safetensors file."}},
)
async def get_content(state_id: str, request: Request) -> Response:
    """The state as a safetensors file, its fingerprint in the metadata."""
    found = await saved_states(request).find(state_id, owner_of(request))
    try:
        file = await asyncio.to_thread(found.path.open, "rb")
    except FileNotFoundError:
        raise unknown(state_id) from None
    headers = {
        "content-length": str(os.fstat(file.fileno()).st_size),
        "content-disposition": f'attachment; filename="{found.id}.safetensors"',
    }
    return StreamingResponse(_pieces(file), media_type="application/octet-stream", headers=headers)


async def _pieces(file: IO[bytes]) -> AsyncGenerator[bytes]:
    with file:
        while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
            yield piece


@router.post(
    "/import",
    response_model=State,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def import_state(request: Request, model: str | None = None) -> dict[str, Any]:
    """Take in a state that a server has given out as a file; for `model`, or whichever variant it fits."""
    service, states = service_of(request), saved_states(request)
    store = states.store
    variants = list(service.variants) if model is None else [service.find(model, "model")]
    path = store.new_file()
    body = _Body(request)
    try:
        start = await body.take(8)
        text = await body.take(header_length(start))
        header = parse_header(text)
        _check_budget(store, header.size)
        await _check_fits_one(service, states, variants, header)
        with await asyncio.to_thread(path.open, "xb") as f:
            await asyncio.to_thread(f.write, start + text)
            await body.copy(f, header.data_bytes)
        await asyncio.to_thread(check_opens, path)
        saved = await asyncio.to_thread(store.keep, path, owner_of(request))
    except StateFileError as e:
        raise APIError(400, f"the body {e}") from e
    except ClientDisconnect:
        raise APIError(499, "the client closed the connection") from None
    except OSError as e:
        raise unavailable(f"the state can't be written: {e.strerror}") from e
    finally:
        path.unlink(missing_ok=True)
    return saved.describe()


async def _check_fits_one(
    service: Service, states: SavedStates, variants: list[Variant], header: Header
) -> None:
    """Raise an APIError unless a variant can go on from this state: 503 if one that is not up might, 400 if it is of a
    variant's model but has other tensors, else 409 with the first variant's reason."""
    refusals: list[Exception] = []
    for variant in variants:
        try:
            with await service.admit(variant):
                await states.check(variant, header)
                if header.tokens >= variant.info.context_length:
                    raise StateFileError(f"stands for {header.tokens} tokens, which fill the context")
                return
        except (APIError, StateFileError, OtherModelError) as e:
            refusals.append(e)
    for kind in (APIError, StateFileError):
        for refusal in refusals:
            if isinstance(refusal, kind):
                raise refusal
    raise APIError(409, str(refusals[0]))


class _Body:
    """A request's body, read a piece at a time."""

    def __init__(self, request: Request) -> None:
        self._stream = request.stream()
        self._rest = b""

    async def take(self, count: int) -> bytes:
        """The next `count` bytes, or fewer at the end of the body."""
        while len(self._rest) < count:
            piece = await anext(self._stream, b"")
            if not piece:
                break
            self._rest += piece
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    async def copy(self, file: IO[bytes], count: int) -> None:
        """Write exactly so many bytes. Raises StateFileError if the body has fewer or more."""
        left = count
        while left:
            piece = await self.take(min(left, PIECE_BYTES))
            if not piece:
                raise StateFileError(f"ends {left} bytes early")
            await asyncio.to_thread(file.write, piece)
            left -= len(piece)
        if await self.take(1):
            raise StateFileError("goes on after the last tensor")
