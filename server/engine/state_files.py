"""Files of states are written and read beside the steps: one takes as long as the disk likes, and nobody's tokens wait
for it."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

from server.engine.request import Request
from server.engine.state_file import HostState, StateLoadError

T = TypeVar("T")


class _Work(Generic[T]):
    """Work of one kind that is under way, for one request each, in the order in which it was begun."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._under_way: deque[tuple[Request, Future[T]]] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    def begin(self, request: Request, work: Callable[[], T]) -> None:
        self._under_way.append((request, self._executor.submit(work)))

    @property
    def due(self) -> bool:
        """Whether the first has ended."""
        return bool(self._under_way) and self._under_way[0][1].done()

    def ended(self) -> list[tuple[Request, Future[T]]]:
        """What has ended since the last call."""
        ended: list[tuple[Request, Future[T]]] = []
        while self.due:
            ended.append(self._under_way.popleft())
        return ended


class StateFiles:
    """Files of states that are being written and read, one after the other.

    A request keeps its slot until its file has been told of by `written` or `loaded`, so that no more files can wait
    than there are slots.

    Args:
        executor: does one piece of work at a time, in the order in which they come: a file that is to be written and
            then read is written first.
    """

    def __init__(self, executor: Executor) -> None:
        self._writes: _Work[None] = _Work(executor)
        self._reads: _Work[HostState] = _Work(executor)

    @property
    def busy(self) -> bool:
        """Whether there are files that have not been told of."""
        return bool(self._writes or self._reads)

    @property
    def due(self) -> bool:
        """Whether a write has ended that has not been told of."""
        return self._writes.due

    def write(self, request: Request, work: Callable[[], None]) -> None:
        """Begin to write a file; `work` raises OSError if it can't."""
        self._writes.begin(request, work)

    def read(self, request: Request, work: Callable[[], HostState]) -> None:
        """Begin to read a file; `work` raises StateLoadError if it can't."""
        self._reads.begin(request, work)

    def written(self) -> list[tuple[Request, str | None]]:
        """The requests whose file has been written since the last call, each with what was wrong or None."""
        ended: list[tuple[Request, str | None]] = []
        for request, write in self._writes.ended():
            error = write.exception()
            if error is not None and not isinstance(error, OSError):
                raise error
            ended.append((request, None if error is None else f"the state can't be written: {error}"))
        return ended

    def loaded(self) -> list[tuple[Request, HostState | StateLoadError]]:
        """The requests whose file has been read since the last call, each with the state or what was wrong."""
        ended: list[tuple[Request, HostState | StateLoadError]] = []
        for request, read in self._reads.ended():
            error = read.exception()
            if error is not None and not isinstance(error, StateLoadError):
                raise error
            ended.append((request, read.result() if error is None else error))
        return ended
