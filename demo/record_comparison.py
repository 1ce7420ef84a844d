"""Record the comparison that the compare page shows before there is one: ask a running `make demo` and write JSON.

    python demo/record_comparison.py http://127.0.0.1:8000

Its speeds are those of that moment, so let the machine have nothing else to do. A server reads the file when it starts:
start it anew for the picture in the docs.

    chromium --headless --no-sandbox --hide-scrollbars --virtual-time-budget=4000 --window-size=1280,1250 \\
        --screenshot=docs/images/compare.png http://127.0.0.1:8000
"""

import argparse
import datetime as dt
import json
import os
from pathlib import Path
from typing import Any

import httpx

from loadtest.facts import processor

OUT = Path(__file__).parents[1] / "server" / "api" / "operations" / "page" / "recorded.json"
VARIANTS = ["dense", "reduced"]
PROMPT = 'import os\n\n\ndef read_lines(path):\n    """Return the lines of a file."""\n'
SETTINGS = {"max_tokens": 96, "temperature": 0.6, "seed": 5}
TIMED_RUNS = 11


def compare(client: httpx.Client) -> tuple[dict[str, Any], dict[str, list[list[float]]]]:
    """The answer of one comparison, its variants one after the other, and [seconds, tokens so far] of each variant."""
    body = {"prompt": PROMPT, "variants": VARIANTS, "baseline": VARIANTS[0], **SETTINGS, "stream": True}
    points: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    with client.stream("POST", "/v1/compare", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["object"] == "compare":
                return event, points
            seconds = (event["lowkey"]["ttft_s"] or 0) + (event["lowkey"]["decode_s"] or 0)
            points[event["variant"]].append([seconds, event["usage"]["completion_tokens"]])
    raise RuntimeError("the stream ended without an answer")


def timing(answer: dict[str, Any]) -> dict[str, Any]:
    """What the page keeps of a timed run (`timingOf` in timing.js)."""
    return {
        result["variant"]: {
            "speed": result["lowkey"]["tokens_per_second"],
            "ttftS": result["lowkey"]["ttft_s"],
            "ratio": (result["against_baseline"] or {}).get("tokens_per_second_ratio"),
        }
        for result in answer["results"]
    }


def rounded(value: Any) -> Any:
    """The same with numbers of 6 significant digits, which is more than the page shows."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def record(url: str) -> dict[str, Any]:
    """An entry of the page's history (`shown` in compare.js), and in words when and on what it was made."""
    with httpx.Client(base_url=url, timeout=600) as client:
        models = {model["id"]: model["lowkey"] for model in client.get("/v1/models").json()["data"]}
        compare(client)  # the first one finds cold caches
        runs = [compare(client) for _ in range(TIMED_RUNS)]
    answer, points = runs[0]
    widths = " and ".join(str(models[name]["d_k"]) for name in VARIANTS)
    today = dt.datetime.now(dt.UTC)
    return rounded(
        {
            "name": "Recorded",
            "when": f"{today.day} {today:%B %Y}",
            "models": f"a Gated DeltaNet of 6.3 M parameters at d_k {widths}",
            "machine": f"{os.cpu_count()} cores of {processor()}",
            "input": {
                "chat": False,
                "prompt": PROMPT,
                "system": "",
                "thinking": "",
                "thread": [],
                "variants": VARIANTS,
                "ignore_eos": False,
                "settings": {name: str(value) for name, value in SETTINGS.items()},
            },
            "thinks": False,
            "answer": answer,
            "points": [points[name] for name in VARIANTS],
            "timings": [timing(each) for each, _ in runs],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    options.out.write_text(json.dumps(record(options.url), ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
