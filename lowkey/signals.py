"""Ctrl-C, SIGTERM and SIGHUP: they end a command with a line and an exit code, once nothing half-written is left."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class Terminated(KeyboardInterrupt):
    """SIGTERM came, which ends work as Ctrl-C does; only the exit code differs."""


class HungUp(KeyboardInterrupt):
    """SIGHUP came, likewise: the terminal is gone."""


INTERRUPTIONS: dict[int, type[KeyboardInterrupt]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
    signal.SIGHUP: HungUp,
}
"""The signals that end work, and the exceptions that they are turned into."""


@contextmanager
def handled_by(handler: Handler | signal.Handlers) -> Iterator[None]:
    """The signals of `INTERRUPTIONS` call `handler` in the block, but for SIGHUP where it is ignored, as after `nohup`.
    In a thread that is not the main one nothing changes: signals are not delivered there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [n for n in INTERRUPTIONS if not (ignored and n == signal.SIGHUP)]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts off these signals to the end of the block: for steps of which none may be left out."""
    came: list[int] = []
    try:
        with handled_by(lambda number, frame: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextmanager
def ending_on_signals(clean_up: Callable[[], object]) -> Iterator[None]:
    """For a whole command: these signals end the process with a line that says what is left, and with exit code 130
    (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP).

    Args:
        clean_up: called at the end of the block in any case, with signals ignored. It removes what a signal kept from
            being removed by ordinary means, because it came while they were at work.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise INTERRUPTIONS[number]

    try:
        with handled_by(stop):
            yield
    except KeyboardInterrupt as e:
        with suppress(OSError):  # a terminal that is gone
            sys.stderr.write(f"interrupted: {str(e) or 'nothing was written'}\n")
        raise SystemExit(128 + next(n for n, kind in INTERRUPTIONS.items() if type(e) is kind)) from e
    finally:
        with handled_by(signal.SIG_IGN):
            clean_up()
