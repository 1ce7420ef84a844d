"""What the terminal shows: the before => after tree and the evaluation table."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from lowkey.words import Judged, counted, judged, writable
from modeling.checkpoint import Checkpoint
from modeling.spec import STATE_DTYPES, ModelSpec, StateDType, StateTypes
from pruning.capacity import LEGEND as CAPACITY_LEGEND
from pruning.capacity import capacity_lines, capacity_table, narrower
from pruning.evaluation.record import EvaluatedCheckpoint, Evaluation
from pruning.evaluation.states import PerHead
from pruning.export import config_changes
from pruning.identifier_cells import IDENTIFIERS_LEGEND, identifier_cells
from pruning.loaders import on_a_card, uneven
from pruning.pareto import BITS_LEGEND, PARETO_LEGEND, bits_cells, pareto_table
from pruning.record import is_masked, record_of


def width(d_k: Sequence[int]) -> str:
    """One number for a model of one d_k, all of them otherwise."""
    return str(d_k[0]) if len(set(d_k)) == 1 else " ".join(str(n) for n in d_k)


def span(d_k: Sequence[int]) -> str:
    """One number for a model of one d_k, else the narrowest and the widest."""
    return width(d_k) if len(set(d_k)) == 1 else f"{min(d_k)} to {max(d_k)}"


def change(before: float, after: float) -> str:
    """A relative change in percent, with its sign. A stranger's file may say that something was 0, which has none."""
    return f"{100 * (after / before - 1):+.1f} %" if before > 0 else "no change from 0 in percent"


def tree(checkpoint: Checkpoint) -> Tree:
    """Shapes of a checkpoint; for a reduced one before => after, and where it came from.

    Raises:
        PruningError: `state_reduction.json` is of another format or broken.
    """
    record = record_of(checkpoint)
    if record is None:
        return shapes(checkpoint.source, checkpoint.spec)
    spec = checkpoint.spec
    root = _root(checkpoint.source, spec)
    source = record["source"]
    if is_masked(record):
        masked = Text.assemble(
            f"d_k {width(spec.d_k)}, kept channels {width(record['d_k'])}: ", ("masked", "bold")
        )
        root.add(masked.append(", the others are zero and take their room: no memory is saved"))
        state = root.add(f"state per request {spec.state_bytes(0):,} bytes, as before")
    else:
        root.add(Text.assemble("d_k ", *arrow(width(source["d_k"]), width(spec.d_k))))
        before, after = source["state_bytes"], spec.state_bytes(0)
        changed = arrow(f"{before:,}", f"{after:,}")
        state = root.add(Text.assemble("state per request ", *changed, f" bytes ({change(before, after)})"))
    _add_narrower(state, spec.with_d_k(tuple(source["d_k"])), spec)
    root.add(_heads(spec))
    if len(set(spec.d_k)) > 1:
        root.add(uneven(spec))
    made = root.add(f"made by {record['method']}, seed {record['seed']}")
    made.add(f"from {source['name']}, sha256 {source['sha256'][:12]}...")
    if record["calibration"] is not None:
        branch = made.add(f"calibrated on {counted(record['calibration']['tokens'], 'token')}")
        for origin in record["calibration"]["origins"]:
            branch.add(_origin(origin))
    if "reconstruction" in record:
        made.add(
            f"its layers fitted to the source's on {counted(record['reconstruction']['tokens'], 'token')}"
        )
    if record["evaluation"] is not None:
        root.add(_measured(record["evaluation"]))
    if "recovery" in record:
        root.add(_recovered(record["recovery"]))
    return root


def shapes(name: str, spec: ModelSpec) -> Tree:
    """What a config alone says of a model that is not reduced. `name` is what the user called it."""
    root = _root(name, spec)
    root.add(f"d_k {width(spec.d_k)}")
    state = root.add(f"state per request {spec.state_bytes(0):,} bytes")
    _add_narrower(state, spec, spec)
    root.add(_heads(spec))
    return root


def _root(name: str, spec: ModelSpec) -> Tree:
    shape = f"  {spec.family}, {counted(len(spec.layers), 'layer')}"
    return Tree(Text.assemble((name, "bold"), shape), highlight=False)


def add_capacity(root: Tree, spec: ModelSpec, record: Mapping[str, Any] | None = None) -> None:
    """Add to a model's `tree` what its requests take on a server, before and after for a reduced one; for one that is
    not, also what narrower keys would give.

    Args:
        record: `state_reduction.json` of a reduced checkpoint (`record_of`).
    """
    if record is None:
        models = [spec, *narrower(spec)]
    elif is_masked(record):
        models = [spec]
    else:
        models = [spec.with_d_k(tuple(record["source"]["d_k"])), spec]
    on_card = on_a_card(spec)
    if on_card:
        branch = root.add("on a server, which keeps weights, convolution inputs and KV cache in bfloat16")
        for line in capacity_lines(models[0]):
            branch.add(line)
        if models[0].kv_bytes_per_token():
            branch.add(CAPACITY_LEGEND)
    else:
        branch = root.add(
            "with convolution inputs in bfloat16; no server runs this on a GPU yet, so requests are not counted"
        )
    header, rows = capacity_table([(span(model.d_k), model) for model in models], on_card=on_card)
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    branch.add(table)


