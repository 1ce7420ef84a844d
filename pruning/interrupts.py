"""Ctrl-C in long work: what is done is saved first, and the user is told how to go on."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nstopping once what is done is saved; once more to stop at once\n"


@contextmanager
def put_off() -> Iterator[Callable[[], bool]]:
    """Puts off Ctrl-C and SIGTERM to where work can be saved; what is yielded says whether one of them came.

    A second one is not put off. In a thread that is not the main one nothing is: signals are not delivered there.
    """
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True
        os.write(2, NOTICE)  # not through a stream, which may be in the middle of a write

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def left_behind(what: str) -> Iterator[None]:
    """Gives a KeyboardInterrupt of the block the words that the user is told, unless it has some already."""
    try:
        yield
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt(*(e.args or (what,))) from e


@contextmanager
def going_on_from(saved: Path) -> Iterator[None]:
    """As `left_behind`, for work that saves to a file: says that the same command goes on from there."""
    try:
        yield
    except KeyboardInterrupt as e:
        kept = f"the same command goes on from {saved}" if saved.exists() else "nothing was saved"
        raise KeyboardInterrupt(kept) from e
