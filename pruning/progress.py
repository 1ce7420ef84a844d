"""Progress of long work: a bar on a terminal, elsewhere a line every ten seconds."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from lowkey.words import counted, duration

EVERY = 10.0
"""Seconds between two lines."""

Advance = Callable[[int], None]
"""Called with the number of tokens done since the last call."""


Bar = Callable[[str, int], AbstractContextManager[Advance]]
"""`bar(description, total)` shows how far work on `total` tokens has come while its block runs."""


def no_progress(tokens: int) -> None:
    """An `Advance` for callers that show nothing."""


class Meter:
    """How far work has come, in words.

    Args:
        total: tokens; None for work that counts nothing.
        done: tokens that lie behind already and say nothing about the speed.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        *,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description = description
        self._total, self._first, self._done = total, done, done
        self._clock, self._began = clock, clock()

    def advance(self, tokens: int) -> None:
        self._done += tokens

    def line(self) -> str:
        """A line such as `calibrating: 4,096 of 8,192 tokens, 512 tokens/s, about 8 s left`."""
        seconds = self._clock() - self._began
        if self._total is None:
            return f"{self.description}: {duration(seconds)} so far"
        line = f"{self.description}: {self._done:,} of {counted(self._total, 'token')}"
        speed = (self._done - self._first) / seconds if seconds > 0 else 0
        if not speed:
            return f"{line}, {duration(seconds)} so far"
        return f"{line}, {speed:,.0f} tokens/s, about {duration((self._total - self._done) / speed)} left"


class Busy:
    """Work that counts nothing: a spinner on a terminal, elsewhere lines. A context manager."""

    def __init__(self, console: Console, what: str) -> None:
        self._status = Status(Text(what), console=console) if console.is_terminal else None
        self._meter = Meter(what)
        self._lines = _Lines(console, self._meter)

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        else:
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def say(self, what: str) -> None:
        """Show another text from here on."""
        self._meter.description = what
        if self._status is not None:
            self._status.update(Text(what))

    def stop(self) -> None:
        """Show no more: a terminal has room for one bar."""
        if self._status is not None:
            self._status.stop()
        self._lines.stop()


@contextmanager
def tokens_bar(console: Console, description: str, total: int) -> Iterator[Advance]:
    """A bar over `total` tokens with tokens/s and the time that is left."""
    with training_bar(console, description, total) as step:
        yield lambda tokens: step(tokens, None)


@contextmanager
def training_bar(
    console: Console, description: str, total: int, *, done: int = 0
) -> Iterator[Callable[[int, float | None], None]]:
    """`tokens_bar` with the loss of the last step, for a run of which `done` tokens lie behind."""
    meter = Meter(description, total, done=done)
    bar = _bar(console)
    lines = _Lines(console, meter)

    def step(tokens: int, loss: float | None) -> None:
        said = description if loss is None else f"{description}, loss {loss:.3f}"
        meter.advance(tokens)
        meter.description = said
        bar.update(task, advance=tokens, description=said)

    with bar:
        task = bar.add_task(description, total=total, completed=done)
        if not console.is_terminal:
            lines.start()
        try:
            yield step
        finally:
            lines.stop()


class _Lines:
    """Prints a meter's line again and again from a thread of its own: a step may take longer than is good to wait."""

    def __init__(self, console: Console, meter: Meter) -> None:
        self._console, self._meter = console, meter
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            self._console.print(Text(self._meter.line()), soft_wrap=True)


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} tokens/s" if speed else "", style="progress.data.speed")


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,} tokens"),
        _TokensPerSecond(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
