"""`lowkey-prune`: calibrate, merge, prune, recover, evaluate, sweep, inspect, report."""

import errno
import os
import sys
from contextlib import suppress

# Before torch is imported: threads that spin between operations slow down everything else on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperArgument, TyperGroup, TyperOption

from lowkey.cli import Version
from lowkey.files import OutputError
from lowkey.publishing import remove_working_directories
from lowkey.signals import ending_on_signals
from modeling.checkpoint import CheckpointError
from modeling.families import ConfigError
from pruning.commands.calibrate import calibrate
from pruning.commands.console import err_console
from pruning.commands.evaluate import evaluate
from pruning.commands.inspect import inspect
from pruning.commands.merge import merge_files
from pruning.commands.prune import prune
from pruning.commands.recover import recover
from pruning.commands.report import report
from pruning.commands.sweep import sweep
from pruning.errors import PruningError


class Commands(TyperGroup):
    """Turns the errors that a user can mend into one line and exit code 2, and shows help as it is written."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for command in (self, *self.commands.values()):
            command.help = escape(command.help or "")  # rich would take square brackets for markup
            for parameter in command.params:
                if isinstance(parameter, TyperArgument | TyperOption):
                    parameter.help = escape(parameter.help or "")

    def invoke(self, ctx: Any) -> Any:
        with ending_on_signals(remove_working_directories):
            try:
                return super().invoke(ctx)
            except OSError as e:
                if e.errno == errno.EPIPE:  # whoever read the output has seen enough; typer ends quietly
                    raise
                failed = self._failed(e)
                _give_up_output()
                raise failed from e
            except (PruningError, CheckpointError, ConfigError, OutputError) as e:
                raise self._failed(e) from e

    def _failed(self, error: Exception) -> typer.Exit:
        err_console.print(f"error: {error}", style="red", soft_wrap=True)
        return typer.Exit(2)


def _give_up_output() -> None:
    """Let go of what standard output could not take: Python would try it again at its end, and exit with code 120."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def main(version: Version = False) -> None:
    """Make linear-attention checkpoints cheaper to serve by removing key/query channels.

    \b
    lowkey-prune prune     demo/model reduced --method bilinear --keep 64
    lowkey-prune evaluate  demo/model reduced
    lowkey-prune inspect   reduced
    """


app.command()(calibrate)
app.command(name="merge")(merge_files)
app.command()(prune)
app.command()(recover)
app.command()(evaluate)
app.command()(sweep)
app.command()(inspect)
app.command()(report)
