"""Where commands write: results to standard output, everything else to standard error.

Strings are shown as they are: paths, names and messages may hold square brackets, which markup would swallow. What is
to be bold is built as `rich.text.Text`.
"""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from lowkey.words import writable


class _Console(Console):
    """Shows what checkpoints and other files say, so nothing in it may steer the terminal or fail to be written."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=writable(segment.text))


out_console = _Console(markup=False, emoji=False, highlight=False)
err_console = _Console(markup=False, emoji=False, highlight=False, stderr=True)
