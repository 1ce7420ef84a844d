"""Draw the README's picture: what a smaller state saves, what it costs and how fast it is, in one plot.

python benchmarks/picture.py       # writes docs/images/tradeoff.svg, and tradeoff-narrow.svg for narrow screens

Bytes and perplexity are those of benchmarks/results/ladder/gdn-130m, tokens/s those of another model, in a table of
docs/gpu.md.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ladder" / "gdn-130m"
IMAGES = ROOT / "docs" / "images"
BATCH = 512
"""Requests of a step whose speed is drawn."""


@dataclass(frozen=True)
class Choice:
    """One row: what is done to the state."""

    name: str
    state_bytes: int
    """Bytes of state that a request holds."""
    rise: float
    """Rise in perplexity against the dense model with float32 states on the same tokens, in percent."""
    tokens_per_second: int | None
    """How many tokens decode steps with `BATCH` requests make in a second; None where it was not timed."""


def choices() -> list[Choice]:
    """The rows from the top, by what the raw results say."""
    evaluated = _read("recovered-64-and-32.json")
    bits = _read("bits-reduced-64.json")
    speed = _speed((ROOT / "docs" / "gpu.md").read_text("utf-8"))

    def of_weights(name: str, checkpoint: str, tokens_per_second: int | None) -> Choice:
        found = next(entry for entry in evaluated if entry["name"] == checkpoint)
        rise = _percent(found["perplexity"], evaluated[0]["perplexity"])
        return Choice(name, found["state_bytes"], rise, tokens_per_second)

    def of_bits(name: str, index: int, dtype: str, tokens_per_second: int | None) -> Choice:
        found = _dtype(bits[index], dtype)
        rise = _percent(found["perplexity"], _dtype(bits[0], "float32")["perplexity"])
        return Choice(name, found["state_bytes"], rise, tokens_per_second)

    return [
        of_weights("dense, float32", "model", speed["float32, d_k 128"]),
        of_bits("states in bfloat16", 0, "bfloat16", None),
        of_bits("states in int8", 0, "int8", speed["int8, d_k 128"]),
        of_weights("half the channels, per layer, recovered", "per-layer-64-full", None),
        of_weights("half the channels, one width, recovered", "reduced-64-full", speed["float32, d_k 64"]),
        of_bits("half the channels, one width, int8", 1, "int8", speed["int8, d_k 64"]),
    ]


def _read(name: str) -> list[dict]:
    return json.loads((RESULTS / name).read_text("utf-8"))["checkpoints"]


def _dtype(checkpoint: dict, dtype: str) -> dict:
    return next(found for found in checkpoint["bits"] if found["state_dtype"] == dtype)


def _percent(measured: dict, dense: dict) -> float:
    return 100 * (measured["perplexity"] / dense["perplexity"] - 1)


def _speed(page: str) -> dict[str, int]:
    """Tokens/s by dtype and width of the states, from the table of the engine in "States in 8 bits"."""
    table = page.split("### States in 8 bits")[1].split("\nEngine (")[1]
    header, row = re.search(rf"(\| batch .*?)\n(?:\|.*\n)*?(\| {BATCH} .*)\n", table).groups()
    names, cells = ([cell.strip() for cell in line.split("|")[2:-1]] for line in (header, row))
    return {name: int(cell.split()[0].replace(",", "")) for name, cell in zip(names, cells, strict=True)}


@dataclass(frozen=True)
class Layout:
    """Where things stand, in the picture's own pixels."""

    width: int
    left: int
    """Where the names of rows begin."""
    top: int
    """Where the first row begins."""
    row: int
    """Height of a row."""
    bars: int
    """How far below the top of its row a bar begins: 0 beside the row's name, more for bars below it."""
    columns: tuple[int, int, int]
    """Where the bars of each column begin."""
    longest: int
    """Length of the longest bar of a column; the figure stands behind it."""
    titles: tuple[str, str, str]
    sources: tuple[str, ...]


