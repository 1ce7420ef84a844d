"""The saved states of a server: the store that they are in, and which of them each variant can go on from."""

import asyncio
import logging
import secrets
import tempfile
from pathlib import Path

from fastapi import Request

from server.api.http.errors import APIError, unavailable
from server.api.serving.sizes import saved_bytes
from server.api.serving.variants import Variant
from server.api.states.store import (
    Fingerprint,
    Header,
    OtherModelError,
    SavedState,
    StateFileError,
    StateStore,
    weights_sha256,
)
from server.settings import ConfigurationError, Settings
from server.wire.exchange import StateError
from server.wire.messages import Ready, SaveState, layout_after

logger = logging.getLogger("lowkey.states")

SWEEP_S = 60.0
"""How long a state may lie in the directory after it has expired."""


class SavedStates:
    """The store of saved states, if a directory for it is configured, and what those of each variant look like.

    What a variant's file must hold, name by name and shape by shape, its engine has said when it loaded.

    Raises:
        ConfigurationError: nothing can be written there.
    """

    def __init__(self, settings: Settings) -> None:
        self._store = None if settings.state_dir is None else _open_store(settings, settings.state_dir)
        self._fingerprints: dict[str, tuple[Ready, Fingerprint]] = {}

    @property
    def store(self) -> StateStore:
        """The store of files. 404 where no directory for it is configured."""
        if self._store is None:
            raise APIError(404, "saved states are off: the server's configuration names no state_dir")
        return self._store

    async def find(self, state_id: str, owner: str) -> SavedState:
        """A state of this owner. 404 if there is none."""
        found = await asyncio.to_thread(self.store.find, state_id, owner)
        if found is None:
            raise unknown(state_id)
        return found

    async def to_continue(self, variant: Variant, state_id: str, owner: str) -> SavedState:
        """The state that a completion by the variant goes on from, marked as used. 404 if there is none, 409 if it is
        another model's."""
        found = await self.find(state_id, owner)
        try:
            await self.check(variant, found.header)
            await asyncio.to_thread(self.store.touch, found)
        except (OtherModelError, StateFileError) as e:
            raise APIError(409, f"state_id: {state_id}: {e}", param="state_id") from e
        except FileNotFoundError:
            raise unknown(state_id) from None
        return found

    async def sweep(self) -> None:
        """Remove what has expired, also where nobody saves anything. Goes on until it is cancelled."""
        while self._store is not None:
            try:
                await asyncio.to_thread(self._store.sweep)
            except OSError as e:
                logger.warning("expired states can't be removed: %s", e)
            await asyncio.sleep(SWEEP_S)

    async def fingerprint(self, variant: Variant) -> Fingerprint:
        """The variant's fingerprint; it is worked out once for each load."""
        ready, known = variant.info, self._fingerprints.get(variant.name)
        if known is not None and known[0] is ready:
            return known[1]
        found = Fingerprint(
            model=await asyncio.to_thread(weights_sha256, Path(ready.checkpoint_path)),
            d_k=",".join(map(str, ready.d_k)),
            state_dtype=ready.state_dtype,
        )
        self._fingerprints[variant.name] = ready, found
        return found

    async def check(self, variant: Variant, header: Header) -> None:
        """Raises OtherModelError or StateFileError unless the variant can go on from this file."""
        (await self.fingerprint(variant)).check(header.metadata, variant.name)
        info = variant.info
        layout = layout_after(info.state_layout, header.tokens)
        if (header.tensors, header.data_bytes) != (layout, saved_bytes(info, header.tokens)):
            odd = sorted(
                name
                for name in header.tensors.keys() | layout.keys()
                if header.tensors.get(name) != layout.get(name)
            )
            told = ""
            if odd:
                theirs, ours = header.tensors.get(odd[0]), layout.get(odd[0])
                told = f": {odd[0][:80]} is {_tensor(theirs)} there and {_tensor(ours)} here"
            raise StateFileError(f"has other tensors than variant {variant.name!r} keeps{told}")

    async def save(self, variant: Variant, ids: list[int], path: Path, salt: bytes) -> None:
        """Have the engine write the state after `ids`, whose prefixes are kept under `salt`. Raises EngineError."""
        fingerprint = await self.fingerprint(variant)
        message = SaveState(
            request_id=secrets.token_hex(8),
            token_ids=ids,
            path=str(path),
            fingerprint=fingerprint.metadata(variant.name, len(ids)),
            cache_salt=salt,
        )
        try:
            await variant.client.save_state(message)
        except StateError as e:  # a full disk; the message names the file, which is nobody's business outside
            logger.error("%s: %s", variant.name, e)
            raise unavailable("the state could not be written; the server's log has the details") from e


def _tensor(found: tuple[str, list[int]] | None) -> str:
    """How a message calls a tensor of a state: its dtype and shape."""
    return "missing" if found is None else f"{found[0][:8]} {str(found[1])[:40]}"


def saved_states(request: Request) -> SavedStates:
    """The saved states of the server that the request came to."""
    saved: SavedStates = request.app.state.saved_states
    return saved


def unknown(state_id: str) -> APIError:
    """The answer to a request for a state that is not there."""
    return APIError(
        404, f"state_id: no state {state_id[:64]!r}; it may have expired or been deleted", param="state_id"
    )


def _open_store(settings: Settings, directory: Path) -> StateStore:
    """Raises ConfigurationError unless files can be made there."""
    try:
        store = StateStore(directory, settings.state_ttl_s, settings.state_budget_bytes)
        with tempfile.TemporaryFile(dir=directory):
            return store
    except OSError as e:
        raise ConfigurationError(f"state_dir: no file can be made in {directory}: {e.strerror}") from e
