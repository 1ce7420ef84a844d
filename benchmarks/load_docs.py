"""Put what `make loadtest` left into docs/loadtest.md: tables, and pictures of the pages.

python benchmarks/load_docs.py .cache/loadtest docs     # as `make loadtest-docs` does
"""

import argparse
import re
import tempfile
from pathlib import Path

from pruning.report.png import screenshot

WIDTH = 1000
HEIGHTS = {"run": 724, "sweep": 364}
"""What the plots of each test take on a page of that width, in pixels."""
ONLY_PLOTS = """<style>
h1, p, section:not(.plots) { display: none; }
main { max-width: none !important; padding: 8px !important; }
.plots { margin: 0 !important; }
</style></head>"""


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


def draw(page: Path, picture: Path, height: int) -> None:
    """A picture of a report's plots, without its tables."""
    with tempfile.TemporaryDirectory() as scratch:
        plots = Path(scratch) / "plots.html"
        plots.write_text(page.read_text("utf-8").replace("</head>", ONLY_PLOTS, 1), "utf-8")
        screenshot(plots, picture, WIDTH, height)


def write(results: Path, docs: Path) -> None:
    page = docs / "loadtest.md"
    text = page.read_text("utf-8")
    for name, height in HEIGHTS.items():
        draw(results / name / "loadtest.html", docs / "images" / f"loadtest-{name}.png", height)
        text = put(text, name, (results / name / "loadtest.md").read_text("utf-8"))
    page.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("docs", type=Path)
    options = parser.parse_args()
    write(options.results.resolve(), options.docs.resolve())


if __name__ == "__main__":
    main()
