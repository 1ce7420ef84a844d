"""Work that is done in threads beside the steps: files of states are written and read, which takes as long as the disk
likes, and grammars are compiled. Nobody else's tokens wait for it."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

from server.engine.request import Request

E = TypeVar("E", bound=Exception)


class ThreadWork(Generic[E]):
    """Pieces of work that are under way, one for each of some requests.

    A request keeps its slot, if it has one, until its work has ended or was cancelled, so that no more files can wait
    than there are slots.

    Args:
        executor: does one piece of work at a time, in the order in which they come.
        expected: how a piece of work may fail. Any other exception is raised by `ended`.
    """

    def __init__(self, executor: Executor, *expected: type[E]) -> None:
        self._executor = executor
        self._expected = expected
        self._under_way: deque[tuple[Request, Future[None]]] = deque()

    def __len__(self) -> int:
        """How many pieces of work have not been told of."""
        return len(self._under_way)

    def begin(self, request: Request, work: Callable[[], None]) -> None:
        """Do a piece of work for the request, once all before it are done."""
        self._under_way.append((request, self._executor.submit(work)))

    def cancel(self, request_id: str) -> Request | None:
        """The request of that id if its work had not begun: it won't be done, and `ended` won't tell of it. None when
        there is no such work, or it has begun and goes on."""
        for request, work in self._under_way:
            if request.id == request_id and work.cancel():
                self._under_way.remove((request, work))
                return request
        return None

    @property
    def due(self) -> bool:
        """Whether `ended` has something to tell."""
        return bool(self._under_way) and self._under_way[0][1].done()

    def ended(self) -> list[tuple[Request, E | None]]:
        """The requests whose work has ended since the last call, each with the expected error if it failed."""
        ended: list[tuple[Request, E | None]] = []
        while self.due:
            request, work = self._under_way.popleft()
            try:
                work.result()
            except self._expected as e:
                ended.append((request, e))
            else:
                ended.append((request, None))
        return ended
