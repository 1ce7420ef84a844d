"""Files of states are written and read beside the steps: one takes as long as the disk likes, and nobody's tokens wait
for it."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

from server.engine.request import Request

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


class FileWork(Generic[T, E]):
    """Reads or writes of files that are under way, one for each of some requests.

    A request keeps its slot until `ended` has told of its file, so that no more files can wait than there are slots.

    Args:
        executor: does one piece of work at a time, in the order in which they come: one that does both reads and writes
            writes a file before it reads it again.
        expected: how a piece of work may fail.
    """

    def __init__(self, executor: Executor, expected: type[E]) -> None:
        self._executor = executor
        self._expected = expected
        self._under_way: deque[tuple[Request, Future[T]]] = deque()

    def __len__(self) -> int:
        """How many files have not been told of."""
        return len(self._under_way)

    def begin(self, request: Request, work: Callable[[], T]) -> None:
        """Do a piece of work for the request, once all before it are done."""
        self._under_way.append((request, self._executor.submit(work)))

    @property
    def due(self) -> bool:
        """Whether `ended` has something to tell."""
        return bool(self._under_way) and self._under_way[0][1].done()

    def ended(self) -> list[tuple[Request, T | E]]:
        """The requests whose work has ended since the last call, each with what came of it or the expected error."""
        ended: list[tuple[Request, T | E]] = []
        while self.due:
            request, work = self._under_way.popleft()
            try:
                ended.append((request, work.result()))
            except self._expected as e:
                ended.append((request, e))
        return ended
