"""Held-out perplexity of every method at several widths, from one calibration pass.

    python benchmarks/pruning_table.py demo/model --json pruning_table.json

Each cell is a checkpoint that was written, reloaded and evaluated as `lowkey-prune` does it: 8,192 calibration tokens
and 24,576 held-out tokens of the bundled text, on one thread. About 7 s a cell for the demo model.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from modeling.checkpoint import open_checkpoint, write_json
from pruning.calibration import Encoder, bundled_text, draw_windows
from pruning.criteria import CRITERIA
from pruning.criteria.base import Report
from pruning.evaluation import DEFAULT_TOKENS, evaluation_windows, perplexity
from pruning.progress import tokens_bar
from pruning.reduction import Provenance, reduce_checkpoint, versions
from pruning.selection import select, widths_to_keep
from pruning.statistics import collect
from pruning.views import change

WIDTHS = (96, 64, 32, 16)


def swaps(report: list[list[Report]]) -> int:
    """Exchanges over all heads, under either of the names that criteria give them."""
    return sum(int(head.get("swaps", head.get("exchanges", 0)) or 0) for layer in report for head in layer)


def main(
    checkpoint: Annotated[str, typer.Argument(help="Dense checkpoint.")],
    widths: Annotated[
        list[int], typer.Option("--width", help="d_k to keep; may be given several times.")
    ] = list(WIDTHS),  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = DEFAULT_TOKENS,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
) -> None:
    torch.set_num_threads(1)
    console = Console()
    source = open_checkpoint(checkpoint)
    encoder = Encoder(source)
    model = source.load()
    windows, origin = draw_windows(encoder, bundled_text("train"), seed=seed)
    statistics = collect(model, windows, origin, source.sha256)
    heldout = evaluation_windows(encoder, bundled_text("heldout"), tokens=tokens)
    dense = perplexity(model, heldout)

    rows: list[dict[str, object]] = []
    table = Table(
        "d_k", "state bytes", *CRITERIA, title=f"{checkpoint}: perplexity, dense {dense.perplexity:.3f}"
    )
    with tokens_bar(console, "evaluating", heldout[:, 1:].numel() * len(widths) * len(CRITERIA)) as advance:
        for keep in widths:
            cells: list[str] = []
            for method, criterion in CRITERIA.items():
                began = time.perf_counter()
                selection = select(
                    source, criterion, widths_to_keep(source.spec, keep), statistics=statistics, seed=seed
                )
                seconds = time.perf_counter() - began
                with tempfile.TemporaryDirectory() as scratch:
                    out = Path(scratch) / "reduced"
                    spec = reduce_checkpoint(source, selection, Provenance(method, seed, statistics), out)
                    result = perplexity(open_checkpoint(out).load(), heldout, advance=advance)
                cells.append(f"{result.perplexity:.3f}\n{change(dense.perplexity, result.perplexity)}")
                rows.append(
                    {
                        "method": method,
                        "d_k": keep,
                        "state_bytes": spec.state_bytes(),
                        "select_s": round(seconds, 3),
                        "exchanges": swaps(selection.report),
                        **result.as_json(),
                    }
                )
            table.add_row(str(keep), f"{spec.state_bytes():,}", *cells)
    console.print(table)
    if json is not None:
        write_json(
            json,
            {
                "checkpoint": checkpoint,
                "sha256": source.sha256,
                "calibration": origin.as_json(),
                "versions": versions(),
                "dense": {"state_bytes": source.spec.state_bytes(), **dense.as_json()},
                "reduced": rows,
            },
        )


if __name__ == "__main__":
    typer.run(main)
