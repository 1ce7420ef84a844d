"""From token ids to text, piece by piece."""

import json
import re
from collections.abc import Collection

from tokenizers import Tokenizer

MAX_HELD_TOKENS = 64
"""A character has at most four bytes, so tokens that make none for this long are broken bytes and are shown."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte (`bytes_to_unicode` in OpenAI's encoder.py) -> the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _decodes_tokens_apart(tokenizer: Tokenizer) -> bool:
    """Whether a token adds the same to every text that has begun and ends with a whole character, unless the token is
    a part of a character. So it is with byte-level BPE (GPT-2, Llama 3, Qwen) and with byte fallback (Llama 2, Mistral,
    Gemma)."""
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.decoder.__getstate__())
    if decoder["type"] != "Sequence":
        return bool(decoder["type"] == "ByteLevel")
    steps = decoder["decoders"]
    if [step["type"] for step in steps[:3]] != ["Replace", "ByteFallback", "Fuse"]:
        return False
    # All that may follow is to leave out the first space of the text.
    return steps[3:] in ([], [{"type": "Strip", "content": " ", "start": 1, "stop": 0}])


class TokenTexts:
    """What each token is by itself, special tokens included; remembered, because the same few come again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._alphabet = _byte_alphabet()
        self._apart = _decodes_tokens_apart(tokenizer)
        self._texts: dict[int, str] = {}
        self.plain = _PlainTexts(self)
        """What each token adds to any text that has begun and ends with a whole character; empty where the token alone
        does not tell: it may be a part of a character, or the decoder looks at its neighbours."""
        # A decoder may leave out the first space of a text: every token is decoded behind another one.
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
        self._anchor_text: str = tokenizer.decode(self._anchor, skip_special_tokens=False)

    def text(self, token_id: int) -> str:
        """The token's text; bytes that are no whole character are U+FFFD, so several tokens may have one text."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._decode(token_id)
        return text

    def bytes(self, token_id: int) -> bytes:
        """The token's bytes, also where they are no whole character."""
        text = self.text(token_id)
        if "\ufffd" in text:
            entry: str = self.tokenizer.id_to_token(token_id) or ""
            if match := _BYTE_TOKEN.fullmatch(entry):
                return bytes([int(match[1], 16)])
            if entry and all(c in self._alphabet for c in entry):
                return bytes(self._alphabet[c] for c in entry)
        return text.encode()

    def decode_plain(self, token_id: int) -> str:
        """An entry of `plain`."""
        if not self._apart or _BYTE_TOKEN.fullmatch(self.tokenizer.id_to_token(token_id) or ""):
            return ""
        text = self._decode(token_id)
        return "" if "\ufffd" in text else text

    def _decode(self, token_id: int) -> str:
        text: str = self.tokenizer.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text.removeprefix(self._anchor_text)


class _PlainTexts(dict[int, str]):
    """Entries are made when they are first looked up."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def __missing__(self, token_id: int) -> str:
        text = self[token_id] = self._texts.decode_plain(token_id)
        return text


class Detokenizer:
    """Incremental decoding that never emits half a character: bytes are held back until they are whole.

    Where nothing is held back, the text of most tokens is known (`TokenTexts.plain`). For the others, it decodes a
    window of the last piece's tokens and those held back. The last piece is there because a decoder may treat the
    beginning of a text in its own way (leave out its leading space).

    Args:
        shown: texts of special tokens that are not left out with the others.
    """

    def __init__(self, texts: TokenTexts, *, skip_special_tokens: bool, shown: Collection[str] = ()) -> None:
        self._tokenizer = texts.tokenizer
        self._plain = texts.plain
        self._left_out = texts.special_ids if skip_special_tokens else frozenset()
        if shown and self._left_out:
            self._left_out -= {self._tokenizer.token_to_id(text) for text in shown}
        self._window: list[int] = []
        self._shown = 0
        """How many tokens of the window belong to the last piece."""

    def add(self, token_id: int) -> str:
        """The text that this token completes, possibly empty."""
        if token_id in self._left_out:
            return ""
        window = self._window
        if self._shown and self._shown == len(window) and (piece := self._plain[token_id]):
            self._window, self._shown = [token_id], 1
            return piece
        window.append(token_id)
        text = self._decode(window)
        shown_text = self._decode(window[: self._shown])
        whole = not text.endswith("\ufffd") or len(window) - self._shown > MAX_HELD_TOKENS
        if len(text) <= len(shown_text) or not whole:
            return ""
        del window[: self._shown]
        self._shown = len(window)
        return text[len(shown_text) :]

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD."""
        window, shown = self._window, self._shown
        self._window, self._shown = [], 0
        if shown == len(window):
            return ""
        return self._decode(window)[len(self._decode(window[:shown])) :]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


class StopMatcher:
    """Finds the stop string that is complete first in text that comes in pieces, however it is cut.

    Of two that are complete at the same character the longer one counts. Only what might begin one is held back.

    Args:
        keep: whether the stop string is part of the text.
    """

    def __init__(self, stops: list[str], *, keep: bool = False) -> None:
        self._stops = stops
        self._keep = keep
        self._begun = [0] * len(stops)
        """Characters that each one has begun with, at the end of what is held back."""
        self._held = ""
        self.matched = False

    def add(self, text: str) -> str:
        """Text that is safe to show. Once a stop string is complete, what is left of the text, and `matched` is set."""
        if not self._stops:
            return text
        starts = [len(self._held) - begun for begun in self._begun]
        text = self._held + text
        # Each from where it began itself: what another one holds back must not be looked through for every token.
        places = [(text.find(stop, start), stop) for stop, start in zip(self._stops, starts, strict=True)]
        found = [(at + len(stop), at) for at, stop in places if at >= 0]
        if found:
            self.matched, self._held = True, ""
            end, at = min(found)
            return text[: end if self._keep else at]
        self._begun = [
            self._overlap(text[start:], stop) for stop, start in zip(self._stops, starts, strict=True)
        ]
        shown = len(text) - max(self._begun)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """The text that was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
