"""The report's page: tables of figures, the figures themselves, and where all of it comes from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from lowkey.page import render
from lowkey.words import MARKS, Judged, counted, judged
from pruning.evaluation.record import Evaluation
from pruning.mqar_table import MQARTable
from pruning.pareto import PARETO_LEGEND, choices, pareto_table
from pruning.report import bits, identifiers, measured, mqar, trade
from pruning.report.inputs import Inputs, Recovery, Reduction
from pruning.report.style import MARGIN, Figure
from pruning.report.trade import rises_by_width
from pruning.table import Table, methods_by_width
from pruning.views import change, figures, legend, span


@dataclass(frozen=True)
class Summary:
    """One table of the page with what stands around it."""

    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Judged]]
    """Cells by row; the first of each names it. A line end in a cell stays one."""


def all_figures(inputs: Inputs) -> list[Figure]:
    """Everything that the inputs allow, in the order of the page."""
    found: list[Figure] = []
    for i, (name, table) in enumerate(inputs.tables):
        found += trade.tradeoff(name, table, i)
    found += trade.ladder(inputs.tables)
    found += trade.budgets(inputs.tables, inputs.reductions)
    for i, (name, evaluation) in enumerate(inputs.evaluations):
        for draw in (
            bits.pareto,
            bits.drift,
            measured.recalls,
            identifiers.identifiers,
            measured.noise,
            measured.ranks,
        ):
            found += draw(name, evaluation, i)
    for i, (name, recall) in enumerate(inputs.mqar):
        found += mqar.recall_by_width(name, recall, i)
    for i, (name, statistics) in enumerate(inputs.statistics):
        found += measured.spectra(name, statistics, i)
    found += measured.kept_channels(inputs.reductions)
    found += measured.recovery_curves(inputs.recoveries)
    return found


def missing(inputs: Inputs, drawn: Sequence[Figure]) -> list[str]:
    """What a full report would have, and what would have to be given for it."""
    names = {figure.name.rstrip("0123456789").rstrip("-") for figure in drawn}
    wanted = [
        ("perplexity", "perplexity and KL against width", "the JSON of sweep"),
        ("budget", "error budget per layer", "that JSON, or a checkpoint pruned with --per-layer"),
        ("pareto", "bytes against quality at each state dtype", "the JSON of evaluate --part bits"),
        ("recall", "associative recall", "the JSON of evaluate --part recall"),
        ("identifiers", "identifiers that occurred before", "the JSON of evaluate --part identifiers"),
        ("noise", "errors of noisy reads", "the JSON of evaluate --part retrieval"),
        ("rank", "rank utilisation", "the JSON of evaluate --part rank"),
        ("spectra", "spectra", "a statistics file"),
        ("kept", "kept channels", "a checkpoint pruned by a method that chooses channels"),
        ("recovery", "recovery curves", "a checkpoint that recover has made"),
    ]
    left_out = [f"{what} (give {source})" for name, what, source in wanted if name not in names]
    if not inputs.evaluations:
        left_out.insert(0, "the summary of checkpoints (give the JSON of evaluate)")
    return left_out


def page(title: str, inputs: Inputs, drawn: Sequence[Figure]) -> str:
    """The whole report."""
    models = {
        *((table.checkpoint, table.sha256) for _, table in inputs.tables),
        *((entry.name, entry.sha256) for _, e in inputs.evaluations for entry in e.checkpoints),
        *((recall.checkpoint, recall.sha256) for _, recall in inputs.mqar),
        *((reduction.source.name, reduction.source.sha256) for _, reduction in inputs.reductions),
    }
    return render(
        "pruning.report",
        "page.html",
        {figure.name: figure.figure for figure in drawn},
        margin=MARGIN,
        title=title,
        summaries=[
            *(_table_summary(name, table) for name, table in inputs.tables),
            *(_evaluation_summary(name, evaluation) for name, evaluation in inputs.evaluations),
            *(
                _pareto_summary(name, evaluation)
                for name, evaluation in inputs.evaluations
                if choices(evaluation)
            ),
            *_checkpoints_summary(inputs),
            *(_mqar_summary(name, recall) for name, recall in inputs.mqar),
        ],
        figures=drawn,
        hashes=inputs.hashes,
        models=sorted(models),
        environments=list(_environments(inputs)),
        left_out=missing(inputs, drawn),
    )


def _table_summary(name: str, table: Table) -> Summary:
    dense = table.dense
    caption = (
        f"{name}: {table.checkpoint} on {table.device}; dense {dense.perplexity:.3f}, {dense.state_bytes:,} bytes of "
        "state. Perplexity, mean and range over calibration seeds; its change; KL in nats per token. ▲ the lowest "
        "of its column."
    )
    header, rows = methods_by_width(table)
    cells: list[list[str | Judged]] = [list(row) for row in rows]
    rises = list(rises_by_width(table).values())
    for i, width in enumerate(sorted({width for rise in rises for width in rise}, reverse=True), start=1):
        best = min((j for j, rise in enumerate(rises) if width in rise), key=lambda j: fmean(rises[j][width]))
        cells[best][i] = Judged(rows[best][i], "better")
    return Summary("Methods by width", caption, header, cells)


def _evaluation_summary(name: str, evaluation: Evaluation) -> Summary:
    scored = evaluation.checkpoints[0].perplexity
    tokens = "" if scored is None else f"{scored.tokens:,} tokens of "
    device = evaluation.environment.get("device_name", "")
    caption = f"{name}: {tokens}{evaluation.text}, on {device}. {MARKS} {legend(evaluation)}"
    header = ["", *(entry.name for entry in evaluation.checkpoints)]
    rows: list[list[str | Judged]] = [[label, *cells] for label, cells in figures(evaluation)]
    return Summary("Checkpoints side by side", caption, header, rows)


def _pareto_summary(name: str, evaluation: Evaluation) -> Summary:
    return Summary("Bytes against quality", f"{name}: {PARETO_LEGEND}", *pareto_table(evaluation))


def _checkpoints_summary(inputs: Inputs) -> Iterator[Summary]:
    """What the given checkpoints are, where any were given."""
    reductions, recoveries = dict(inputs.reductions), dict(inputs.recoveries)
    names = dict.fromkeys([*reductions, *recoveries])
    if names:
        yield Summary(
            "Reduced checkpoints",
            "State in float32, against the model that was reduced; held-out loss in nats per token, before and behind "
            "recovery. ▲ better, ▼ worse than before.",
            ["", "method", "d_k", "state bytes", "recovered on", "held-out loss"],
            [[name, *_checkpoint_cells(reductions.get(name), recoveries.get(name))] for name in names],
        )


def _checkpoint_cells(reduction: Reduction | None, recovery: Recovery | None) -> list[str | Judged]:
    cells: list[str | Judged] = ["dense, control" if recovery and recovery.control else "", "", "", "", ""]
    if reduction is not None:
        layers = "" if reduction.budget is None else ", chosen per layer"
        cells[0] = f"{reduction.method}, seed {reduction.seed}"
        cells[1] = f"{span(reduction.source.d_k)} => {span(reduction.d_k)}{layers}"
        before, after = reduction.source.state_bytes, reduction.state_bytes
        if before is not None and after is not None:
            cells[2] = judged(f"{before:,} => {after:,} ({change(before, after)})", before - after)
        if reduction.recovery is not None:
            cells[3] = counted(reduction.recovery.tokens, "token")
    if recovery is not None and recovery.curve:
        first, last = recovery.curve[0], recovery.curve[-1]
        cells[3] = counted(last.tokens, "token")
        cells[4] = judged(
            f"{first.heldout_loss:.3f} => {last.heldout_loss:.3f}", first.heldout_loss - last.heldout_loss
        )
    return cells


def _mqar_summary(name: str, table: MQARTable) -> Summary:
    caption = (
        f"{name}: {table.checkpoint}. Right answers in percent by number of pairs, with states in float32 / in int8; "
        "means over calibration seeds."
    )
    return Summary("Recall of a model trained for it", caption, *mqar.recall_rows(table))


def _environments(inputs: Inputs) -> Iterator[str]:
    """For each evaluation and each MQAR table, what it was run with."""
    for name, evaluation in inputs.evaluations:
        yield f"{name}: {_facts(evaluation)}; text sha256 {evaluation.text_sha256}"
    for name, table in inputs.mqar:
        yield f"{name}: {_facts(table)}; settings {table.settings}"


def _facts(made: Evaluation | MQARTable) -> str:
    """Versions and properties of the machine."""
    return ", ".join(f"{key} {value}" for key, value in {**made.versions, **made.environment}.items())
