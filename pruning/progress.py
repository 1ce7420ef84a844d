"""Progress of long work: a bar on a terminal, nothing elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Advance = Callable[[int], None]
"""Called with the number of tokens done since the last call."""


def no_progress(tokens: int) -> None:
    """For callers that show nothing."""


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} tokens/s" if speed else "", style="progress.data.speed")


@contextmanager
def tokens_bar(console: Console, description: str, total: int) -> Iterator[Advance]:
    """A bar over `total` tokens with tokens/s and the time that is left."""
    with _bar(console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda tokens: progress.update(task, advance=tokens)


@contextmanager
def training_bar(
    console: Console, description: str, total: int, *, done: int = 0
) -> Iterator[Callable[[int, float], None]]:
    """`tokens_bar` with the loss of the last step, for a run of which `done` tokens lie behind."""
    with _bar(console) as progress:
        task = progress.add_task(description, total=total, completed=done)

        def step(tokens: int, loss: float) -> None:
            progress.update(task, advance=tokens, description=f"{description}, loss {loss:.3f}")

        yield step


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,} tokens"),
        _TokensPerSecond(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
