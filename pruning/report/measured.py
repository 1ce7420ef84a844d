"""Figures from evaluations, statistics and checkpoints."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from lowkey.page import COLOURS
from lowkey.words import counted
from pruning.evaluation.record import Evaluation
from pruning.report.inputs import Recovery, Reduction
from pruning.report.style import (
    SCALE,
    SHADES,
    Figure,
    head_ticks,
    layer_indices,
    line,
    place,
    rows_height,
    shades,
    short,
    single,
    subplots,
    tokens_label,
)
from pruning.statistics import GramName, Statistics
from pruning.views import mean_of_heads

GRAMS: tuple[GramName, ...] = ("q_normalised", "k_normalised")
PERCENTS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
"""Ticks of logarithmic scales of a share, in percent."""
FLOOR = -10.0
"""log10 of the smallest eigenvalue that is drawn, against the largest."""


def spectra(name: str, statistics: Statistics, number: int) -> list[Figure]:
    """Eigenvalues of the Grams, by layer and by head."""
    layers = statistics.layers
    values = {gram: {i: _spectrum(layer[gram].numpy()) for i, layer in layers.items()} for gram in GRAMS}
    titles = ["queries", "keys"]
    caption = (
        f"{name}: eigenvalues of the Gram matrices of L2-normalised queries and keys over {statistics.tokens:,} "
        "tokens, each against the head's largest."
    )
    by_layer = subplots(titles, height=400)
    colours = dict(zip(layers, shades(len(layers)), strict=True))
    for i, gram in enumerate(GRAMS):
        for layer, heads in values[gram].items():
            mean = 10 ** heads.mean(0)
            by_layer.add_scatter(
                x=np.arange(1, len(mean) + 1),
                y=mean,
                name=f"layer {layer}",
                mode="lines",
                line={"color": colours[layer], "width": 2},
                legendgroup=str(layer),
                showlegend=i == 0 and len(colours) <= 12,
                **place(i),
            )
    by_layer.update_xaxes(title="eigenvalue")
    by_layer.update_yaxes(type="log", exponentformat="power")
    head_counts = {i: layer[GRAMS[0]].shape[0] for i, layer in layers.items()}
    by_head = subplots(titles, height=rows_height(sum(head_counts.values())), shared_yaxes=True)
    widest = max(heads.shape[1] for heads in values[GRAMS[0]].values())
    lowest = min(float(heads.min()) for of_layers in values.values() for heads in of_layers.values())
    for i, gram in enumerate(GRAMS):
        rows = [
            np.pad(row, (0, widest - len(row)), constant_values=np.nan)
            for heads in values[gram].values()
            for row in heads
        ]
        by_head.add_heatmap(
            z=np.stack(rows).round(3),
            x=np.arange(1, widest + 1),
            colorscale=SCALE,
            zmin=lowest,
            zmax=0,
            showscale=i == 1,
            colorbar={"title": "log10", "thickness": 12},
            hovertemplate="eigenvalue %{x}: 10^%{z}<extra></extra>",
            **place(i),
        )
    by_head.update_xaxes(title="eigenvalue")
    by_head.update_yaxes(**head_ticks(head_counts))
    return [
        Figure(
            f"spectra-{number}",
            "Spectra by layer",
            f"{caption} Geometric mean over the layer's heads. {SHADES}",
            by_layer,
        ),
        Figure(f"spectra-heads-{number}", "Spectra by head", f"{caption} One row a head.", by_head),
    ]


def _spectrum(grams: NDArray[np.float64]) -> NDArray[np.float64]:
    """log10 of each head's eigenvalues over its largest, descending, `[heads, d_k]`."""
    values = np.linalg.eigvalsh(grams)[:, ::-1]
    relative = values / np.maximum(values[:, :1], np.finfo(np.float64).tiny)
    logarithms: NDArray[np.float64] = np.log10(np.maximum(relative, 10**FLOOR))
    return logarithms


