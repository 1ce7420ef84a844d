"""The HTML around the figures. One file: plotly's script and all data are inside, and nothing is fetched."""

import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from statistics import fmean

from plotly.offline import get_plotlyjs

from pruning.evaluation.record import Evaluation
from pruning.report import measured, trade
from pruning.report.inputs import Cell, Inputs, Table
from pruning.report.style import Figure
from pruning.views import LEGEND, change, figures


def all_figures(inputs: Inputs) -> list[Figure]:
    """Everything that the inputs allow, in the order of the page."""
    found: list[Figure] = []
    for i, (name, table) in enumerate(inputs.tables):
        found += trade.tradeoff(name, table, i)
    found += trade.budgets(inputs.tables, inputs.reductions)
    for i, (name, evaluation) in enumerate(inputs.evaluations):
        for draw in (measured.recalls, measured.noise, measured.ranks):
            found += draw(name, evaluation, i)
    for i, (name, statistics) in enumerate(inputs.statistics):
        found += measured.spectra(name, statistics, i)
    found += measured.kept_channels(inputs.reductions)
    found += measured.recovery_curves(inputs.recoveries)
    return found


def missing(inputs: Inputs, drawn: Sequence[Figure]) -> list[str]:
    """What a full report would have, and what would have to be given for it."""
    names = {figure.name.rstrip("0123456789").rstrip("-") for figure in drawn}
    wanted = [
        ("perplexity", "perplexity and KL against width", "the JSON of benchmarks/pruning_table.py"),
        ("budget", "error budget per layer", "that JSON, or a checkpoint pruned with --per-layer"),
        ("recall", "associative recall", "the JSON of evaluate --part recall"),
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
    sections = [
        f"<h1>{escape(title)}</h1>",
        *(_table_summary(name, table) for name, table in inputs.tables),
        *(_evaluation_summary(name, evaluation) for name, evaluation in inputs.evaluations),
        *(_section(figure) for figure in drawn),
        _provenance(inputs, missing(inputs, drawn)),
    ]
    return document(title, "\n".join(sections), drawn)


def document(title: str, body: str, drawn: Sequence[Figure]) -> str:
    """A page that draws the figures into the elements of `body` that have their names."""
    data = [{"name": figure.name, **json.loads(figure.figure.to_json())} for figure in drawn]
    for figure in data:
        figure["layout"].pop("template", None)  # the page has its own, for light and dark
    files = resources.files("pruning.report")
    parts = {
        "TITLE": escape(title),
        "STYLE": files.joinpath("page.css").read_text("utf-8"),
        "BODY": body,
        # The data is in a script element: no "<" may end it early.
        "FIGURES": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "SCRIPT": files.joinpath("page.js").read_text("utf-8"),
        "PLOTLY": get_plotlyjs(),
    }
    # In one pass: a title or a checkpoint called %SCRIPT% stays text.
    template = files.joinpath("page.html").read_text("utf-8")
    return re.sub("%([A-Z]+)%", lambda found: parts[found[1]], template)


def _section(figure: Figure) -> str:
    height = figure.figure.layout.height
    return (
        f'<section><h2 id="about-{figure.name}">{escape(figure.title)}</h2><p>{escape(figure.caption)}</p>'
        f'<div class="figure" id="{figure.name}" style="height:{height}px"></div></section>'
    )


def _table_summary(name: str, table: Table) -> str:
    dense = table.dense
    columns = sorted({cell.column for cell in table.reduced}, reverse=True)
    rows: list[list[str]] = []
    for row, by_column in trade.groups(table).items():
        rows.append(
            [row, *(_cell(by_column[c], dense.perplexity) if c in by_column else "" for c in columns)]
        )
    caption = (
        f"{name}: {table.checkpoint} on {table.device}; dense {dense.perplexity:.3f}, {dense.state_bytes:,} bytes of "
        "state. Perplexity, mean and range over calibration seeds; its change; KL in nats per token."
    )
    return _html_table("Methods by width", caption, ["method", *(f"d_k {c}" for c in columns)], rows)


def _cell(cells: Sequence[Cell], dense: float) -> str:
    values = [cell.perplexity for cell in cells]
    spread = f"\n{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else ""
    kl = fmean(cell.kl for cell in cells)
    return f"{fmean(values):.2f}{spread}\n{change(dense, fmean(values))}, KL {kl:.4f}"


def _evaluation_summary(name: str, evaluation: Evaluation) -> str:
    scored = evaluation.checkpoints[0].perplexity
    tokens = "" if scored is None else f"{scored.tokens:,} tokens of "
    device = evaluation.environment.get("device_name", "")
    caption = f"{name}: {tokens}{evaluation.text}, on {device}. {LEGEND}"
    header = ["", *(entry.name for entry in evaluation.checkpoints)]
    rows = [[label, *cells] for label, cells in figures(evaluation)]
    return _html_table("Checkpoints side by side", caption, header, rows)


def _provenance(inputs: Inputs, left_out: Sequence[str]) -> str:
    parts = ["<section><h2>Where this comes from</h2>"]
    parts.append(_rows(["file", "sha256"], [[name, digest] for name, digest in inputs.hashes]))
    models = {
        *((table.checkpoint, table.sha256) for _, table in inputs.tables),
        *((entry.name, entry.sha256) for _, e in inputs.evaluations for entry in e.checkpoints),
        *((reduction.source.name, reduction.source.sha256) for _, reduction in inputs.reductions),
    }
    if models:
        parts.append(_rows(["checkpoint", "sha256 of config and weights"], [list(m) for m in sorted(models)]))
    for name, evaluation in inputs.evaluations:
        facts = {**evaluation.versions, **{k: str(v) for k, v in evaluation.environment.items()}}
        said = ", ".join(f"{key} {value}" for key, value in facts.items())
        parts.append(f"<p>{escape(name)}: {escape(said)}; text sha256 {escape(evaluation.text_sha256)}</p>")
    if left_out:
        parts.append("<p>Not in this report:</p><ul>")
        parts += [f"<li>{escape(what)}</li>" for what in left_out]
        parts.append("</ul>")
    return "".join([*parts, "</section>"])


def _html_table(title: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(caption)}</p>{_rows(header, rows)}</section>"


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells() -> Iterator[str]:
        yield "<tr>" + "".join(f"<th>{escape(h)}</th>" for h in header) + "</tr>"
        for row in rows:
            first, *others = (escape(cell).replace("\n", "<br>") for cell in row)
            yield f"<tr><th>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>"

    return f'<div class="wide"><table>{"".join(cells())}</table></div>'
