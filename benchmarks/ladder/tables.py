"""Tables of one model's results, in Markdown, from what ladder.py wrote.

python benchmarks/ladder/tables.py OUT
python benchmarks/ladder/tables.py benchmarks/results/ladder/gdn-130m
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import msgspec
import typer

from pruning.evaluation.identifiers import IdentifierRecall
from pruning.evaluation.record import EvaluatedCheckpoint, read_evaluation
from pruning.table import Cell, Table, groups


def row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, or nothing where there is no row."""
    return (
        "\n".join([row(head), row(["---"] * len(head)), *map(row, rows)]) if rows else "nothing was measured"
    )


def rise(base: float, values: Sequence[float]) -> str:
    """The change of perplexities from `base` in percent: the mean, and the range where there are several."""
    changes = [100 * (value / base - 1) for value in values]
    spread = f" ({min(changes):+.2f} to {max(changes):+.2f})" if len(changes) > 1 else ""
    return f"{fmean(changes):+.2f} %{spread}"


def sweeps(folder: Path, names: Sequence[str]) -> list[Table]:
    """Sweeps that are there; one that was cut short counts as far as it came."""
    files = [f for name in names for f in (folder / name, folder / f"{name}.partial") if f.exists()]
    return [msgspec.json.decode(file.read_bytes(), type=Table) for file in files]


def methods(folder: Path) -> str:
    """Method by width: the rise in perplexity, over all calibration seeds."""
    found = sweeps(folder, ["methods.json", "methods-seeds.json", "methods-per-layer.json"])
    cells: dict[str, dict[int, dict[int, Cell]]] = {}
    for one in found:
        for name, columns in groups(one).items():
            for column, own in columns.items():
                cells.setdefault(name, {}).setdefault(column, {}).update({cell.seed: cell for cell in own})
    if not found:
        return "nothing was measured"
    dense = found[0].dense.perplexity
    columns = sorted({column for own in cells.values() for column in own}, reverse=True)

    def cell(own: dict[int, Cell]) -> str:
        kl = fmean(c.kl for c in own.values())
        return f"{rise(dense, [c.perplexity for c in own.values()])}, KL {kl:.4f}"

    rows = [
        [f"`{name}`", *(cell(own[c]) if c in own else "" for c in columns)] for name, own in cells.items()
    ]
    return f"dense {dense:.3f} on {found[0].dense.tokens:,} tokens\n\n" + table(["method", *columns], rows)


def calibration(folder: Path) -> str:
    """Perplexity by the number of calibration tokens, over all calibration seeds."""
    found = {file.name.split(".")[0] for file in folder.glob("calibration-*.json*")}
    by_tokens = {int(name.removeprefix("calibration-")): sweeps(folder, [f"{name}.json"]) for name in found}
    measured = [
        (tokens, one, name, columns)
        for tokens, tables in sorted(by_tokens.items())
        for one in tables
        for name, columns in groups(one).items()
    ]
    widths = sorted({width for *_, columns in measured for width in columns}, reverse=True)
    rows = []
    for tokens, one, name, columns in measured:
        own = [[cell.perplexity for cell in columns.get(width, ())] for width in widths]
        rows.append(
            [
                f"{tokens:,}",
                f"`{name}`",
                *(rise(one.dense.perplexity, values) if values else "" for values in own),
            ]
        )
    return table(["tokens", "method", *widths], rows)


def evaluated(file: Path) -> list[EvaluatedCheckpoint]:
    return read_evaluation(file).checkpoints if file.exists() else []


def plus_minus(word: IdentifierRecall) -> str:
    exact, drop = word.figures.exact, word.drop
    text = f"{100 * exact.mean:.1f} %"
    return text if drop is None else f"{text} ({-100 * drop.exact.mean:+z.2f}{drop.exact.error('.2f', 100)})"


def checkpoints(file: Path) -> str:
    """Perplexity, divergence and recall of identifiers of an evaluation."""
    found = evaluated(file)
    rows, head = [], ["checkpoint", "state bytes", "perplexity", "KL", "agreement"]
    for one in found:
        assert one.perplexity is not None
        change = (
            rise(found[0].perplexity.perplexity, [one.perplexity.perplexity]) if found[0].perplexity else ""
        )
        kl = (
            ["", ""]
            if one.divergence is None
            else [f"{one.divergence.kl:.4f}", f"{one.divergence.top1_agreement:.1%}"]
        )
        words = one.identifiers or []
        name = Path(one.name).name
        rows.append(
            [
                name,
                f"{one.state_bytes:,}",
                f"{one.perplexity.perplexity:.3f} ({change})",
                *kl,
                *map(plus_minus, words),
            ]
        )
    if found and found[0].identifiers:
        head += [f"{w.begin} to {w.end - 1} tokens ago" for w in found[0].identifiers]
    return table(head, rows)