def add_written(root: Tree, source: Checkpoint, written: Checkpoint) -> None:
    """Add to the `tree` of a checkpoint that was just written what was compared with its source, and what its config
    says otherwise."""
    root.add(f"{counted(len(written.files), 'tensor')} compared with the source's: names, shapes, dtypes")
    config = root.add("config.json")
    for line in config_changes(source.config, written.config) or ["unchanged"]:
        config.add(writable(line))


def _add_narrower(state: Tree, before: ModelSpec, after: ModelSpec) -> None:
    """Add to the line of the float32 state what it takes in each narrower dtype, and the change from what it was."""
    for dtype in STATE_DTYPES[1:]:
        bytes_before, bytes_after = (_narrow_bytes(spec, dtype) for spec in (before, after))
        changed = arrow(f"{bytes_before:,}", f"{bytes_after:,}")
        from_float32 = change(before.state_bytes(0), bytes_after)
        state.add(
            Text.assemble(f"in {dtype} ", *changed, f" bytes ({from_float32} from {before.state_bytes(0):,})")
        )


def _narrow_bytes(spec: ModelSpec, dtype: StateDType) -> int:
    # A state narrower than float32 takes the same beside weights of any dtype.
    return spec.state_bytes(0, StateTypes.named(dtype, torch.bfloat16))


def arrow(before: str, after: str) -> tuple[str | tuple[str, str], ...]:
    """Parts of a `Text`: before => after, or one of them if they are the same."""
    return (after,) if before == after else (f"{before} => ", (after, "bold"))


def _heads(spec: ModelSpec) -> str:
    mixer = next(iter(spec.deltas.values()))
    keys, values = counted(mixer.num_k_heads, "key head"), counted(mixer.num_v_heads, "value head")
    return f"{keys}, {values}, d_v {mixer.d_v}"


def _origin(origin: dict[str, Any]) -> str:
    return (
        f"{origin['text']} (sha256 {origin['text_sha256'][:12]}...), "
        f"{counted(origin['windows'], 'window')} of {origin['window_length']}, seed {origin['seed']}"
    )


def _measured(evaluation: dict[str, Any]) -> str:
    before, after = evaluation["dense"]["perplexity"], evaluation["reduced"]["perplexity"]
    divergence, tokens = evaluation.get("divergence"), evaluation["reduced"].get("tokens")
    on = "" if tokens is None else f"{counted(tokens, 'token')} of "
    return (
        f"perplexity {before:.3f} => {after:.3f} ({change(before, after)})"
        f"{'' if divergence is None else f', {apart_from_dense(divergence)},'} on {on}{evaluation['text']}"
    )


def apart_from_dense(divergence: Mapping[str, float]) -> str:
    """How far a reduced model's predictions are from the dense one's, as `state_reduction.json` records it."""
    return f"KL {divergence['kl']:.4f} nats a token, top-1 agreement {divergence['top1_agreement']:.1%}"


def _recovered(recovery: dict[str, Any]) -> str:
    measured = recovery["evaluation"]
    before, after = measured["before"]["perplexity"], measured["after"]["perplexity"]
    return (
        f"recovered on {counted(recovery['tokens'], 'token')} ({recovery['settings']['train']}), "
        f"perplexity {before:.3f} => {after:.3f} ({change(before, after)}) "
        f"on {counted(measured['tokens'], 'token')} of {measured['text']}"
    )


def evaluation_table(evaluation: Evaluation) -> Table:
    """One row per figure, one column per checkpoint; changes are against the first."""
    first = evaluation.checkpoints[0]
    title = counted(len(evaluation.checkpoints), "checkpoint")
    if first.perplexity is not None:
        title += f", {counted(first.perplexity.tokens, 'token')} of {evaluation.text}"
    table = Table("", title=title, caption=legend(evaluation) or None)
    for entry in evaluation.checkpoints:
        table.add_column(entry.name, justify="right")
    for label, cells in figures(evaluation):
        table.add_row(label, *(Text(cell.text, STYLES[cell.mark]) for cell in cells))
    return table


