"""A runner without a model, that checks every batch: what it is given, and that each slot holds the state of exactly
the tokens that its request has fed, through every copy."""

from typing import Any

from modeling.spec import TOKEN_BLOCK
from modeling.state import StatePool
from server.engine.request import Request
from server.engine.runner import NewToken, StepResult
from server.engine.scheduler import Batch
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
            assert request.slot == slot, "a slot changed hands under a launched step"
        if self._runner.fail == "collect":
            raise CrashError
        return StepResult(self._tokens)


class FakeRunner:
    """Over a pool of at least one layer, whose first numbers of each slot it uses."""

    def __init__(self, pool: StatePool, prefill_tokens: int) -> None:
        self.prefill_tokens = prefill_tokens
        self.launched: list[FakeStep] = []
        self.order: list[str] = []
        self.prefilled = 0
        self.fail: str | None = None
        self.base: dict[Any, tuple[int, int]] = {}
        """The tokens in each saved state, by its path."""
        self._state = pool.layers[0].recurrent.view(pool.num_slots + 1, -1)

    def read(self, slot: int) -> tuple[int, int]:
        count, value = self._state[slot, :2].int().tolist()
        return count, value

    def write(self, slot: int, state: tuple[int, int]) -> None:
        self._state[slot, 0], self._state[slot, 1] = state

    def launch(self, batch: Batch) -> FakeStep:
        if self.fail == "launch":
            raise CrashError
        requests = batch.requests
        assert requests and len(set(requests)) == len(requests)
        assert all(r.finish_reason is None for r in requests), "work for a request that has ended"
        assert len({r.slot for r in requests}) == len(requests)
        assert sum(c.end - c.start for c in batch.prefills) <= self.prefill_tokens
        for request in batch.decodes:
            expected = fed(
                self._start_of(request), request.message.token_ids + list(range(request.sampled - 2))
            )
            assert self.read(request.slot) == expected, "a decode of another state"
            self.write(request.slot, fed(expected, [request.sampled - 2]))
        for chunk in batch.prefills:
            self._prefill(chunk)
        result = FakeStep(batch, self)
        self.launched.append(result)
        return result

    def _start_of(self, request: Request) -> tuple[int, int]:
        message = request.message
        path = message.state_path if isinstance(message, Generate) else None
        return (0, 0) if path is None else self.base[path]

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
        self.write(request.slot, fed(expected, ids[chunk.start : chunk.end]))
        for fork in chunk.forks:
            assert chunk.is_last and fork.message.token_ids == ids
            self.order.append(fork.id)
            self.write(fork.slot, self.read(request.slot))