def bits(folder: Path) -> str:
    """Channels against bits: perplexity, KL and recall by the dtype of the states."""
    rows: dict[tuple[str, str], list[object]] = {}
    base: float | None = None
    for file in sorted(folder.glob("bits-*.json")):
        for one in evaluated(file):
            for b in one.bits or []:
                base = b.perplexity.perplexity if base is None else base
                rise_ = (
                    ""
                    if b.loss_rise is None
                    else f"{100 * b.loss_rise.mean:+.3f} %{b.loss_rise.error('.3f', 100)}"
                )
                kl = "" if b.divergence is None else f"{b.divergence.kl:.4f}"
                recalled = [plus_minus(word) for word in b.identifiers or []]
                last = b.drift.octaves[-1]
                drift = "" if last.kl is None else f"{1000 * last.kl.mean:.2f}{last.kl.error('.2f', 1000)}"
                rows[Path(one.name).name, b.state_dtype] = [
                    f"{b.state_bytes:,}",
                    rise(base, [b.perplexity.perplexity]),
                    rise_,
                    kl,
                    drift,
                    *recalled,
                ]
    head = ["checkpoint", "states", "bytes", "perplexity", "rounding", "KL", "drift"]
    width = max((len(cells) for cells in rows.values()), default=0) + 2
    head += ["identifiers"] * (width - len(head))
    return table(head, [[*key, *cells] for key, cells in rows.items()])


def ranks(file: Path) -> str:
    """Rank utilisation along the window, by layer: the mean over heads."""
    rows = []
    positions: list[int] = []
    for one in evaluated(file):
        if one.rank is not None:
            positions = one.rank.positions
            by_layer = [[fmean(heads) for heads in layer] for layer in one.rank.utilisation]
            means = [fmean(layer[i] for layer in by_layer) for i in range(len(positions))]
            last = sorted(layer[-1] for layer in by_layer)
            rows.append(
                [Path(one.name).name, *(f"{m:.2%}" for m in means), f"{last[0]:.2%} to {last[-1]:.2%}"]
            )
    return table(["checkpoint", *(f"after {p}" for p in positions), "layers, at the end"], rows)


def noise(file: Path) -> str:
    """How noise on a query changes a read: the median over tokens, the mean over layers and heads."""
    rows, levels = [], []
    for one in evaluated(file):
        if one.retrieval is not None:
            levels = one.retrieval.noise
            errors = one.retrieval.read_error
            means = [fmean(fmean(layer[i]) for layer in errors) for i in range(len(levels))]
            rows.append([Path(one.name).name, *(f"{m:.3f}" for m in means)])
    return table(["checkpoint", *(f"noise {level}" for level in levels)], rows)


def sections(folder: Path) -> Iterator[str]:
    # ladder.py has it beside the checkpoint; results that are kept come without one.
    files = [file for file in (folder / "train.json", folder / "model" / "train.json") if file.exists()]
    if not files:
        raise typer.BadParameter(f"folder={str(folder)!r} has no train.json and no model/train.json")
    trained = json.loads(files[0].read_bytes())
    yield f"# {trained['model']}"
    yield json.dumps({k: v for k, v in trained.items() if k != "curve"}, indent=1)
    yield f"## Methods\n\n{methods(folder)}"
    yield f"## Calibration tokens\n\n{calibration(folder)}"
    yield f"## Checkpoints\n\n{checkpoints(folder / 'evaluation.json')}"
    yield f"## Bits\n\n{bits(folder)}"
    for file in sorted(folder.glob("recovered-*.json")):
        yield f"## {file.stem}\n\n{checkpoints(file)}"
    yield f"## Rank\n\n{ranks(folder / 'states.json')}"
    yield f"## Noise\n\n{noise(folder / 'states.json')}"


def main(folder: Annotated[Path, typer.Argument(help="Results of one model.")]) -> None:
    """Print the tables of one model."""
    for section in sections(folder):
        sys.stdout.write(f"{section}\n\n")


if __name__ == "__main__":
    typer.run(main)
