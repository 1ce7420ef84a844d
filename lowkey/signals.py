"""Ctrl-C, SIGTERM and SIGHUP: they end a command with a line and an exit code, once nothing half-written is left."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

Handler = Callable[[int, FrameType | None], Any]


class Terminated(KeyboardInterrupt):
    """SIGTERM came, which ends work as Ctrl-C does; only the exit code differs."""


class HungUp(KeyboardInterrupt):
    """SIGHUP came: the terminal is gone."""


INTERRUPTIONS: dict[int, type[KeyboardInterrupt]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
    signal.SIGHUP: HungUp,
}
"""The signals that end work, and the exceptions that they are turned into."""

written: list[Path] = []
"""The results that the running command has given their names, for its last line. `lowkey.publishing` adds them."""

_running = 0
"""How many nested blocks of `ending_on_signals` the process is in."""
_GRACE = 10.0
"""Seconds in which a command that a signal ends ignores further ones, so that they don't take its last words away.
After that they count again: code that is not Python's may have swallowed the exception."""
_deaf_until = 0.0
"""The time, by the monotonic clock, from which on signals count again."""
_came: int | None = None
"""The signal that is ending the running command; None if there is none."""


def interrupt(number: int) -> NoReturn:
    """Ends work as the signal `number` does, by its exception. A running command ignores further ones for a while."""
    global _deaf_until, _came
    if _running:
        _deaf_until, _came = time.monotonic() + _GRACE, number
    raise INTERRUPTIONS[number]


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """The signals of `INTERRUPTIONS` call `handler` in the block. SIGHUP is left alone if the process ignores it, as it
    does under nohup. In a thread that is not the main one nothing changes: signals are not delivered there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    now = {number: signal.getsignal(number) for number in INTERRUPTIONS}
    if now[signal.SIGHUP] is signal.SIG_IGN:
        del now[signal.SIGHUP]
    before = {number: known for number, known in now.items() if known is not None}  # others can't be restored

    def handle(number: int, frame: FrameType | None) -> None:
        if time.monotonic() >= _deaf_until:
            handler(number, frame)

    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C, SIGTERM and SIGHUP until the block has ended. Use it around steps that must all happen or none.

    Where a signal that came ends the work, the words of an exception that the block raised are the interruption's.
    """
    came: list[int] = []
    try:
        with handled_by(lambda number, frame: came.append(number)):
            yield
    except BaseException as e:
        if came:
            try:
                signal.raise_signal(came[0])
            except KeyboardInterrupt as stop:
                raise type(stop)(str(e)) from e
        raise
    if came:
        signal.raise_signal(came[0])


@contextmanager
def ending_on_signals(clean_up: Callable[[], object]) -> Iterator[None]:
    """For a whole command: these signals end the process with a line that says what is left, and with exit code 130
    (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP). All that come after the first are ignored: the process is ending already.

    Args:
        clean_up: called at the end of the block in any case, undisturbed by signals. It removes what an interruption
            kept from being removed by ordinary means, because it came while they were at work.
    """
    global _running, _deaf_until, _came
    if not _running:
        written.clear()
        _came = None
    _running += 1
    try:
        with handled_by(lambda number, frame: interrupt(number)):
            try:
                yield
            except BaseException as e:
                # Foreign code may make another exception of the one that a signal raised in it.
                if not isinstance(e, KeyboardInterrupt) and _came is None:
                    raise
                _deaf_until = math.inf
                words = str(e) if isinstance(e, KeyboardInterrupt) else ""
                with suppress(OSError):  # a terminal that is gone
                    sys.stderr.write(f"interrupted: {words or _what_is_written()}\n")
                numbers = [number for number, kind in INTERRUPTIONS.items() if type(e) is kind]
                raise SystemExit(128 + (numbers or [_came or signal.SIGINT])[0]) from e
            finally:
                _deaf_until = math.inf
                clean_up()
    finally:
        _running -= 1
        _deaf_until = 0.0


def _what_is_written() -> str:
    *others, last = [str(path) for path in dict.fromkeys(written)] or ["nothing"]
    if others:
        return f"{', '.join(others)} and {last} are written"
    return f"{last} is written" if written else "nothing was written"
