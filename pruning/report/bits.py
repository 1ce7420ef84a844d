"""Figures of states in fewer bits: bytes against quality, and how errors grow with length."""

import itertools
from collections.abc import Sequence
from typing import Any

from lowkey.words import counted, in_units
from modeling.spec import STATE_DTYPES
from pruning.evaluation.bits import Bits
from pruning.evaluation.record import Evaluation
from pruning.evaluation.samples import Estimate
from pruning.pareto import Choice, choices
from pruning.report.style import RISES, SYMBOLS, Figure, line, place, short, subplots, tokens_label

LEAST_RISE = 0.01
"""In percent. A smaller rise in perplexity, or none, is drawn as this one: nothing has no logarithm."""
GREY = "rgba(128,128,128,0.9)"


def pareto(name: str, evaluation: Evaluation, number: int) -> list[Figure]:
    """Bytes of state against the rise in perplexity and against KL: a line for each checkpoint, through its dtypes."""
    found = choices(evaluation)
    if not found:
        return []
    figure = subplots(["rise in perplexity, %", "KL, nats per token"], height=520)
    for i, entry in enumerate(evaluation.checkpoints):
        own = [c for c in found if c.entry is entry]
        style = line(i)
        rises = [(c.bits, _rise(c)) for c in own]
        kls = [(c.bits, c.bits.divergence.kl) for c in own if c.bits.divergence is not None]
        for panel, drawn in enumerate((rises, kls)):
            figure.add_scatter(
                x=[bits.state_bytes for bits, _ in drawn],
                y=[value for _, value in drawn],
                text=[bits.state_dtype for bits, _ in drawn],
                hovertemplate="%{text}: %{x:,} bytes, %{y:.3g}",
                name=short(entry.name),
                legendgroup=str(i),
                showlegend=panel == 0,
                mode="lines+markers",
                line={**style["line"], "width": 1.5},
                marker={
                    "color": style["line"]["color"],
                    "size": 10,
                    "symbol": [_symbol(bits) for bits, _ in drawn],
                },
                **place(panel),
            )
    front = [c for c in found if c.on_front]
    figure.add_scatter(
        x=[c.bits.state_bytes for c in front],
        y=[_rise(c) for c in front],
        name="front",
        mode="lines",
        line={"color": GREY, "width": 3, "dash": "dot"},
        hoverinfo="skip",
        **place(0),
    )
    for dtype in dict.fromkeys(c.bits.state_dtype for c in found):
        symbol = SYMBOLS[STATE_DTYPES.index(dtype)]
        figure.add_scatter(
            x=[None],
            y=[None],
            name=dtype,
            mode="markers",
            marker={"color": GREY, "size": 10, "symbol": symbol},
        )
    figure.update_xaxes(title="state per request, of the largest", type="log", **_halves(found))
    figure.update_xaxes(matches="x", row=1, col=2)
    ticks = [f"{tick:g}" for tick in RISES]
    figure.update_yaxes(type="log", tickvals=RISES, ticktext=[f"≤ {ticks[0]}", *ticks[1:]], row=1, col=1)
    figure.update_yaxes(type="log", dtick=1, exponentformat="power", row=1, col=2)
    scored = found[0].bits.perplexity
    return [
        Figure(
            f"pareto-{number}",
            "Bytes against quality",
            f"{name}: against {evaluation.checkpoints[0].name} with float32 states, {scored.tokens:,} tokens in "
            f"windows of {scored.window:,}; states are rounded after every token. One line a checkpoint, through its "
            "state dtypes. Dotted: what nothing beats in both bytes and perplexity.",
            figure,
        )
    ]


def _rise(choice: Choice) -> float:
    return max(100 * choice.rise, LEAST_RISE)


def _symbol(bits: Bits) -> str:
    return SYMBOLS[STATE_DTYPES.index(bits.state_dtype)]


def _halves(found: Sequence[Choice]) -> dict[str, Any]:
    """Ticks of the bytes: the largest state, its half, its quarter, and so on."""
    sizes = [c.bits.state_bytes for c in found]
    shares = itertools.takewhile(lambda n: max(sizes) / n > min(sizes) / 2, (2**i for i in itertools.count()))
    ticks = {max(sizes) / n: f"1/{n}" if n > 1 else "1" for n in shares}
    return {
        "tickvals": list(ticks),
        "ticktext": [f"{share}<br>{in_units(size)}" for size, share in ticks.items()],
    }


def drift(name: str, evaluation: Evaluation, number: int) -> list[Figure]:
    """Rise in loss, and KL, that rounding makes along long windows: a row of axes for each dtype."""
    measured = [
        (i, entry, bits)
        for i, entry in enumerate(evaluation.checkpoints)
        for bits in entry.bits or []
        if bits.loss_rise is not None
    ]
    if not measured:
        return []
    dtypes = list(dict.fromkeys(bits.state_dtype for _, _, bits in measured))
    titles = [
        f"{dtype}: {what}, nats per token" for dtype in dtypes for what in ("rise in loss", "KL from float32")
    ]
    figure = subplots(titles, height=340)
    for i, entry, bits in measured:
        for panel, estimates in enumerate(_estimates(bits)):
            figure.add_scatter(
                x=[octave.end for octave in bits.drift.octaves],
                y=[estimate.mean for estimate in estimates],
                error_y={
                    "array": [estimate.standard_error or 0.0 for estimate in estimates],
                    "thickness": 1.5,
                    "width": 4,
                },
                name=short(entry.name),
                legendgroup=str(i),
                showlegend=panel == 0 and bits.state_dtype == dtypes[0],
                **line(i),
                **place(2 * dtypes.index(bits.state_dtype) + panel),
            )
    ends = sorted({octave.end for _, _, bits in measured for octave in bits.drift.octaves})
    ticks = [tokens_label(end) for end in ends]
    figure.update_xaxes(title="tokens seen, up to", type="log", tickvals=ends, ticktext=ticks)
    figure.update_yaxes(rangemode="tozero", exponentformat="power")
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


def _estimates(bits: Bits) -> tuple[list[Estimate], list[Estimate]]:
    """By octave, the rises in loss and the KL of a narrower dtype than float32."""
    octaves = bits.drift.octaves
    return [o.loss_rise for o in octaves if o.loss_rise], [o.kl for o in octaves if o.kl]
