"""Which prompts' states are held, found by a hash chain over token ids. Bookkeeping only: no tensors in here.

A recurrent state can't be cut back, so that an entry serves only prompts that begin with all of its tokens. The chain
has one link per `TOKEN_BLOCK` tokens; an entry hangs on the last full block of its tokens, and what is found there is
compared token by token.

A chain begins with its prompt's salt: prompts of different salts have no link in common, so that nobody learns from the
cache what others have sent.
"""

from collections import OrderedDict
from hashlib import blake2b

from modeling.spec import TOKEN_BLOCK

TOKEN_BYTES = 4
_SEEN = 2**16
"""Blocks of earlier prompts that are remembered by their hash alone, to find where prompts part."""


class Prefix:
    """A prompt as the cache sees it.

    Args:
        token_bytes: its ids, `TOKEN_BYTES` each.
        limit: tokens of it that may come from the cache; the others must be fed, because their logits are needed.
        salt: only prompts of the same salt share states.
    """

    def __init__(self, token_bytes: bytes, limit: int, salt: bytes = b"") -> None:
        self.token_bytes = token_bytes
        self.salt = salt
        self.limit = limit
        self.digests: list[bytes] = []
        """Hashes of the prompt's first 1, 2, ... blocks."""
        size = TOKEN_BLOCK * TOKEN_BYTES
        digest = salt
        for start in range(0, len(token_bytes) - size + 1, size):
            digest = blake2b(digest + token_bytes[start : start + size], digest_size=16).digest()
            self.digests.append(digest)

    def first(self, length: int) -> bytes:
        return self.token_bytes[: length * TOKEN_BYTES]


class CachedPrefix:
    """The state after the first `length` tokens of a prompt, which `slot` holds, with the pages of these tokens."""

    __slots__ = ("digest", "length", "salt", "slot", "token_bytes")

    def __init__(self, prefix: Prefix, length: int, slot: int) -> None:
        self.token_bytes = prefix.first(length)
        self.salt = prefix.salt
        self.digest = prefix.digests[length // TOKEN_BLOCK - 1]
        self.length = length
        self.slot = slot

    def begins(self, prefix: Prefix) -> bool:
        """Whether the prompt has this salt and begins with these tokens: hashes may collide."""
        return self.salt == prefix.salt and prefix.token_bytes.startswith(self.token_bytes)


class PrefixIndex:
    """The cached prefixes, found by prompt, and in the order of their last use."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, list[CachedPrefix]] = {}
        self._entries: OrderedDict[CachedPrefix, None] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry: CachedPrefix) -> bool:
        return entry in self._entries

    @property
    def slots(self) -> list[int]:
        return [entry.slot for entry in self._entries]

    def find(self, prefix: Prefix) -> CachedPrefix | None:
        """The longest entry that the prompt begins with, marked as used."""
        for blocks in range(min(len(prefix.digests), prefix.limit // TOKEN_BLOCK), 0, -1):
            entries = self._by_digest.get(prefix.digests[blocks - 1], ())
            fitting = [entry for entry in entries if entry.length <= prefix.limit and entry.begins(prefix)]
            if fitting:
                entry = max(fitting, key=lambda e: e.length)
                self._entries.move_to_end(entry)
                return entry
        return None

    def exact(self, prefix: Prefix, length: int) -> CachedPrefix | None:
        """The entry of exactly the first `length` tokens, marked as used."""
        for entry in self._by_digest.get(prefix.digests[length // TOKEN_BLOCK - 1], ()):
            if entry.length == length and entry.begins(prefix):
                self._entries.move_to_end(entry)
                return entry
        return None

    def add(self, prefix: Prefix, length: int, slot: int) -> CachedPrefix:
        """The state after the first `length` tokens (at least a block) is in `slot`."""
        entry = CachedPrefix(prefix, length, slot)
        self._by_digest.setdefault(entry.digest, []).append(entry)
        self._entries[entry] = None
        return entry

    def remove(self, entry: CachedPrefix) -> None:
        del self._entries[entry]
        entries = self._by_digest[entry.digest]
        entries.remove(entry)
        if not entries:
            del self._by_digest[entry.digest]

    def oldest(self, but: CachedPrefix | None = None) -> CachedPrefix | None:
        """The entry whose last use is longest ago, of all but one."""
        return next((entry for entry in self._entries if entry is not but), None)

    def remember(self, prefix: Prefix) -> int:
        """Remember a prompt. How many tokens, in whole blocks, it shares with one that was remembered earlier."""
        known = 0
        for blocks, digest in enumerate(prefix.digests, 1):
            if digest in self._seen:
                if blocks * TOKEN_BLOCK <= prefix.limit:
                    known = blocks * TOKEN_BLOCK
                self._seen.move_to_end(digest)
            else:
                self._seen[digest] = None
        while len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        return known
