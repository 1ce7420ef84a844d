"""Where a request is in the grammar that its answer is held to."""

from dataclasses import dataclass, field

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from server.text.grammar import reason
from server.wire.messages import Generate

Row = NDArray[np.uint8]
"""One bit for each token: token i is bit i % 8 of byte i // 8."""


@dataclass(eq=False)
class CompiledGrammar:
    """What all requests of one grammar share."""

    lanes: dict[int, LLMatcher] = field(default_factory=dict)
    """Matchers at the grammar's beginning, by lane (`Grammars`)."""
    costly: bool = False
    """Whether it took long to compile: such a grammar has one lane alone, for it is large as well."""
    slow_s: float = 0.0
    """For how long its slow masks have held up everybody's tokens, in all."""
    error: str = ""
    """Why nobody may go on with it; empty if they may."""


class Constraint:
    """Where one request is in its grammar.

    Args:
        grammar: what is known of it.
        matcher: follows the grammar, and is at its beginning.
        vocab: the model's token ids are below this.
        lane: matchers of the same lane make their masks one after the other.
    """

    def __init__(
        self, grammar: CompiledGrammar, matcher: LLMatcher, message: Generate, vocab: int, lane: int
    ) -> None:
        self.grammar = grammar
        self.matcher = matcher
        self.lane = lane
        self._min_tokens = message.min_tokens
        bits: dict[int, int] = {}
        for token in message.stop_token_ids:
            if 0 <= token < vocab:
                bits[token // 8] = bits.get(token // 8, 0) | 1 << token % 8
        self._stops = list(bits.items())
        self._bytes = np.array(list(bits), np.intp)
        self._bits = np.array(list(bits.values()), np.uint8)

    def advance(self, token: int) -> str | None:
        """Go on by a token that ends nothing. Returns why the grammar does not go on so, if it doesn't."""
        if self.matcher.consume_token(token):
            return None
        return f"no token is left that it allows: {self.error or f'token {token} is none'}"

    def end(self, row: Row, *, complete: bool, tokens: int) -> bool:
        """Let the stop tokens come next, in place, where the grammar is complete and `min_tokens` are there, and
        nowhere else: not as text either, for they would end that in its midst. Where without them nothing may come,
        they may, whatever speaks against it.

        Args:
            row: what the grammar allows.
            tokens: how many there are.

        Returns:
            Whether anything may come next.
        """
        at, stops = self._bytes, self._bits
        as_text = row[at] & stops
        row[at] &= ~stops
        if complete and tokens >= self._min_tokens:
            row[at] |= stops
        if not row.any():
            row[at] |= stops if complete else as_text
        return bool(row.any())

    def has_stop(self, masks: memoryview, start: int) -> bool:
        """Whether a stop token is among what the grammar allows as text, in the row that begins there. To index a view
        takes a tenth of what to index an array does, and this is asked for every token."""
        return any(masks[start + at] & bits for at, bits in self._stops)

    @property
    def error(self) -> str:
        """Why it does not go on; empty if it does."""
        return reason(self.matcher.get_error(), "") if self.matcher.is_error() else self.grammar.error
