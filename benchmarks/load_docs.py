"""Put what `make loadtest` left into docs/loadtest.md: tables, and pictures of the pages.

python benchmarks/load_docs.py .cache/loadtest docs     # as `make loadtest-docs` does
"""

import argparse
import datetime as dt
import json
import os
import re
from pathlib import Path

from measure import machine

from loadtest.report import WIDTH
from pruning.report.png import screenshot

HEIGHTS = {"run": 720, "sweep": 440}
"""Of the pages' figures, in pixels."""


def put(text: str, name: str, block: str) -> str:
    """`text` with what stands between the marks of `name` replaced. Raises ValueError if the marks are not there."""
    begin, end = f"<!-- {name}: written by make loadtest-docs -->\n", f"<!-- /{name} -->"
    changed, n = re.subn(
        f"({re.escape(begin)}).*?({re.escape(end)})",
        lambda m: f"{m[1]}\n{block}\n{m[2]}",
        text,
        flags=re.DOTALL,
    )
    if n != 1:
        raise ValueError(f"{name} has {n} places marked with {begin.strip()} and {end}; one is right")
    return changed


def describe(results: Path) -> str:
    """What the test ran against, and on what."""
    models = json.loads((results / "run" / "loadtest.json").read_text())["models"]
    served = ", ".join(f"{m['id']} ({m['lowkey']['state_bytes']:,} state bytes)" for m in models)
    facts = machine()
    return (
        f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, {facts['cpu']}, {os.cpu_count()} CPUs, client and server "
        f"on the same ones, load average {facts['load'][2]:.1f} over the last 15 minutes. Variants: {served}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("docs", type=Path)
    options = parser.parse_args()
    results, docs = options.results.resolve(), options.docs.resolve()
    page = docs / "loadtest.md"
    text = put(page.read_text("utf-8"), "machine", describe(results) + "\n")
    for name, height in HEIGHTS.items():
        picture = docs / "images" / f"loadtest-{name}.png"
        screenshot(results / name / "loadtest.html", picture, WIDTH + 16, height + 16)
        text = put(text, name, (results / name / "loadtest.md").read_text("utf-8"))
    page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
