"""Held-out perplexity and KL of every method at several widths, over several calibration seeds, uniform and per layer.

    python benchmarks/pruning_table.py demo/model --json pruning_table.json
    python benchmarks/pruning_table.py demo/model --device cuda --json pruning_table.json

Each cell is the mean over seeds, with the range. Behind it are checkpoints that were written, reloaded and evaluated
as `lowkey-prune` does it: 8,192 calibration tokens and 24,576 held-out tokens of the bundled text, KL and agreement
with the dense model on the first 8,192 of them. A seed draws other calibration text (for `random`, other channels;
`l1` depends on neither). Per-layer rows hold no more state than the uniform width of their column. On one CPU thread
the demo model takes about 8 s a checkpoint, and 2 minutes for the error curves of each method and seed.
`lowkey-prune report` draws the JSON file.
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
from outputs import figures_file, write_figures
from rich.console import Console
from rich.table import Table

from lowkey.publishing import remove_working_directories
from lowkey.signals import ending_on_signals
from modeling.checkpoint import Checkpoint, open_checkpoint
from modeling.model import Model
from pruning.budget import spend, widths_per_layer
from pruning.calibration import WINDOW, Encoder, bundled_text, draw_windows
from pruning.collection import collect
from pruning.criteria import CRITERIA, criterion_named
from pruning.criteria.base import Report
from pruning.evaluation import DEFAULT_TOKENS, compare, evaluation_windows, perplexity
from pruning.options import device_named
from pruning.reduction import Provenance, reduce_checkpoint
from pruning.selection import select, widths_to_keep
from pruning.statistics import Statistics
from pruning.versions import versions
from pruning.views import change

WIDTHS = (96, 64, 32, 16)
SEEDS = (0, 1, 2)
PER_LAYER = ("drrqr", "loss-aware")
KL_TOKENS = 8192
FORMAT = 1

Row = dict[str, Any]


def swaps(report: list[list[Report]]) -> int:
    """Exchanges over all heads, under either of the names that criteria give them."""
    return sum(int(head.get("swaps", head.get("exchanges", 0)) or 0) for layer in report for head in layer)


def measure(
    source: Checkpoint,
    dense: Model,
    method: str,
    widths: Sequence[int],
    statistics: Statistics,
    seed: int,
    heldout: torch.Tensor,
    compared: int,
) -> Row:
    """Write, reload and evaluate one reduced checkpoint; compare it with `dense` on the first `compared` windows."""
    began = time.perf_counter()
    selection = select(source, CRITERIA[method], widths, statistics=statistics, seed=seed)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "reduced"
        spec = reduce_checkpoint(source, selection, Provenance(method, seed, statistics), out)
        model = open_checkpoint(out).load(device=dense.embeddings.weight.device)
    result = perplexity(model, heldout)
    _, divergence = compare(model, dense, heldout[:compared])
    return {
        "method": method,
        "seed": seed,
        "d_k": list(spec.d_k),
        "state_bytes": spec.state_bytes(),
        "select_s": round(seconds, 3),
        "exchanges": swaps(selection.report),
        **result.as_json(),
        "kl": divergence.kl,
        "top1_agreement": divergence.top1_agreement,
    }


def cell(rows: Sequence[Row], dense: float) -> str:
    """Mean and range over the seeds, the mean's change against the dense model, and the mean KL."""
    values = [row["perplexity"] for row in rows]
    kl = fmean(row["kl"] for row in rows)
    return (
        f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})\n"
        f"{change(dense, fmean(values))}, KL {kl:.4f}"
    )


@ending_on_signals(remove_working_directories)
def main(
    checkpoint: Annotated[str, typer.Argument(help="Dense checkpoint.")],
    widths: Annotated[
        list[int], typer.Option("--width", help="d_k to keep; may be given several times.")
    ] = list(WIDTHS),  # noqa: B006
    seeds: Annotated[
        list[int], typer.Option("--seed", help="Calibration seed; may be given several times.")
    ] = list(SEEDS),  # noqa: B006
    methods: Annotated[
        list[str], typer.Option("--method", help="Method; may be given several times.")
    ] = list(CRITERIA),  # noqa: B006
    per_layer: Annotated[
        list[str], typer.Option(help="Method to spend budgets per layer with; may be given several times.")
    ] = list(PER_LAYER),  # noqa: B006
    align: Annotated[int, typer.Option(help="Of the per-layer widths.")] = 8,
    tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = DEFAULT_TOKENS,
    kl_tokens: Annotated[int, typer.Option(help="Of them, compared with the dense model.")] = KL_TOKENS,
    device: Annotated[str, typer.Option(help="Where models run: cpu, cuda or cuda:N.")] = "cpu",
    json: Annotated[
        Path | None, typer.Option(parser=figures_file, metavar="FILE", help="Also write the figures here.")
    ] = None,
) -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    console = Console()
    source = open_checkpoint(checkpoint)
    spec = source.spec
    encoder = Encoder(source)
    model = source.load(device=device_named(device))
    heldout = evaluation_windows(encoder, bundled_text("heldout"), tokens=tokens)
    compared = max(kl_tokens // WINDOW, 1)
    train = bundled_text("train")
    needed = {name for method in (*methods, *per_layer) for name in criterion_named(method).statistics}
    dense = perplexity(model, heldout)

    rows: list[Row] = []
    curves: list[dict[str, Any]] = []

    def progress(seed: int, what: str) -> None:
        console.print(f"{time.perf_counter() - began:5.0f} s  seed {seed}: {what}", highlight=False)

    for seed in seeds:
        progress(seed, "calibrating")
        windows, origin = draw_windows(encoder, train, seed=seed)
        statistics = collect(model, windows, origin, source.sha256, needed=needed)

        def add(name: str, column: int, method: str, chosen: Sequence[int]) -> None:
            row = measure(source, model, method, chosen, statistics, seed, heldout, compared)  # noqa: B023
            rows.append({"row": name, "column": column, **row})

        for method in methods:
            progress(seed, method)
            for keep in widths:
                add(method, keep, method, widths_to_keep(spec, keep))
        for method in per_layer:
            progress(seed, f"{method}, per layer")
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
                add(f"{method}, per layer", keep, method, widths_per_layer(spec, budget.curves, limit))

    table = Table(
        "method",
        *(f"d_k {keep}" for keep in widths),
        title=f"{checkpoint}: perplexity, dense {dense.perplexity:.2f}; mean and range of {len(seeds)} seeds",
    )
    for name in dict.fromkeys(row["row"] for row in rows):
        groups = [[r for r in rows if (r["row"], r["column"]) == (name, keep)] for keep in widths]
        table.add_row(name, *(cell(group, dense.perplexity) for group in groups))
    console.print(table)
    write_figures(
        json,
        {
            "kind": "pruning_table",
            "format": FORMAT,
            "checkpoint": checkpoint,
            "sha256": source.sha256,
            "versions": versions(),
            "device": device,
            "seconds": round(time.perf_counter() - began, 1),
            "kl_tokens": compared * WINDOW,
            "dense": {
                "d_k": list(spec.d_k),
                "state_bytes": spec.state_bytes(),
                **dense.as_json(),
            },
            "reduced": rows,
            "curves": curves,
        },
    )


if __name__ == "__main__":
    typer.run(main)
