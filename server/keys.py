"""API keys as settings have them: only hashes are kept."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

MIN_KEY_LENGTH = 16
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")


def _sha256_of(key: Any) -> str:
    """The SHA-256 of a key that is given as itself or as `sha256:` and its hash. ValueError, which never names the key,
    if it is neither."""
    if isinstance(key, str):
        if _SHA256.fullmatch(key):
            return key.removeprefix("sha256:")
        is_long = len(key) >= MIN_KEY_LENGTH and not key.startswith("sha256:")
        if is_long and key.isascii() and key.isprintable() and key == key.strip():
            return hashlib.sha256(key.encode()).hexdigest()
    raise ValueError(
        f"a key has at least {MIN_KEY_LENGTH} printable ASCII characters and no spaces around them (`openssl rand -hex "
        "24` makes one), or is sha256: and 64 hexadecimal digits of one"
    )


class ApiKey(BaseModel):
    """The settings of one client. The keys themselves are not kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: tuple[str, ...] = Field(
        min_length=1,
        description="Hashes of all keys that the client may use; more than one while it changes keys.",
    )
    requests_per_minute: int | None = Field(default=None, ge=1, description="Instead of the server's.")
    tokens_per_minute: int | None = Field(default=None, ge=1, description="Instead of the server's.")
    max_priority: int = Field(
        default=0,
        description="The most urgent (lowest) priority that a request may have; others are raised to it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _hash(cls, value: Any) -> Any:
        if isinstance(value, ApiKey):
            return value
        fields = dict(value) if isinstance(value, dict) else {"key": value}
        keys = fields.pop("key", None)
        keys = [keys] if isinstance(keys, str) else keys
        if not isinstance(keys, list) or not keys or "sha256" in fields:
            raise ValueError('is a key, a list of keys, or a table with key = "..." or key = ["...", "..."]')
        return {**fields, "sha256": [_sha256_of(key) for key in keys]}


def keys_of(value: Any) -> Any:
    """`name=key,name=key`, as an environment variable has it."""
    if not isinstance(value, str):
        return value
    keys: dict[str, str] = {}
    for number, entry in enumerate(filter(None, value.split(",")), 1):
        name, separator, key = entry.partition("=")
        if not separator or name.strip() in keys:
            raise ValueError(f"entry {number} is not name=key with a name of its own")
        keys[name.strip()] = key.strip()
    return keys


def check_owners(keys: Mapping[str, ApiKey]) -> None:
    """Raise ValueError if two clients have a key in common: whose requests came with it could not be told."""
    owners: dict[str, str] = {}
    for name, key in keys.items():
        for digest in key.sha256:
            owner = owners.setdefault(digest, name)
            if owner != name:
                raise ValueError(f"api_keys.{name}: has a key that is {owner}'s; each client needs its own")
