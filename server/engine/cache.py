"""Who holds which state slot. The scheduler sees allocations only, never tensors."""

from dataclasses import dataclass

from modeling.state import StatePool


@dataclass(frozen=True)
class Allocation:
    """The state of one request, its own for its whole life: it never grows, so it is never preempted."""

    slot: int


class StateCache:
    """Allocations out of one StatePool."""

    def __init__(self, pool: StatePool) -> None:
        self._pool = pool

    @property
    def used(self) -> int:
        return self._pool.used_slots

    def allocate(self) -> Allocation | None:
        """A zeroed state, or None when all slots are in use."""
        slot = self._pool.allocate()
        return None if slot is None else Allocation(slot)

    def free(self, allocation: Allocation) -> None:
        self._pool.free(allocation.slot)
