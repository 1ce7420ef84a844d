"""Files are written beside the steps: one takes as long as the disk likes, and nobody's tokens wait for it."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future

from server.engine.request import Request


class StateWriter:
    """Writes of states under way, one after the other. A request keeps its slot until its write has been `finished`, so
    that no more of them can wait than there are slots."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._writes: deque[tuple[Request, Future[None]]] = deque()

    def start(self, request: Request, write: Callable[[], None]) -> None:
        self._writes.append((request, self._executor.submit(write)))

    @property
    def busy(self) -> bool:
        """Whether there are writes that have not been told."""
        return bool(self._writes)

    @property
    def due(self) -> bool:
        """Whether one of them has ended."""
        return self.busy and self._writes[0][1].done()

    def finished(self) -> list[tuple[Request, str | None]]:
        """The requests whose write has ended since the last call, each with what was wrong or None."""
        ended: list[tuple[Request, str | None]] = []
        while self.due:
            request, write = self._writes.popleft()
            error = write.exception()
            if error is not None and not isinstance(error, OSError):
                raise error
            ended.append((request, None if error is None else f"the state can't be written: {error}"))
        return ended
