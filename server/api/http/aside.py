"""Work that takes too long for the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_worker = ThreadPoolExecutor(1, thread_name_prefix="lowkey-aside")


async def aside(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do work that is Python's own in the one thread that there is for it.

    It shares the interpreter with the event loop, which gets it back every few milliseconds, but not within one call of
    a C function: such calls must be short. With more threads than one, the loop would wait for each of them.

    Work that releases the interpreter (the tokenizer's, reading and writing files) belongs into `asyncio.to_thread`
    instead; so does the rendering of conversations, which should not queue behind somebody's long answer.
    """
    return await asyncio.get_running_loop().run_in_executor(_worker, lambda: work(*args, **kwargs))