def ranks(name: str, evaluation: Evaluation, number: int) -> list[Figure]:
    """Rank utilisation along the sequence, by layer and by head."""
    entries = [(e, e.rank) for e in evaluation.checkpoints if e.rank is not None]
    if not entries:
        return []
    titles = [short(e.name) for e, _ in entries]
    most_heads = max(sum(len(layer[0]) for layer in rank.utilisation) for _, rank in entries)
    by_layer = subplots(titles, height=340)
    by_head = subplots(titles, height=rows_height(most_heads))
    shares = [
        h for _, rank in entries for layer in rank.utilisation for heads in layer for h in heads if h > 0
    ]
    lowest, highest = math.log10(100 * min(shares, default=0.01)), math.log10(100 * max(shares, default=1))
    for i, (entry, rank) in enumerate(entries):
        indices = layer_indices(entry.layers, len(rank.utilisation))
        means = [[100 * fmean(heads) for heads in by_position] for by_position in rank.utilisation]
        for layer, colour, along in zip(indices, shades(len(indices)), means, strict=True):
            by_layer.add_scatter(
                x=rank.positions,
                y=along,
                name=f"layer {layer}",
                mode="lines+markers",
                line={"color": colour, "width": 2},
                legendgroup=str(layer),
                showlegend=i == 0 and len(indices) <= 12,
                **place(i),
            )
        by_layer.add_scatter(
            x=rank.positions,
            y=[fmean(of_layers) for of_layers in zip(*means, strict=True)],
            name="mean",
            mode="lines",
            line={"color": COLOURS[-1], "width": 3, "dash": "dot"},
            legendgroup="mean",
            showlegend=i == 0,
            **place(i),
        )
        rows = [[100 * h for h in along] for layer in rank.utilisation for along in zip(*layer, strict=True)]
        by_head.add_heatmap(
            x=[tokens_label(position) for position in rank.positions],
            z=[[round(math.log10(h), 4) if h > 0 else None for h in row] for row in rows],
            customdata=[[round(h, 3) for h in row] for row in rows],
            colorscale=SCALE,
            zmin=lowest,
            zmax=highest,
            showscale=i == 0,
            colorbar={
                "title": "%",
                "thickness": 12,
                "tickvals": [math.log10(percent) for percent in PERCENTS],
                "ticktext": [f"{percent:g}" for percent in PERCENTS],
            },
            hovertemplate="after %{x} tokens: %{customdata} %<extra></extra>",
            **place(i),
        )
        head_counts = [len(layer[0]) for layer in rank.utilisation]
        by_head.update_yaxes(**head_ticks(dict(zip(indices, head_counts, strict=True))), **place(i))
    positions = entries[0][1].positions
    labels = [tokens_label(position) for position in positions]
    by_layer.update_xaxes(title="tokens seen", type="log", tickvals=positions, ticktext=labels)
    by_layer.update_yaxes(
        title="rank used, %", type="log", tickvals=PERCENTS, range=[lowest - 0.05, highest + 0.05]
    )
    by_head.update_xaxes(title="tokens seen", type="category", showgrid=False)
    caption = (
        f"{name}: (||S||F^2 / ||S||2^2) / min(d_k, d_v) of the states that real text leaves, decay included; "
        f"mean of {counted(entries[0][1].windows, 'window')}."
    )
    return [
        Figure(
            f"rank-{number}",
            "Rank utilisation along the sequence",
            f"{caption} Mean over value heads; dotted over all layers too. {SHADES}",
            by_layer,
        ),
        Figure(
            f"rank-heads-{number}", "Rank utilisation by head", f"{caption} One row a value head.", by_head
        ),
    ]


def recalls(name: str, evaluation: Evaluation, number: int) -> list[Figure]:
    """In-context associative recall by number of pairs."""
    measured = [(short(e.name), e.recall) for e in evaluation.checkpoints if e.recall]
    if not measured:
        return []
    figure = subplots(["right among the prompt's values, %", "log-probability of the value"], height=400)
    for i, (label, recall) in enumerate(measured):
        pairs = [r.pairs for r in recall]
        for column, values in enumerate(
            ([100 * r.accuracy_among_values for r in recall], [r.log_prob for r in recall])
        ):
            figure.add_scatter(
                x=pairs,
                y=values,
                name=label,
                legendgroup=label,
                showlegend=column == 0,
                **line(i),
                **place(column),
            )
    pairs = [r.pairs for r in measured[0][1]]
    figure.add_scatter(
        x=pairs,
        y=[100 / n for n in pairs],
        name="chance",
        mode="lines",
        line={"color": COLOURS[-1], "dash": "dot"},
        **place(0),
    )
    figure.update_xaxes(title="key-value pairs in the prompt", type="log", tickvals=pairs)
    figure.update_yaxes(rangemode="tozero", row=1, col=1)
    return [
        Figure(
            f"recall-{number}",
            "In-context associative recall",
            f"{name}: pairs of single words, then every key again (MQAR); {measured[0][1][0].queries} or more queries "
            "for each number of pairs.",
            figure,
        )
    ]


