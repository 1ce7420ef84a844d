"""Several pieces of work as one, each ended when nobody waits for it any more."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request

from server.api.http.errors import APIError

T = TypeVar("T")


class Stepping:
    """Work that goes on by a step whenever there is something to do, without a task that is woken for it.

    Args:
        go_on: does what there is to do; returns whether that was the last of it.
    """

    def __init__(self, go_on: Callable[[], bool]) -> None:
        self._go_on = go_on
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done after the last step; raises what a step has raised. When it is cancelled, no more steps are done."""

    def step(self) -> None:
        """Go on, unless it has ended. Never raises."""
        if self.ended.done():
            return
        try:
            if self._go_on():
                self.ended.set_result(None)
        except Exception as e:  # whoever says that there is something to do has nothing to do with it
            self.ended.set_exception(e)


async def merged(sources: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """The items of all sources as they come, each with its source's index. A source waits until its last item has been
    taken. When one fails, or the reader leaves, all are closed."""
    if len(sources) == 1:
        async with contextlib.aclosing(sources[0]) as source:
            async for item in source:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(index: int, source: AsyncGenerator[T]) -> None:
        end: Exception | None = None
        try:
            async with contextlib.aclosing(source):
                async for item in source:
                    await queue.put((index, item))
        except Exception as e:
            end = e
        await queue.put(end)

    tasks = [asyncio.create_task(pump(index, source)) for index, source in enumerate(sources)]
    try:
        running = len(tasks)
        while running:
            entry = await queue.get()
            if isinstance(entry, Exception):
                raise entry
            if entry is None:
                running -= 1
            else:
                yield entry
    finally:
        await _end(tasks)


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all pieces of work, in order. When one fails, or the caller is cancelled, the others are
    cancelled and have ended by the time this does."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, but cancel it when the client goes away. Nobody reads the error that is then raised."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError(499, "the client closed the connection")
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
