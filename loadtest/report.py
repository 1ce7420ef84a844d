"""What is left of a test: JSON with every request, tables in Markdown, and a page that needs no network."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from loadtest.client import quantile
from loadtest.facts import sentence
from loadtest.figures import FIGURES, MIN_ROUNDS, Objectives, Ratio, Slice, observe, ratios
from loadtest.page import Row, page
from loadtest.plots import Plot
from loadtest.run import Search
from lowkey.files import Found
from lowkey.publishing import new_file, write_all
from lowkey.words import Judged, Mark

LABELS = {
    "tokens_per_second": "tokens/s",
    "goodput_per_second": "goodput, requests/s",
    "ttft_p50_s": "TTFT median, ms",
    "ttft_p95_s": "TTFT p95, ms",
    "ttft_p99_s": "TTFT p99, ms",
    "itl_p50_s": "ITL median, ms",
    "itl_p95_s": "ITL p95, ms",
    "itl_p99_s": "ITL p99, ms",
    "total_p50_s": "end to end median, ms",
    "total_p95_s": "end to end p95, ms",
    "total_p99_s": "end to end p99, ms",
    "state_bytes": "state bytes per request",
}
PAIRED = (
    "Tokens and latencies are those of requests without an error; latencies count from when a request was due. "
    "Ratios are to the first variant, in brackets their 95 % intervals from drawing rounds with replacement; with "
    f"fewer than {MIN_ROUNDS} rounds there is none. ▲ better, ▼ worse than the first; without a mark the interval "
    "holds 1."
)
SWEPT = (
    "The highest rate that kept the objectives and the lowest that did not; the limit is between them. Ratios are to "
    "the first variant, in brackets what they can be at the ends of both ranges: no statistical interval."
)
"""`PAIRED` and `SWEPT` say how to read the tables."""
HIGHER = ("tokens_per_second", "goodput_per_second")
"""Figures of which more is better; of all others less is."""
EXACT = ("state_bytes",)
"""Figures that no noise of the machine touches, so that their ratios need no interval."""

FILES = ("loadtest.json", "loadtest.md", "loadtest.html")


def clean(value: Any) -> Any:
    """The value with None in place of every number that JSON can't write: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: clean(v) for key, v in value.items()}
    if isinstance(value, list):
        return [clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(slices: Sequence[Slice], variants: Sequence[str], objectives: Objectives) -> dict[str, Any]:
    """Figures of each variant, and each one's ratios to the first."""
    answer: dict[str, Any] = {"variants": {}, "ratios": {}}
    for variant in variants:
        mine = [s for s in slices if s.variant == variant]
        seen = observe(mine, objectives)
        lags = [r.lag_s for s in mine for r in s.results]
        answer["variants"][variant] = {
            "requests": seen.requests,
            "errors": seen.errors,
            "good": seen.good,
            "seconds": seen.seconds,
            "client_lag_p99_s": quantile(lags, 0.99),
            **{name: figure(seen) for name, figure in FIGURES.items()},
        }
    for variant in variants[1:]:
        of = ratios(slices, variant, variants[0], objectives)
        answer["ratios"][f"{variant}/{variants[0]}"] = {name: asdict(ratio) for name, ratio in of.items()}
    return answer


def requests_of(slices: Sequence[Slice]) -> list[dict[str, Any]]:
    """Every request, times in seconds from when it was due."""
    return [
        {
            "variant": s.variant,
            "round": s.round,
            "lag_s": r.lag_s,
            "tokens": r.tokens,
            "state_bytes": r.state_bytes,
            "error": r.error,
            "total_s": r.ended - r.sent,
            "token_s": [round(t - r.sent, 6) for t in r.token_times],
        }
        for s in slices
        for r in s.results
    ]


def _cell(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if name == "state_bytes":
        return f"{value:,.0f}"
    return f"{1e3 * value:.1f}" if name.endswith("_s") else f"{value:.2f}"


def _ratio(name: str, ratio: Ratio) -> str:
    if name in EXACT or not math.isfinite(ratio.value):
        return _value(ratio)
    return f"{_value(ratio)} ({_interval(ratio) or 'too few rounds'})"


def _value(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}" if math.isfinite(ratio.value) else "-"


def _interval(ratio: Ratio) -> str:
    return f"{ratio.low:.2f} to {ratio.high:.2f}" if math.isfinite(ratio.low) else ""


def table(described: dict[str, Any]) -> list[list[str]]:
    """Header and rows: each figure of each variant, then the ratios with their intervals."""
    variants, quotients = described["variants"], described["ratios"]
    rows = [["", *variants, *quotients]]
    for name, label in (("requests", "requests"), ("errors", "errors")):
        rows.append([label, *(str(v[name]) for v in variants.values()), *("" for _ in quotients)])
    for name, label in LABELS.items():
        cells = [_cell(name, v[name]) for v in variants.values()]
        rows.append([label, *cells, *(_ratio(name, Ratio(**of[name])) for of in quotients.values())])
    return rows


def marked(described: dict[str, Any]) -> list[Row]:
    """The rows of `table` with a mark on each ratio whose interval says that it is better or worse."""
    header, requests, errors, *rows = table(described)
    first = 1 + len(described["variants"])
    judged: list[Row] = [
        [
            *row[:first],
            *(
                Judged(cell, _mark(name, Ratio(**of[name])))
                for cell, of in zip(row[first:], described["ratios"].values(), strict=True)
            ),
        ]
        for name, row in zip(LABELS, rows, strict=True)
    ]
    return [header, requests, errors, *judged]


def _mark(name: str, ratio: Ratio) -> Mark:
    low, high = (ratio.value, ratio.value) if name in EXACT else (ratio.low, ratio.high)
    if low <= 1 <= high or not math.isfinite(low):
        return ""
    return "better" if (low > 1) == (name in HIGHER) else "worse"


def finding(described: dict[str, Any]) -> str:
    """What came out of a run, in a sentence for each variant but the first."""
    baseline = next(iter(described["variants"]))
    said = []
    for quotient, of in described["ratios"].items():
        speed, state = (Ratio(**of[name]) for name in ("tokens_per_second", "state_bytes"))
        said.append(
            f"{quotient.removesuffix(f'/{baseline}')} made {_times(speed, baseline)}, with {_value(state)} of its "
            "state bytes."
        )
    return " ".join(said)


def _times(speed: Ratio, baseline: str) -> str:
    """How many times the baseline's tokens/s, and whether that says anything."""
    if not (interval := _interval(speed)):
        return f"{_value(speed)} times the tokens/s of {baseline} in too few rounds to tell them apart"
    doubt = ", which does not tell them apart" if speed.low <= 1 <= speed.high else ""
    return f"{_value(speed)} ({interval}) times the tokens/s of {baseline}{doubt}"


def sweep_finding(searches: dict[str, Search]) -> str:
    """What came out of a sweep, in one sentence."""
    held = [
        f"{variant} at least {search.low:.1f}"
        if search.high is None
        else f"{variant} between {search.low:.1f} and {search.high:.1f}"
        for variant, search in searches.items()
    ]
    return f"Requests/s that each variant holds: {', '.join(held)}."


def sweep_table(searches: dict[str, Search]) -> list[list[str]]:
    """Header and rows: between which rates each variant's limit is, and between which values its ratio to the first."""
    first = next(iter(searches.values()))
    rows = [["", "holds, requests/s", "does not hold", "ratio"]]
    for variant, search in searches.items():
        high = "-" if search.high is None else f"{search.high:.2f}"
        rows.append([variant, f"{search.low:.2f}", high, _limits(search, first)])
    return rows


def _limits(search: Search, first: Search) -> str:
    if search is first:
        return "1.00"
    if not first.low or first.high is None or search.high is None:
        return "-"  # an open end: it could be anything
    low, high = search.low / first.high, search.high / first.low
    return f"{search.low / first.low:.2f} ({low:.2f} to {high:.2f})"


def _plain(text: str) -> str:
    """Text of the server's on one line of Markdown, whatever it holds."""
    return " ".join(escape(text, quote=False).replace("|", "\\|").split())


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]]) + "\n"


