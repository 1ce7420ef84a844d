"""Figures of states in fewer bits: bytes against quality, and how errors grow with length."""

from collections.abc import Sequence
from typing import Any

from lowkey.words import counted
from modeling.spec import STATE_DTYPES
from pruning.evaluation.bits import Estimate, Octave
from pruning.evaluation.record import Evaluation
from pruning.pareto import Choice, choices
from pruning.report.style import Figure, line, place, short, subplots

LEAST_RISE, LEAST_KL = 1e-4, 1e-6
"""What is not larger is drawn as large: nothing has no logarithm."""


def pareto(name: str, evaluation: Evaluation, number: int) -> list[Figure]:
    """Bytes of state against the rise in perplexity and against KL, by state dtype."""
    found = choices(evaluation)
    if not found:
        return []
    rises = [max(100 * c.rise, 100 * LEAST_RISE) for c in found]
    kls = [max(c.bits.divergence.kl, LEAST_KL) if c.bits.divergence else LEAST_KL for c in found]
    figure = subplots(["rise in perplexity, %", "KL, nats per token"], height=520)
    for panel, values in enumerate((rises, kls)):
        for i, dtype in enumerate(STATE_DTYPES):
            chosen = [(c, v) for c, v in zip(found, values, strict=True) if c.bits.state_dtype == dtype]
            style = line(i)
            figure.add_scatter(
                x=[c.bits.state_bytes for c, _ in chosen],
                y=[v for _, v in chosen],
                text=[short(c.entry.name) for c, _ in chosen],
                hovertemplate="%{text}: %{x} bytes, %{y:.3g}<extra></extra>",
                name=dtype,
                legendgroup=dtype,
                showlegend=panel == 0,
                mode="markers",
                marker=style["marker"],
                **place(panel),
            )
    front = [(c, rise) for c, rise in zip(found, rises, strict=True) if c.on_front]
    figure.add_scatter(
        x=[c.bits.state_bytes for c, _ in front],
        y=[rise for _, rise in front],
        name="front",
        mode="lines",
        line={"color": "rgba(128,128,128,0.6)", "width": 2, "dash": "dot"},
        **place(0),
    )
    _label(figure, front)
    figure.update_xaxes(title="bytes of state per request", type="log", exponentformat="SI", dtick="D2")
    figure.update_yaxes(type="log", exponentformat="power")
    scored = found[0].bits.perplexity
    return [
        Figure(
            f"pareto-{number}",
            "Bytes against quality",
            f"{name}: against {evaluation.checkpoints[0].name} with float32 states, {scored.tokens:,} tokens in "
            f"windows of {scored.window:,}; states are rounded after every token. Dotted: what nothing beats in both "
            f"bytes and perplexity. At the lowest line: {100 * LEAST_RISE:g} % and {LEAST_KL:g} or less.",
            figure,
        )
    ]


def _label(figure: Any, front: Sequence[tuple[Choice, float]]) -> None:
    """Name the checkpoints along the front."""
    figure.add_scatter(
        x=[c.bits.state_bytes for c, _ in front],
        y=[rise for _, rise in front],
        text=[short(c.entry.name.rstrip("/").rpartition("/")[2], 16) for c, _ in front],
        mode="text",
        textposition="bottom left",
        textfont={"size": 11},
        showlegend=False,
        hoverinfo="skip",
        **place(0),
    )


def drift(name: str, evaluation: Evaluation, number: int) -> list[Figure]:
    """Rise in loss and KL by what rounding adds, along long windows."""
    measured = [
        (short(f"{entry.name}, {bits.state_dtype}"), i, bits)
        for i, entry in enumerate(evaluation.checkpoints)
        for bits in entry.bits or []
        if bits.loss_rise is not None
    ]
    if not measured:
        return []
    figure = subplots(["rise in loss, nats per token", "KL, nats per token"], height=440)
    for label, i, bits in measured:
        dash = "solid" if bits.state_dtype == STATE_DTYPES[-1] else "dash"
        for panel, estimates in enumerate(_estimates(bits.drift.octaves)):
            figure.add_scatter(
                x=[octave.end for octave in bits.drift.octaves],
                y=[estimate.mean for estimate in estimates],
                error_y={
                    "array": [estimate.standard_error or 0.0 for estimate in estimates],
                    "thickness": 1.5,
                    "width": 4,
                },
                name=label,
                legendgroup=label,
                showlegend=panel == 0,
                **line(i, dash=dash),
                **place(panel),
            )
    lowest = min(e.mean for _, _, bits in measured for e in _estimates(bits.drift.octaves)[1])
    ends = [octave.end for octave in measured[0][2].drift.octaves]
    figure.update_xaxes(title="tokens seen, up to", type="log", tickvals=ends, exponentformat="SI")
    figure.update_yaxes(zeroline=True, row=1, col=1)
    figure.update_yaxes(type="log" if lowest > 0 else "linear", exponentformat="power", row=1, col=2)
    read = measured[0][2].drift
    return [
        Figure(
            f"drift-{number}",
            "Drift with length",
            f"{name}: each against the same checkpoint with float32 states, by position in "
            f"{counted(read.windows, 'window')} of {read.window:,} tokens; bars are standard errors over blocks of "
            "tokens.",
            figure,
        )
    ]


def _estimates(octaves: Sequence[Octave]) -> tuple[list[Estimate], list[Estimate]]:
    """The rises in loss and the KL of a narrower dtype than float32."""
    return [o.loss_rise for o in octaves if o.loss_rise], [o.kl for o in octaves if o.kl]
