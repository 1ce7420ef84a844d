"""Where commands write: results to standard output, everything else to standard error."""

from rich.console import Console

out_console = Console()
err_console = Console(stderr=True)
