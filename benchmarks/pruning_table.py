"""Held-out perplexity of every method at several widths, over several calibration seeds, uniform and per layer.

    python benchmarks/pruning_table.py demo/model --json pruning_table.json

Each cell is the mean over seeds, with the range. Behind it are checkpoints that were written, reloaded and evaluated
as `lowkey-prune` does it: 8,192 calibration tokens and 24,576 held-out tokens of the bundled text, on one thread. A
seed draws other calibration text (for `random`, other channels; `l1` depends on neither). Per-layer rows hold no more
state than the uniform width of their column. For the demo model about 5 s a checkpoint, and 2 minutes for the error
curves of each method and seed: half an hour in all.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from modeling.checkpoint import Checkpoint, open_checkpoint, write_json
from pruning.budget import spend, widths_per_layer
from pruning.calibration import Encoder, bundled_text, draw_windows
from pruning.collection import collect
from pruning.criteria import CRITERIA
from pruning.criteria.base import Report
from pruning.evaluation import DEFAULT_TOKENS, evaluation_windows, perplexity
from pruning.gradients import GRADIENTS
from pruning.reduction import Provenance, reduce_checkpoint, versions
from pruning.selection import select, widths_to_keep
from pruning.statistics import Statistics
from pruning.views import change

WIDTHS = (96, 64, 32, 16)
SEEDS = (0, 1, 2)
PER_LAYER = ("drrqr", "loss-aware")

Row = dict[str, Any]


def swaps(report: list[list[Report]]) -> int:
    """Exchanges over all heads, under either of the names that criteria give them."""
    return sum(int(head.get("swaps", head.get("exchanges", 0)) or 0) for layer in report for head in layer)


def measure(
    source: Checkpoint,
    method: str,
    widths: Sequence[int],
    statistics: Statistics,
    seed: int,
    heldout: torch.Tensor,
) -> Row:
    """Write, reload and evaluate one reduced checkpoint."""
    began = time.perf_counter()
    selection = select(source, CRITERIA[method], widths, statistics=statistics, seed=seed)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "reduced"
        spec = reduce_checkpoint(source, selection, Provenance(method, seed, statistics), out)
        result = perplexity(open_checkpoint(out).load(), heldout)
    return {
        "method": method,
        "seed": seed,
        "d_k": list(spec.d_k),
        "state_bytes": spec.state_bytes(),
        "select_s": round(seconds, 3),
        "exchanges": swaps(selection.report),
        **result.as_json(),
    }


def cell(rows: Sequence[Row], dense: float) -> str:
    """Mean and range over the seeds, and the mean's change against the dense model."""
    values = [row["perplexity"] for row in rows]
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})\n{change(dense, fmean(values))}"


def main(
    checkpoint: Annotated[str, typer.Argument(help="Dense checkpoint.")],
    widths: Annotated[
        list[int], typer.Option("--width", help="d_k to keep; may be given several times.")
    ] = list(WIDTHS),  # noqa: B006
    seeds: Annotated[
        list[int], typer.Option("--seed", help="Calibration seed; may be given several times.")
    ] = list(SEEDS),  # noqa: B006
    per_layer: Annotated[
        list[str], typer.Option(help="Method to spend budgets per layer with; may be given several times.")
    ] = list(PER_LAYER),  # noqa: B006
    align: Annotated[int, typer.Option(help="Of the per-layer widths.")] = 8,
    tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = DEFAULT_TOKENS,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
) -> None:
    torch.set_num_threads(1)
    console = Console()
    source = open_checkpoint(checkpoint)
    spec = source.spec
    encoder = Encoder(source)
    model = source.load()
    heldout = evaluation_windows(encoder, bundled_text("heldout"), tokens=tokens)
    dense = perplexity(model, heldout)

    rows: list[Row] = []
    curves: list[dict[str, Any]] = []
    for seed in seeds:
        console.print(f"seed {seed}: calibrating", highlight=False)
        windows, origin = draw_windows(encoder, bundled_text("train"), seed=seed)
        statistics = collect(model, windows, origin, source.sha256, needed=GRADIENTS)
        for method in CRITERIA:
            console.print(f"seed {seed}: {method}", highlight=False)
            for keep in widths:
                row = measure(source, method, widths_to_keep(spec, keep), statistics, seed, heldout)
                rows.append({"row": method, "column": keep, **row})
        for method in per_layer:
            console.print(f"seed {seed}: {method}, per layer", highlight=False)
            limits = {keep: spec.with_d_k(widths_to_keep(spec, keep)).state_bytes() for keep in widths}
            _, budget = spend(
                source,
                CRITERIA[method],
                max(limits.values()),
                align,
                model,
                windows,
                origin,
                statistics=statistics,
                seed=seed,
            )
            curves.append({"method": method, "seed": seed, **budget.as_json()})
            for keep, limit in limits.items():
                chosen = widths_per_layer(spec, budget.curves, limit)
                row = measure(source, method, chosen, statistics, seed, heldout)
                rows.append({"row": f"{method}, per layer", "column": keep, **row})

    table = Table(
        "method",
        *(f"d_k {keep}" for keep in widths),
        title=f"{checkpoint}: perplexity, dense {dense.perplexity:.2f}; mean and range of {len(seeds)} seeds",
    )
    for name in dict.fromkeys(row["row"] for row in rows):
        groups = [[r for r in rows if (r["row"], r["column"]) == (name, keep)] for keep in widths]
        table.add_row(name, *(cell(group, dense.perplexity) for group in groups))
    console.print(table)
    if json is not None:
        write_json(
            json,
            {
                "checkpoint": checkpoint,
                "sha256": source.sha256,
                "versions": versions(),
                "dense": {"state_bytes": spec.state_bytes(), **dense.as_json()},
                "reduced": rows,
                "curves": curves,
            },
        )


if __name__ == "__main__":
    typer.run(main)
