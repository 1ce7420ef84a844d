"""How a checkpoint's makers would have it sampled: generation_config.json."""

import json
import math
from pathlib import Path
from typing import Any

LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (math.ulp(0), 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
}
"""What is taken from the file, and the smallest and the largest value of each that a request may have."""


def read_sampling(checkpoint: Path) -> tuple[dict[str, float], list[str]]:
    """The sampling that the file names, by field, and what is wrong with the rest of it, which is left out."""
    file = checkpoint / "generation_config.json"
    try:
        config: Any = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, RecursionError) as e:
        return {}, [f"no default sampling: {file} can't be read: {e}"]
    if not isinstance(config, dict):
        return {}, [f"no default sampling: {file} must be a JSON object, got {type(config).__name__}"]
    found: dict[str, float] = {}
    problems = []
    for name, (least, most) in LIMITS.items():
        value = config.get(name)
        if value is None:
            continue
        kinds = int if name == "top_k" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            problems.append(f"{file}: {name} is left out: {repr(value)[:50]} is no number in {_range(name)}")
        else:
            found[name] = value
    return found, problems


def _range(name: str) -> str:
    least, most = LIMITS[name]
    return f"(0, {most}]" if least == math.ulp(0) else f"[{least}, {most}]"
