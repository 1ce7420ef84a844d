"""A runner without a model, that checks every batch: what it is given, and that each slot holds the state of exactly
the tokens that its request has fed, through every copy, and its pages these very tokens."""

from typing import Any

import torch

from modeling.spec import TOKEN_BLOCK
from modeling.state import PAGE_TOKENS, PagedKV, StatePool
from server.engine.batch import Batch, Swap
from server.engine.request import Request
from server.engine.runner import NewToken, StepResult
from server.wire.messages import Generate, Score

_PRIME = 8388593
"""Below 2^23, so that float32 holds every hash exactly."""


class CrashError(Exception):
    """What a device that fails raises."""


def fed(state: tuple[int, int], tokens: list[int]) -> tuple[int, int]:
    """(number, hash) of the tokens that a state has seen, some tokens later."""
    count, value = state
    for token in tokens:
        value = (value * 31 + token + 1) % _PRIME
    return count + len(tokens), value


class FakeStep:
    """A launched step whose tokens are known: the index of each."""

    def __init__(self, batch: Batch, runner: "FakeRunner") -> None:
        self.batch, self._runner = batch, runner
        self.failed: list[Request] = []
        self.constrained: list[Request] = []
        self._slots = {request: request.slot for request in batch.requests}
        self._tokens = [NewToken(r, r.sampled - 1) for r in batch.decodes] + [
            NewToken(request, 0)
            for chunk in batch.prefills
            if chunk.is_last and isinstance(chunk.request.message, Generate)
            for request in (chunk.request, *chunk.forks)
        ]

    def collect(self) -> StepResult:
        self._runner.launched.remove(self)
        for request, slot in self._slots.items():
            if (
                request not in self._runner.moved
                and request.swapped is None
                and request.allocation is not None
            ):
                assert request.slot == slot, "a slot changed hands under a launched step"
        if self._runner.fail == "collect":
            raise CrashError
        return StepResult(self._tokens)


class FakeRunner:
    """Over a pool whose first layer is linear, of which it uses the first numbers of each slot; and if it has pages,
    those of its second layer."""

    def __init__(self, pool: StatePool, prefill_tokens: int) -> None:
        self.prefill_tokens = prefill_tokens
        self.launched: list[FakeStep] = []
        self.order: list[str] = []
        self.prefilled = 0
        self.fail: str | None = None
        self.base: dict[Any, list[int]] = {}
        """The tokens in each saved state, by its path."""
        self.moved: set[Request] = set()
        """Requests that have been preempted."""
        self._sampling: dict[int, Request] = {}
        """Whose sampling each slot's row is of."""
        self._pool = pool
        self._state = pool.layers[0].recurrent.view(pool.num_slots + 1, -1)

    def read(self, slot: int) -> tuple[int, int]:
        """(number, hash) of the tokens that a slot's state has seen; those in its pages must be the same."""
        count, value = self._state[slot, :2].int().tolist()
        if self._pool.pages.count:
            of_layer = self._pool.layers[1]
            assert isinstance(of_layer, PagedKV)
            kept = of_layer.tensors(slot, count)["keys"][:, 0, 0].int().tolist()
            assert fed((0, 0), kept) == (count, value), "the pages hold other tokens than the state has seen"
        return count, value

    def write(self, slot: int, state: tuple[int, int], tokens: list[int]) -> None:
        """A slot's state moves on by `tokens`, to `state`."""
        self._state[slot, 0], self._state[slot, 1] = state
        pages = self._pool.pages
        if pages.count:
            of_layer = self._pool.layers[1]
            assert isinstance(of_layer, PagedKV)
            first = state[0] - len(tokens)
            for place, token in enumerate(tokens, first):
                page = int(pages.blocks[slot, place // PAGE_TOKENS])
                assert page != pages.null_page, "a token without a page"
                assert page in pages.of(slot)
                of_layer.keys[page, 0, place % PAGE_TOKENS, 0] = token
            pages.advance(torch.tensor([slot]), [0, len(tokens)])

    def launch(self, batch: Batch) -> FakeStep:
        if self.fail == "launch":
            raise CrashError
        requests = batch.requests
        assert requests and len(set(requests)) == len(requests)
        for swap in batch.swaps:
            self._swap(swap)
        assert all(r.finish_reason is None for r in requests), "work for a request that has ended"
        assert len({r.slot for r in requests}) == len(requests)
        assert sum(c.end - c.start for c in batch.prefills) <= self.prefill_tokens
        for request in batch.decodes:
            expected = fed(
                self._start_of(request), request.message.token_ids + list(range(request.sampled - 2))
            )
            assert self.read(request.slot) == expected, "a decode of another state"
            assert self._sampling[request.slot] is request, "a decode with the sampling of another request"
            self.write(request.slot, fed(expected, [request.sampled - 2]), [request.sampled - 2])
        for chunk in batch.prefills:
            self._prefill(chunk)
        result = FakeStep(batch, self)
        self.launched.append(result)
        return result

    def sample(self, step: FakeStep, masks: None) -> FakeStep:
        return step

    def _swap(self, swap: Swap) -> None:
        request, slot = swap.request, swap.slot
        self.moved.add(request)
        if not request.sampled:
            return
        if swap.out:
            assert self._sampling[slot] is request, "another request's sampling was kept"
        else:
            self._sampling[slot] = request

    def _start_of(self, request: Request) -> tuple[int, int]:
        message = request.message
        path = message.state_path if isinstance(message, Generate) else None
        return (0, 0) if path is None else fed((0, 0), self.base[path])

    def _prefill(self, chunk: Any) -> None:
        request = chunk.request
        ids = request.message.token_ids
        assert chunk.start < chunk.end
        assert chunk.is_last or chunk.end % TOKEN_BLOCK == 0
        assert chunk.start % TOKEN_BLOCK == 0 or chunk.start == request.cached
        expected = fed(self._start_of(request), ids[: chunk.start])
        assert self.read(request.slot) == expected, "a prompt goes on from another state"
        if isinstance(request.message, Score):
            assert request.cached < request.message.from_position, "logits that are needed were not made"
        if chunk.start == request.cached:
            self.order.append(request.id)
        self.prefilled += chunk.end - chunk.start
        self.write(request.slot, fed(expected, ids[chunk.start : chunk.end]), ids[chunk.start : chunk.end])
        for fork in chunk.forks:
            assert chunk.is_last and fork.message.token_ids == ids
            self.order.append(fork.id)
            self._pool.copy(request.slot, fork.slot)
            assert self.read(fork.slot) == self.read(request.slot)
        if chunk.is_last:
            self._sampling.update({r.slot: r for r in (request, *chunk.forks)})
