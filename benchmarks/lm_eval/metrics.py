"""What lm-evaluation-harness makes of one answer, over all distances and for the range that its distance falls into."""

from collections.abc import Sequence
from typing import Any


def identifiers(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """`results` has the log-probability of the target and whether each of its tokens is the most likely one."""
    ((log_prob, greedy),) = results
    return {"log_prob": log_prob, "acc": float(greedy), f"acc_{doc['around']}": float(greedy)}


def lines(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`results` has the text up to the end of the line."""
    (text,) = results
    right = float(text == doc["target"])
    return {"exact_match": right, f"exact_match_{doc['around']}": right}
