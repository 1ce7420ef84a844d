"""What the terminal shows: the before => after tree and the evaluation table."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from modeling.checkpoint import REDUCTION, Checkpoint
from modeling.spec import ModelSpec
from pruning.errors import PruningError
from pruning.evaluation import Perplexity
from pruning.reduction import FORMAT


def width(d_k: Sequence[int]) -> str:
    """One number for a model of one d_k, all of them otherwise."""
    return str(d_k[0]) if len(set(d_k)) == 1 else " ".join(str(n) for n in d_k)


def change(before: float, after: float) -> str:
    """A relative change in percent, with its sign."""
    return f"{100 * (after / before - 1):+.1f} %"


def tree(checkpoint: Checkpoint) -> Tree:
    """Shapes of a checkpoint; for a reduced one before => after, and where it came from.

    Raises:
        PruningError: `state_reduction.json` is of another format.
    """
    spec = checkpoint.spec
    root = Tree(
        f"[bold]{escape(checkpoint.source)}[/]  {spec.family}, {len(spec.layers)} layers", highlight=False
    )
    record = checkpoint.reduction
    if record is None:
        root.add(f"d_k {width(spec.d_k)}")
        root.add(f"state per request {spec.state_bytes():,} bytes")
        root.add(_heads(spec))
        return root
    if record.get("format") != FORMAT:
        raise PruningError(
            f"{checkpoint.path / REDUCTION} has format {record.get('format')!r}; this version reads {FORMAT}"
        )
    source = record["source"]
    root.add(f"d_k {width(source['d_k'])} => [bold]{width(spec.d_k)}[/]")
    before, after = source["state_bytes"], spec.state_bytes()
    root.add(f"state per request {before:,} => [bold]{after:,}[/] bytes ({change(before, after)})")
    root.add(_heads(spec))
    if len(set(spec.d_k)) > 1:
        root.add("layers differ in d_k: Lowkey runs this, stock loaders refuse it")
    made = root.add(f"made by {escape(str(record['method']))}, seed {record['seed']}")
    made.add(escape(f"from {source['name']}, sha256 {source['sha256'][:12]}..."))
    if record["calibration"] is not None:
        branch = made.add(f"calibrated on {record['calibration']['tokens']:,} tokens")
        for origin in record["calibration"]["origins"]:
            branch.add(escape(_origin(origin)))
    if record["evaluation"] is not None:
        root.add(escape(_measured(record["evaluation"])))
    if "recovery" in record:
        root.add(escape(_recovered(record["recovery"])))
    return root


def _heads(spec: ModelSpec) -> str:
    mixer = spec.layers[0].mixer
    return f"{mixer.num_k_heads} key heads, {mixer.num_v_heads} value heads, d_v {mixer.d_v}"


def _origin(origin: dict[str, Any]) -> str:
    return (
        f"{origin['text']} (sha256 {origin['text_sha256'][:12]}...), "
        f"{origin['windows']} windows of {origin['window_length']}, seed {origin['seed']}"
    )


def _measured(evaluation: dict[str, Any]) -> str:
    before, after = evaluation["dense"]["perplexity"], evaluation["reduced"]["perplexity"]
    return (
        f"perplexity {before:.3f} => {after:.3f} ({change(before, after)}) "
        f"on {evaluation['reduced']['tokens']:,} tokens of {evaluation['text']}"
    )


def _recovered(recovery: dict[str, Any]) -> str:
    measured = recovery["evaluation"]
    before, after = measured["before"]["perplexity"], measured["after"]["perplexity"]
    return (
        f"recovered on {recovery['tokens']:,} tokens ({recovery['settings']['train']}), "
        f"perplexity {before:.3f} => {after:.3f} ({change(before, after)}) "
        f"on {measured['tokens']:,} tokens of {measured['text']}"
    )


def evaluation_table(results: Sequence[tuple[Checkpoint, Perplexity]]) -> Table:
    """One row per checkpoint; changes are against the first."""
    table = Table("checkpoint", title=f"perplexity on {results[0][1].tokens:,} held-out tokens")
    for column in ("d_k", "state bytes", "", "perplexity", ""):
        table.add_column(column, justify="right")
    first_bytes, first = results[0][0].spec.state_bytes(), results[0][1].perplexity
    for i, (checkpoint, result) in enumerate(results):
        state = checkpoint.spec.state_bytes()
        table.add_row(
            escape(checkpoint.source),
            width(checkpoint.spec.d_k),
            f"{state:,}",
            change(first_bytes, state) if i else "",
            f"{result.perplexity:.3f}",
            change(first, result.perplexity) if i else "",
        )
    return table