def write(
    directory: Path,
    data: dict[str, Any],
    rows: list[list[str]],
    plots: Sequence[Plot],
    title: str,
    finding: str,
    caption: str,
    *,
    replaces: Mapping[str, Found | None],
) -> None:
    """`loadtest.json`, `loadtest.md` and `loadtest.html` (with plotly in it), each whole or not at all.

    Args:
        data: the JSON: `facts.circumstances`, the options and the figures.
        rows: header and rows of the table of figures.
        title: the test in words.
        finding: what came out, in words.
        caption: how to read the table.
        replaces: What each of `FILES` may replace, as `found_at` saw it before the load.

    Raises:
        OutputTakenError: one of them has appeared meanwhile; the result is beside it. All the others are written.
        OutputError: one of them can't be written.
    """
    texts = {
        "loadtest.json": json.dumps(clean(data), allow_nan=False),
        "loadtest.md": f"{title}.\n\n{_plain(finding)} {_plain(sentence(data))}\n\n{markdown(rows)}",
        "loadtest.html": page(
            title, finding, caption, data, marked(data) if "ratios" in data else rows, plots
        ),
    }

    def write_one(name: str) -> None:
        with new_file(directory / name, replaces=replaces[name]) as temporary:
            temporary.write_text(texts[name], "utf-8")

    write_all(*(partial(write_one, name) for name in texts))
