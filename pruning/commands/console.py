"""Where commands write: results to standard output, everything else to standard error.

Strings are shown as they are: paths, names and messages may hold square brackets, which markup would swallow. What is
to be bold is built as `rich.text.Text`.
"""

from rich.console import Console

out_console = Console(markup=False, emoji=False, highlight=False)
err_console = Console(markup=False, emoji=False, highlight=False, stderr=True)
