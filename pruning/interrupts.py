"""Signals in long work: what is done is saved first, and the user is told how to go on."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lowkey.files import OutputError, OutputTakenError, write_or_keep
from lowkey.signals import handled_by, interrupt, written

logger = logging.getLogger(__name__)

SHARE = 0.1
"""How much of the time may go into saves, which can be of gigabytes."""
NOTICE = b"\nstopping once what is done is saved; once more to stop at once\n"


@contextmanager
def put_off() -> Iterator[Callable[[], int | None]]:
    """Puts off Ctrl-C, SIGTERM and SIGHUP to where work can be saved; what is yielded says which of them came, if any.

    A second one is not put off. In a thread that is not the main one nothing is: signals are not delivered there.
    """
    came: int | None = None

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came is not None:
            interrupt(number)
        came = number
        os.write(2, NOTICE)  # not through a stream, which may be in the middle of a write

    with handled_by(note):
        yield lambda: came


@contextmanager
def saving(file: Path | None, save: Callable[[Path], Any], every: float) -> Iterator[Callable[..., None]]:
    """For long work that can go on from a file. What is yielded is to be called between two steps of the work: it saves
    every so many seconds, and ends the work once one of these signals has come and what is done is saved.

    Args:
        file: where to save to; None saves nothing.
        save: writes what is done to the path that it gets. Raises OutputError if it can't.
        every: seconds between two saves; more where saves take so long that above `SHARE` of the time would go into
            them. 0 saves after each step. A save that fails is a warning.

    Raises:
        KeyboardInterrupt: a signal came; `lowkey.signals` has the kinds.
        OutputError: then what is done could not be saved; the message says where it is instead.
    """
    saved_at, pause = time.monotonic(), every

    def step_done(*, last: bool = False) -> None:
        """After the `last` step it saves in any case."""
        nonlocal saved_at, pause
        number = stopped()
        if number is not None:
            if file is not None:
                write_or_keep(file, save)
            interrupt(number)
        began = time.monotonic()
        if file is not None and (last or began - saved_at >= pause):
            try:
                save(file)
            except OutputError as e:  # the end is what counts, and there may be room again by then
                logger.warning("going on unsaved: %s", e)
            saved_at = time.monotonic()
            if every:
                pause = max(every, (saved_at - began) * (1 - SHARE) / SHARE)

    with put_off() as stopped:
        yield step_done


@contextmanager
def left_behind(what: str) -> Iterator[None]:
    """Gives a KeyboardInterrupt of the block the words that the user is told, unless it has some already or a result
    was written by then, which the command's last line names."""
    before = len(written)
    try:
        yield
    except KeyboardInterrupt as e:
        if e.args or len(written) > before:
            raise
        raise type(e)(what) from e


@contextmanager
def going_on_from(saved: Path) -> Iterator[None]:
    """As `left_behind`, for work that saves to a file and then writes its result: says that the same command goes on
    from there. Once the result is written there is nothing to go on with, and the file is removed."""
    before = len(written)
    try:
        yield
    except OutputTakenError:  # the result is whole, though elsewhere
        saved.unlink(missing_ok=True)
        raise
    except KeyboardInterrupt as e:
        if len(written) > before:
            saved.unlink(missing_ok=True)
            raise
        kept = f"the same command goes on from {saved}" if saved.exists() else "nothing was saved"
        raise type(e)(kept) from e
    saved.unlink(missing_ok=True)
