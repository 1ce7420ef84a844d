"""The file that `sweep` writes and `report` reads: reduced checkpoints by method, width and calibration seed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from pruning.errors import PruningError
from pruning.views import change

KIND = "pruning_table"
UNFINISHED = "unfinished_pruning_table"
"""The kind of the file that an interrupted sweep leaves."""
FORMAT = 1
PER_LAYER = ", per layer"
"""What the rows of budgets per layer have behind the method's name."""


@dataclass(frozen=True)
class Dense:
    """The unpruned model of a table."""

    d_k: list[int]
    state_bytes: int
    perplexity: float
    tokens: int
    """Held-out tokens that all perplexities of the table are of."""


@dataclass(frozen=True)
class Cell:
    """One reduced checkpoint of a table: one row, column and seed."""

    row: str
    column: int
    """The uniform width whose state the checkpoint may hold."""
    method: str
    seed: int
    d_k: list[int]
    state_bytes: int
    perplexity: float
    kl: float
    """Mean KL(dense || reduced), in nats per token."""
    top1_agreement: float
    recovered: float | None = None
    """Perplexity after recovery; None where there was none."""
    exchanges: int | None = None
    """`Selection.exchanges`."""


@dataclass(frozen=True)
class Curves:
    """Measured error curves of one method and seed."""

    method: str
    seed: int
    loss_rise: list[dict[int, float]]
    """Nats per token by width, for each linear-attention layer in order."""
    layers: list[int] | None = None
    """Indices of these layers; None for the first ones."""


@dataclass(frozen=True)
class Control:
    """The dense model, trained on the tokens that the reduced ones of a seed were recovered with."""

    seed: int
    perplexity: float


@dataclass(frozen=True)
class Table:
    """What `lowkey-prune sweep` writes."""

    kind: str
    format: int
    checkpoint: str
    sha256: str
    device: str
    kl_tokens: int
    """Held-out tokens on which reduced models are compared with the dense one."""
    dense: Dense
    reduced: list[Cell]
    curves: list[Curves]
    controls: list[Control] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """All that the figures depend on beside the checkpoint and the device."""


def read_unfinished(path: Path) -> Table:
    """What an interrupted sweep left. Raises PruningError if it is something else."""
    try:
        table = msgspec.json.decode(path.read_bytes(), type=Table)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise PruningError(f"{path} is not what an interrupted sweep leaves: {e}") from e
    if (table.kind, table.format) != (UNFINISHED, FORMAT):
        raise PruningError(f"{path} is not what an interrupted sweep leaves: its kind is {table.kind!r}")
    return table


def groups(table: Table) -> dict[str, dict[int, list[Cell]]]:
    """Row -> column -> the cells of all seeds, in the file's order of rows, columns ascending."""
    found: dict[str, dict[int, list[Cell]]] = {}
    for cell in table.reduced:
        found.setdefault(cell.row, {}).setdefault(cell.column, []).append(cell)
    return {row: dict(sorted(columns.items())) for row, columns in found.items()}


def methods_by_width(table: Table) -> tuple[list[str], list[list[str]]]:
    """Header and rows for people: perplexity as mean and range over the seeds, its change, KL, and after recovery."""
    columns = sorted({cell.column for cell in table.reduced}, reverse=True)
    rows = [
        [row, *(_cell(table, by_column[c]) if c in by_column else "" for c in columns)]
        for row, by_column in groups(table).items()
    ]
    return ["method", *(f"d_k {c}" for c in columns)], rows


def _cell(table: Table, cells: Sequence[Cell]) -> str:
    values = [cell.perplexity for cell in cells]
    spread = f"\n{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else ""
    kl = fmean(cell.kl for cell in cells)
    text = f"{fmean(values):.2f}{spread}\n{change(table.dense.perplexity, fmean(values))}, KL {kl:.4f}"
    recovered = [cell.recovered for cell in cells if cell.recovered is not None]
    if recovered:
        control = fmean(control.perplexity for control in table.controls)
        text += f"\nrecovered {fmean(recovered):.2f}, {change(control, fmean(recovered))} to the control"
    return text
