"""What recovery takes back: perplexity pruned and recovered, against the dense model trained on the same tokens.

    python benchmarks/recovery_table.py demo/model --device cuda --json recovery.json
    python benchmarks/recovery_table.py demo/model --tokens 100000 --width 32 --method loss-aware --no-whole

For every method, uniform and per layer, and every width: prune, recover, evaluate; and once the control. Prints a table
and writes JSON (curves included) after every run.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
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
from pruning.calibration import Encoder, bundled_text, draw_windows
from pruning.collection import collect
from pruning.criteria import CRITERIA
from pruning.evaluation import DEFAULT_TOKENS, evaluation_windows, perplexity
from pruning.gradients import GRADIENTS
from pruning.options import device_named
from pruning.progress import training_bar
from pruning.recovery import Run, plan, recover
from pruning.reduction import Provenance, reduce_checkpoint
from pruning.selection import select, widths_to_keep
from pruning.training import Settings
from pruning.versions import versions
from pruning.views import change, width

Row = dict[str, Any]


def reduce_all(
    source: Checkpoint,
    methods: list[str],
    widths: list[int],
    align: int,
    seed: int,
    device: torch.device,
    folder: Path,
    console: Console,
) -> list[Row]:
    """Reduced checkpoints under `folder`, for every method and width, uniform and per layer."""
    model = source.load(device=device)
    windows, origin = draw_windows(Encoder(source), bundled_text("train"), seed=seed)
    console.print("calibrating", highlight=False)
    statistics = collect(model, windows, origin, source.sha256, needed=GRADIENTS)
    rows: list[Row] = []
    for method in methods:
        criterion = CRITERIA[method]
        console.print(f"{method}: measuring each layer", highlight=False)
        uniform = {keep: widths_to_keep(source.spec, keep) for keep in widths}
        limits = {keep: source.spec.with_d_k(chosen).state_bytes() for keep, chosen in uniform.items()}
        _, budget = spend(
            source,
            criterion,
            max(limits.values()),
            align,
            model,
            windows,
            origin,
            statistics=statistics,
            seed=seed,
        )
        for keep, limit in limits.items():
            layered = widths_per_layer(source.spec, budget.curves, limit)
            spent = replace(budget, state_bytes=limit)
            for kind, chosen, used in (("uniform", uniform[keep], None), ("per layer", layered, spent)):
                out = folder / f"{method}-{kind.replace(' ', '-')}-{keep}"
                selection = select(source, criterion, chosen, statistics=statistics, seed=seed)
                spec = reduce_checkpoint(source, selection, Provenance(method, seed, statistics, used), out)
                rows.append(
                    {
                        "method": method,
                        "budget": kind,
                        "mean_d_k": keep,
                        "d_k": list(spec.d_k),
                        "state_bytes": spec.state_bytes(),
                        "path": out,
                    }
                )
    return rows


@ending_on_signals(remove_working_directories)
def main(
    checkpoint: Annotated[str, typer.Argument(help="Dense checkpoint.")],
    methods: Annotated[list[str], typer.Option("--method", help="May be given several times.")] = [  # noqa: B006
        "drrqr",
        "loss-aware",
    ],
    widths: Annotated[list[int], typer.Option("--width", help="Mean d_k; may be given several times.")] = [  # noqa: B006
        64,
        32,
    ],
    align: Annotated[int, typer.Option(help="Of the per-layer widths.")] = 8,
    tokens: Annotated[int, typer.Option(help="Training tokens of each run.")] = 4_000_000,
    train: Annotated[str, typer.Option(help="As in `lowkey-prune recover`.")] = Settings.train,
    lr: Annotated[float, typer.Option(help="As in `lowkey-prune recover`.")] = Settings.lr,
    batch: Annotated[int, typer.Option(help="Windows of 512 tokens per step.")] = 16,
    ce_weight: Annotated[float, typer.Option()] = Settings.ce_weight,
    kl_weight: Annotated[float, typer.Option()] = Settings.kl_weight,
    seed: Annotated[int, typer.Option(help="Of calibration and of recovery.")] = 0,
    evaluations: Annotated[int, typer.Option(help="Points of each curve.")] = Settings.evaluations,
    whole: Annotated[bool, typer.Option(help="Also evaluate on all held-out tokens.")] = True,
    device: Annotated[str, typer.Option()] = "cpu",
    checkpoints: Annotated[Path | None, typer.Option(help="Keep the checkpoints here.")] = None,
    json: Annotated[Path, typer.Option(parser=figures_file, metavar="FILE", help="File to write.")] = Path(
        "recovery_table.json"
    ),
) -> None:
    began = time.perf_counter()
    target = device_named(device)
    console = Console()
    source = open_checkpoint(checkpoint)
    settings = Settings(
        tokens=tokens,
        train=train,
        lr=lr,
        batch=batch,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        seed=seed,
        evaluations=evaluations,
    )
    heldout_text = bundled_text("heldout")
    console.print("reading text", highlight=False)
    sets = {"first": evaluation_windows(Encoder(source), heldout_text, tokens=DEFAULT_TOKENS)}
    if whole:
        sets["whole"] = evaluation_windows(Encoder(source), heldout_text)

    def evaluate(model: Model) -> Row:
        size = 4 if target.type == "cpu" else 32
        return {name: perplexity(model, rows, batch=size).as_json() for name, rows in sets.items()}

    def train_one(run: Run, name: str) -> Row:
        started = time.perf_counter()
        with training_bar(console, name, settings.steps * settings.tokens_per_step) as on_step:
            record = recover(run, target, on_step=on_step)
        seconds = time.perf_counter() - started
        after = evaluate(open_checkpoint(run.out).load(device=target))
        console.print(
            f"{name}: perplexity {after['first']['perplexity']:.3f}, {record['tokens'] / seconds:,.0f} tokens/s, "
            f"{time.perf_counter() - began:.0f} s since the start",
            highlight=False,
        )
        return {"recovered": after, "seconds": round(seconds, 1), "recovery": record}

    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoints or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = reduce_all(source, methods, widths, align, seed, target, folder, console)
        console.print(f"reduced, {time.perf_counter() - began:.0f} s since the start", highlight=False)
        first = open_checkpoint(rows[0]["path"])
        control = plan(
            source,
            first,
            folder / "control",
            settings,
            bundled_text("train"),
            heldout_text,
            control=True,
        )
        report: Row = {
            "checkpoint": checkpoint,
            "sha256": source.sha256,
            "device": torch.cuda.get_device_name(target) if target.type == "cuda" else "cpu",
            "settings": asdict(settings),
            "versions": versions(),
            "dense": evaluate(source.load(device=target)),
            "control": train_one(control, "control"),
            "reduced": [],
        }
        for row in rows:
            path = row.pop("path")
            reduced = open_checkpoint(path)
            row["pruned"] = evaluate(reduced.load(device=target))
            run = replace(
                control, reduced=reduced, out=path.with_name(f"{path.name}-recovered"), control=False
            )
            row |= train_one(run, path.name)
            report["reduced"].append(row)
            write_figures(json, report)
    for name in sets:
        console.print(table(report, name))
    console.print(f"{json}, {time.perf_counter() - began:.0f} s in all", highlight=False)


def table(report: Row, name: str) -> Table:
    dense, control = (
        report["dense"][name]["perplexity"],
        report["control"]["recovered"][name]["perplexity"],
    )
    trained = report["control"]["recovery"]["tokens"]
    view = Table(
        title=f"perplexity on {report['dense'][name]['tokens']:,} held-out tokens: dense {dense:.3f}, "
        f"control {control:.3f} after {trained:,} tokens"
    )
    for column in ("method", "d_k", "pruned", "to dense", "recovered", "to dense", "to control"):
        view.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in report["reduced"]:
        pruned, recovered = (row[key][name]["perplexity"] for key in ("pruned", "recovered"))
        view.add_row(
            f"{row['method']}, {row['budget']}",
            width(row["d_k"]),
            f"{pruned:.3f}",
            change(dense, pruned),
            f"{recovered:.3f}",
            change(dense, recovered),
            change(control, recovered),
        )
    return view


if __name__ == "__main__":
    typer.run(main)
