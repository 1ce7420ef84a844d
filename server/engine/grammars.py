"""Which tokens may come next where answers are held to grammars.

llguidance compiles grammars and says, after each token, which tokens may follow: one bit for each entry of the
vocabulary. It knows nothing of the tokens that end a request; `Constraint` adds them where a grammar is complete.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from server.engine.constraint import CompiledGrammar, Constraint, Row
from server.engine.request import Request
from server.text.grammar import LIMITS, GrammarError, reason
from server.wire.messages import Generate

_END = "<|end of what a grammar allows|>"

COMPILED = 64
"""How many compiled grammars are kept: the same ones come again and again, with each choice of one request at least."""

COSTLY_S = 0.1
"""Seconds of a thread from which a grammar counts as costly to compile."""

SLOW_S = 0.02
"""Seconds of a thread from which a mask counts as slow. While it is made, nobody's tokens come. Ordinary ones take less
than a hundredth of that; regular expressions with counts within counts take five times as much."""

PATIENCE_S = 1.0
"""A grammar may hold up everybody's tokens by slow masks for this long in all."""


class Grammars:
    """Compiles the grammars of one engine's requests, and says which tokens they allow.

    Args:
        tokenizer: the model's, which nobody else uses: a token is added to it.
        vocab: the model's token ids are below this.
        threads: how many masks are made at the same time.
        device: where masks are used.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, *, threads: int, device: torch.device) -> None:
        self._vocab = vocab
        self._pinned = device.type == "cuda"
        self._threads = threads
        self._executor = LLExecutor(threads) if threads > 1 else None
        self._one_by_one = False
        """Whether the last masks took so long that the next are timed one by one, to find whose they are."""
        # Copies of what was compiled once share a lexer behind a lock, and no two of them make masks at the same time.
        # So each grammar is compiled once for each lane, and requests take lanes in turn. There are two lanes a thread,
        # for pieces of work that end within one.
        self._lanes = itertools.cycle(range(2 * threads if threads > 1 else 1))
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()
        """By text."""
        # The library wants one token that ends a text. Ours is one that no text has: where it may come, a grammar is
        # complete, whatever the tokens that end this request.
        tokenizer.add_special_tokens([_END])
        self._end: int = tokenizer.token_to_id(_END)  # type: ignore[assignment]  # it was just added
        size = max(vocab, *tokenizer.get_added_tokens_decoder(), tokenizer.get_vocab_size() - 1)
        self._given, self._size = tokenizer, size
        self._row_bytes = (size + 32) // 32 * 4
        """Bytes of a row, as the library wants them: whole words of 32 bits."""
        self._rows = torch.empty(0, self._row_bytes, dtype=torch.uint8)
        """What masks are made in: memory that is pinned once."""
        used = np.zeros(self._row_bytes, np.uint8)
        used[: vocab // 8] = 0xFF
        used[vocab // 8] = (1 << vocab % 8) - 1
        used[self._end // 8] &= ~(1 << self._end % 8) & 0xFF
        self._edge: NDArray[np.intp] = np.flatnonzero(used != 0xFF)
        """The bytes of a row that have bits of no token of the model's: few, at its end."""
        self._edge_bits: Row = used[self._edge]
        self._lacks_tokens = size > vocab
        """Whether the tokenizer has tokens that the model has not: a row may be empty without them."""

    def constrain(self, request: Request) -> None:
        """Hold the request to its grammar. Takes up to a second for a large one, in the thread that compiles.

        Raises:
            GrammarError: the library can't compile it, no token of the model's can begin it, or it has turned out too
                slow.
        """
        message = request.message
        assert isinstance(message, Generate)
        text = message.grammar
        compiled = self._compiled.get(text, CompiledGrammar())
        if compiled.error:
            raise GrammarError(compiled.error)
        tokenizer = self._tokenizer
        if isinstance(tokenizer, str):
            raise GrammarError(tokenizer)
        lane = 0 if compiled.costly else next(self._lanes)
        matcher = compiled.lanes.get(lane)
        if matcher is None:
            began = time.thread_time()
            matcher = compiled.lanes[lane] = self._compile(tokenizer, text)
            compiled.costly = time.thread_time() - began > COSTLY_S
        self._compiled[text] = compiled
        self._compiled.move_to_end(text)
        if len(self._compiled) > COMPILED:
            self._compiled.popitem(last=False)
        request.constraint = Constraint(compiled, matcher.deep_copy(), message, self._vocab, lane)

    @cached_property
    def _tokenizer(self) -> LLTokenizer | str:
        """What the library makes of the model's tokens, or why it can't work with them. It is made with the first
        grammar and not at the start: 248,320 tokens take seconds and 180 MB. Only the thread that compiles asks for
        it."""
        try:
            return LLTokenizer(self._given.to_str(), n_vocab=self._size + 1, eos_token=self._end)
        except ValueError as e:
            return f"the model's tokenizer can't be used with grammars: {e}"

    def _compile(self, tokenizer: LLTokenizer, text: str) -> LLMatcher:
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(reason(matcher.get_error(), text))
        first = matcher.deep_copy()
        rows = np.frombuffer(first.compute_bitmask(), np.uint8)[None].copy()
        if first.is_error():  # the library then lets the text end
            raise GrammarError(f"no text of it can be begun: {reason(first.get_error(), text)}")
        if not self._take_end(rows)[0] and not rows.any():
            raise GrammarError("none of the model's tokens can begin it")
        return matcher

    def _take_end(self, rows: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Whether each of n rows `[n, bytes]` has the library's end of a text; takes it out of them, and all tokens
        that the model lacks."""
        ends: NDArray[np.bool_] = (rows[:, self._end // 8] & 1 << self._end % 8) != 0
        rows[:, self._edge] &= self._edge_bits
        return ends

    def masks(self, requests: Sequence[Request]) -> tuple[Tensor, dict[Request, str]]:
        """Which tokens may come next in each of n constrained requests.

        Returns:
            uint8 `[n, bytes]` on the host, a bit for each token as in `Row`; and the requests that can't go on, with
            the reason. They, and those that have ended, may have any token. The next call writes to the same memory, so
            steps before it have to be over.
        """
        if len(self._rows) < len(requests):
            count = 1 << (len(requests) - 1).bit_length()
            self._rows = torch.empty(count, self._row_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        masks = self._rows[: len(requests)]
        rows: Row = masks.numpy()
        going_on = [
            (request.constraint, number)
            for number, request in enumerate(requests)
            if request.constraint is not None and request.finish_reason is None
        ]
        by_lane = sorted(going_on, key=lambda one: one[0].lane)
        self._fill(by_lane, masks)
        complete: list[bool] = self._take_end(rows).tolist()
        view = rows.reshape(-1).data
        failed: dict[Request, str] = {}
        for constraint, number in going_on:
            whole, error = complete[number], constraint.error
            # To look at whole rows takes as long as to make them: most have more than stop tokens, as the library says.
            text_may_end = whole or self._lacks_tokens or constraint.has_stop(view, number * self._row_bytes)
            if not error and not text_may_end:
                continue
            request, row = requests[number], rows[number]
            if not error and not constraint.end(row, complete=whole, tokens=request.accepted):
                error = "none of the model's tokens can go on with it"
            if error:
                failed[request] = error
                row.fill(0xFF)
        if len(going_on) < len(requests):
            rows[[number for number, request in enumerate(requests) if request.finish_reason is not None]] = (
                0xFF
            )
        return masks, failed

    def _fill(self, constraints: list[tuple[Constraint, int]], masks: Tensor) -> None:
        """Have the library make the masks of these requests, each in the row of that number. A grammar whose slow masks
        come to `PATIENCE_S` is given up."""
        start, size = masks.data_ptr(), self._row_bytes
        if self._executor is not None and len(constraints) > 1 and not self._one_by_one:
            began = time.monotonic()
            # Each thread gets a piece of the list: the same lane's in one.
            matchers = [(constraint.matcher, number) for constraint, number in constraints]
            self._executor.unsafe_compute_mask_ptr(matchers, start, size, len(masks))
            # A large batch takes a while by itself: a twentieth of a slow mask for each is more than they need.
            usual = SLOW_S * (1 + len(constraints) / 20 / self._threads)
            self._one_by_one = time.monotonic() - began > usual
            return
        self._one_by_one = False
        for constraint, number in constraints:
            began = time.thread_time()  # not the time for which others had the processor
            constraint.matcher.unsafe_compute_mask_ptr(start + number * size, size)
            took = time.thread_time() - began
            if took > SLOW_S:
                self._one_by_one = True
                _blame(constraint.grammar, took)


def _blame(grammar: CompiledGrammar, took: float) -> None:
    grammar.slow_s += took
    if grammar.slow_s > PATIENCE_S:
        grammar.error = (
            f"it takes {took * 1000:.0f} ms to say which tokens may come next, for which all requests wait; "
            "counts within counts, as in (a{900}){300}, are slow"
        )
        grammar.lanes.clear()  # they are large