def pareto_view(evaluation: Evaluation) -> Table:
    """One row per checkpoint and state dtype."""
    table = Table(
        title="Bytes against quality",
        caption=PARETO_LEGEND,
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    header, rows = pareto_table(evaluation)
    # Where there is little room, names take more lines, so that figures stay whole.
    table.add_column(header[0], overflow="fold")
    for i, name in enumerate(header[1:]):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def legend(evaluation: Evaluation) -> str:
    """What the figures mean that were measured; empty where that needs no words."""
    entries = evaluation.checkpoints
    parts = []
    if any(e.recall or e.rank or e.retrieval or e.speed for e in entries):
        parts.append(LEGEND)
    if any(e.identifiers for e in entries):
        parts.append(IDENTIFIERS_LEGEND)
    if any(e.bits for e in entries):
        parts.append(BITS_LEGEND)
    return " ".join(parts)


LEGEND = (
    "Changes and speedups are against the first. Recall: right / right among the prompt's values / log-probability. "
    "Rank: utilisation of the states. Reads: retrieval error / read error. Speeds: medians (quartiles)."
)


STYLES = {"": "", "better": "green", "worse": "red"}
"""Colours of marks in a terminal."""


def figures(evaluation: Evaluation) -> list[tuple[str, list[Judged]]]:
    """(label, one cell per checkpoint) for everything that was measured of any."""
    first, *_ = entries = evaluation.checkpoints
    columns = [_cells(entry, first) for entry in entries]
    # What compares with the baseline is not among the baseline's own.
    labels = dict.fromkeys(label for column in reversed(columns) for label in column)
    return [(label, [column.get(label, Judged("")) for column in columns]) for label in labels]


def _cells(entry: EvaluatedCheckpoint, first: EvaluatedCheckpoint) -> dict[str, Judged]:
    cells = {} if entry.method is None else {"method": Judged(entry.method)}
    cells["d_k"] = Judged(width(entry.d_k))
    if len(set(entry.d_k)) > 1:
        cells["d_k"] = Judged(f"{span(entry.d_k)}, per layer:\n{_lines(entry.d_k)}")
    if entry.recovery_tokens is not None:
        cells["recovered on"] = Judged(counted(entry.recovery_tokens, "token"))
    cells["state bytes"] = _against(first.state_bytes, entry.state_bytes, ",", entry is first)
    if entry.perplexity is not None and first.perplexity is not None:
        cells["perplexity"] = _against(
            first.perplexity.perplexity, entry.perplexity.perplexity, ".3f", entry is first
        )
    if entry.divergence is not None:
        cells["KL, nats/token"] = Judged(f"{entry.divergence.kl:.4f}")
        cells["top-1 agreement"] = Judged(f"{entry.divergence.top1_agreement:.1%}")
    for recall in entry.recall or []:
        cells[f"recall, {recall.pairs} pairs"] = Judged(
            f"{recall.accuracy:.1%} / {recall.accuracy_among_values:.1%} / {recall.log_prob:.2f}"
        )
    cells |= identifier_cells(entry.identifiers or [])
    if entry.rank is not None:
        label = f"rank, {entry.rank.positions[-1]} tokens"
        cells[label] = Judged(f"{mean_of_heads(entry.rank.utilisation, -1):.2%}")
    if entry.retrieval is not None:
        for i, level in enumerate(entry.retrieval.noise):
            cells[f"reads, noise {level:g}"] = Judged(
                f"{mean_of_heads(entry.retrieval.retrieval_error, i):.3f} / "
                f"{mean_of_heads(entry.retrieval.read_error, i):.3f}"
            )
    for speed in entry.speed or []:
        cells[f"tokens/s, batch {speed.batch}"] = Judged(
            f"{speed.tokens_per_second:,.0f} ({_range(speed.quartiles, ',.0f')})"
        )
        if entry is not first:
            low, high = speed.ratio_quartiles
            cells[f"speedup, batch {speed.batch}"] = judged(
                f"{speed.ratio:.2f} ({_range(speed.ratio_quartiles, '.2f')})",
                speed.ratio - 1,
                speed.ratio - low if speed.ratio > 1 else high - speed.ratio,
            )
    for bits in entry.bits or []:
        cells |= {f"{bits.state_dtype}: {label}": cell for label, cell in bits_cells(bits).items()}
    return cells


def _lines(d_k: Sequence[int], length: int = 8) -> str:
    """The widths of all layers, some on each line."""
    return "\n".join(" ".join(map(str, d_k[i : i + length])) for i in range(0, len(d_k), length))


def mean_of_heads(values: PerHead, at: int) -> float:
    """Mean over layers and heads of `[layer][at][head]`."""
    return fmean(head for layer in values for head in layer[at])


def _against(first: float, value: float, form: str, is_first: bool) -> Judged:
    """A figure of which less is better."""
    if is_first:
        return Judged(f"{value:{form}}")
    return judged(f"{value:{form}} ({change(first, value)})", first - value)


def _range(quartiles: tuple[float, float], form: str) -> str:
    return f"{quartiles[0]:{form}} to {quartiles[1]:{form}}"
