"""What a model, or a reduction of it, is worth: one file for each kind of measurement; `suite` runs them all."""

from pruning.evaluation.likelihood import Divergence, Perplexity, compare, evaluation_json, perplexity
from pruning.evaluation.windows import DEFAULT_TOKENS, evaluation_windows

__all__ = [
    "DEFAULT_TOKENS",
    "Divergence",
    "Perplexity",
    "compare",
    "evaluation_json",
    "evaluation_windows",
    "perplexity",
]