WIDE = Layout(
    width=880,
    left=24,
    top=108,
    row=38,
    bars=0,
    columns=(326, 512, 704),
    longest=96,
    titles=("State of a request", "Rise in perplexity", "Tokens/s"),
    sources=(
        "Bytes and perplexity: a trained Gated DeltaNet of 135.6 M parameters, held-out code (docs/evidence.md).",
        f"Tokens/s: another model, of a 1.3B shape with random weights, {BATCH} requests on an H200 (docs/gpu.md).",
    ),
)
NARROW = Layout(
    width=400,
    left=16,
    top=108,
    row=60,
    bars=24,
    columns=(16, 148, 276),
    longest=50,
    titles=("State", "Perplexity", "Tokens/s"),
    sources=(
        "Bytes and perplexity: a trained Gated DeltaNet of 135.6 M",
        "parameters, held-out code, 2,048 tokens (docs/evidence.md).",
        "Tokens/s: another model, of a 1.3B shape with random",
        f"weights, decode steps of {BATCH}, one H200 (docs/gpu.md).",
    ),
)
TITLE = "A smaller state: gains and costs"
PICTURES = {"tradeoff.svg": WIDE, "tradeoff-narrow.svg": NARROW}
"""Layouts by the files that they are drawn into."""


def draw(rows: list[Choice], layout: Layout) -> str:
    """The picture as SVG, for a light and a dark page."""
    bottom = layout.top + layout.row * len(rows)
    height = bottom + 26 + 18 * len(layout.sources)
    heard = escape(_words(rows))
    size = f"{layout.width} {height}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="{heard}">',
            f"<style>{STYLE}</style>",
            f'<rect class="back" width="{layout.width}" height="{height}" rx="8"/>',
            _text(layout.left, 36, TITLE, "title"),
            *_columns(rows, layout),
            *(
                _text(layout.left, bottom + 28 + 18 * i, line, "soft")
                for i, line in enumerate(layout.sources)
            ),
            "</svg>\n",
        ]
    )


STYLE = """
text{font:14px system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;fill:#1c2430}
.title{font-size:19px;font-weight:600}.head{font-weight:600}.soft{font-size:12px;fill:#56616f}
.back{fill:#fff}.line{stroke:#d9dee5}
.a{fill:#2f7ed8}.b{fill:#e8792b}.c{fill:#2aa876}
@media (prefers-color-scheme:dark){text{fill:#dfe5ec}.soft{fill:#9aa6b4}.back{fill:#14191f}.line{stroke:#333c48}}
"""


def _columns(rows: list[Choice], layout: Layout) -> Iterator[str]:
    dense = rows[0]
    better = ("less is better", "less is better", "more is better")
    values = [(row.state_bytes, row.rise, row.tokens_per_second or 0) for row in rows]
    most = [max(column) for column in zip(*values, strict=True)]
    for x, title, words in zip(layout.columns, layout.titles, better, strict=True):
        yield _text(x, layout.top - 36, title, "head")
        yield _text(x, layout.top - 18, words, "soft")
    for i, (row, measured) in enumerate(zip(rows, values, strict=True)):
        top = layout.top + layout.row * i
        yield f'<path class="line" d="M{layout.left} {top - 8}H{layout.width - layout.left}"/>'
        yield _text(layout.left, top + 16, row.name)
        figures = (
            f"{row.state_bytes / 1e6:.2f} MB",
            "0" if row is dense else _rise(row),
            "not timed"
            if row.tokens_per_second is None
            else f"{row.tokens_per_second / dense.tokens_per_second:.2f}x",
        )
        y = top + layout.bars
        for kind, x, value, longest, words in zip(
            "abc", layout.columns, measured, most, figures, strict=True
        ):
            length = round(layout.longest * value / longest, 1)
            if length:
                yield f'<rect class="{kind}" x="{x}" y="{y + 1}" width="{length}" height="20" rx="2"/>'
            yield _text(
                x + length + (8 if length else 0), y + 16, words, "soft" if words == "not timed" else ""
            )


def _rise(row: Choice) -> str:
    return f"+{row.rise:.{2 if row.rise < 1 else 1}f} %"


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(words)}</text>'


def _words(rows: list[Choice]) -> str:
    """What the picture shows, for those who hear it."""
    return "; ".join(
        f"{row.name}: {row.state_bytes / 1e6:.2f} MB of state a request, perplexity {_rise(row)}"
        + (f", {row.tokens_per_second:,} tokens/s" if row.tokens_per_second else "")
        for row in rows
    )


if __name__ == "__main__":
    for name, layout in PICTURES.items():
        (IMAGES / name).write_text(draw(choices(), layout), "utf-8")