def noise(name: str, evaluation: Evaluation, number: int) -> list[Figure]:
    """Retrieval and read errors against query noise."""
    measured = [(short(e.name), e.retrieval) for e in evaluation.checkpoints if e.retrieval is not None]
    if not measured:
        return []
    figure = subplots(["retrieval error", "read error"], height=400)
    for i, (label, found) in enumerate(measured):
        for column, values in enumerate((found.retrieval_error, found.read_error)):
            figure.add_scatter(
                x=found.noise,
                y=[mean_of_heads(values, level) for level in range(len(found.noise))],
                name=label,
                legendgroup=label,
                showlegend=column == 0,
                **line(i),
                **place(column),
            )
    figure.update_xaxes(title="noise over query (norms)")
    figure.update_yaxes(rangemode="tozero", row=1, col=2)
    return [
        Figure(
            f"noise-{number}",
            "Errors of noisy reads",
            f"{name}: mean over layers and heads, {measured[0][1].tokens:,} tokens. Left: sine of the angle between "
            "what a noisy key reads and the value that it was stored with. Right: change in the model's own reads, "
            "over the reads, the median over tokens.",
            figure,
        )
    ]


def kept_channels(reductions: Sequence[tuple[str, Reduction]]) -> list[Figure]:
    """Which channels of the source each head keeps."""
    figures: list[Figure] = []
    for name, reduction in reductions:
        if reduction.rotated:
            continue
        widest = max(reduction.source.d_k)
        rows = []
        for kept_by_head, d_k in zip(reduction.kept_channels, reduction.source.d_k, strict=True):
            for kept in kept_by_head:
                row = np.zeros(widest)
                row[d_k:] = np.nan
                row[kept] = 1
                rows.append(row)
        figure = single(rows_height(len(rows)))
        figure.add_trace(
            go.Heatmap(
                z=np.stack(rows),
                colorscale=[[0, "rgba(128,128,128,0.15)"], [1, COLOURS[0]]],
                showscale=False,
                ygap=1 if len(rows) <= 64 else 0,
                hovertemplate="channel %{x}<extra></extra>",
            )
        )
        figure.update_xaxes(title="key channel of the source", showgrid=False, zeroline=False)
        indices = layer_indices(reduction.layers, len(reduction.kept_channels))
        heads = map(len, reduction.kept_channels)
        figure.update_yaxes(**head_ticks(dict(zip(indices, heads, strict=True))))
        figures.append(
            Figure(
                f"kept-{len(figures)}",
                "Kept channels",
                f"{name}: {reduction.method}, one row a head; blue is kept.",
                figure,
            )
        )
    return figures


def recovery_curves(recoveries: Sequence[tuple[str, Recovery]]) -> list[Figure]:
    """Losses along recovery training."""
    if not recoveries:
        return []
    figure = subplots(["held-out loss", "training loss"], height=420)
    for i, (name, recovery) in enumerate(recoveries):
        label = short(f"{name} (control)" if recovery.control else name)
        tokens = [p.tokens for p in recovery.curve]
        style: dict[str, Any] = line(i, dash="dot" if recovery.control else "solid")
        for column, values in enumerate(
            ([p.heldout_loss for p in recovery.curve], [p.train_loss for p in recovery.curve])
        ):
            figure.add_scatter(
                x=tokens,
                y=values,
                name=label,
                legendgroup=label,
                showlegend=column == 0,
                **style,
                **place(column),
            )
    figure.update_xaxes(title="tokens trained on", exponentformat="SI")
    figure.update_yaxes(title="nats per token", row=1, col=1)
    return [
        Figure(
            "recovery",
            "Recovery training",
            "Cross entropy along training. A control is the dense model trained on the same tokens.",
            figure,
        )
    ]
