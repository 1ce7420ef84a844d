"""Multi-query associative recall (MQAR, arXiv 2312.04927, section 3.2) in the checkpoint's own tokens.

A prompt is N key-value pairs of single tokens, then every key again in another order, each followed by its value:

    k1 v1 k2 v2 ... kN vN  k_p1 v_p1 ... k_pN v_pN

The model has to say v_pi at k_pi. Keys and values of a prompt are 2 N different words, so the pairs are arbitrary and
nothing but the prompt can tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling.model import Model
from modeling.ops import wide
from pruning.calibration import Encoder
from pruning.errors import PruningError
from pruning.progress import Advance, no_progress

PAIRS = (4, 8, 16, 32, 64)
QUERIES = 512
"""How many queries there are, about, for each number of pairs."""
_WORDS = 1024
"""How many of the tokenizer's words keys and values are drawn from."""


@dataclass(frozen=True)
class Prompts:
    """Prompts of one number of pairs."""

    ids: Tensor
    """int64 `[prompts, start + 4 * pairs]`; `start` is 1 for a model with an end-of-text token, else 0."""
    start: int
    pairs: int

    @property
    def queries(self) -> Tensor:
        """Positions of the query keys, `[pairs]`; each answer is one further."""
        return self.start + 2 * self.pairs + 2 * torch.arange(self.pairs)


@dataclass(frozen=True)
class Recall:
    """How well the values of one number of pairs are recalled."""

    pairs: int
    queries: int
    accuracy: float
    """Share of queries where the value is the most likely token of the whole vocabulary."""
    accuracy_among_values: float
    """Share of queries where the value is the most likely of the prompt's values; by chance it is 1 / pairs."""
    log_prob: float
    """Mean log-probability of the value, in nats."""


def recall_prompts(
    encoder: Encoder, *, pairs: Sequence[int] = PAIRS, queries: int = QUERIES, seed: int = 0
) -> list[Prompts]:
    """Prompts for each number of pairs that the tokenizer has words for, about `queries` queries each.

    Raises:
        PruningError: the tokenizer has too few words for the smallest number.
    """
    words = np.array(encoder.words()[:_WORDS])
    possible = [n for n in pairs if 2 * n <= len(words)]
    if not possible:
        raise PruningError(
            f"the tokenizer has {len(words)} tokens that are plain words; {min(pairs)} pairs need {2 * min(pairs)}"
        )
    result = []
    for n in possible:
        generator = np.random.default_rng([seed, n])
        rows = [_prompt(generator, words, n, encoder.separator) for _ in range(-(-queries // n))]
        result.append(Prompts(torch.tensor(np.stack(rows)), len(encoder.separator), n))
    return result


def _prompt(generator: np.random.Generator, words: np.ndarray, n: int, start: Sequence[int]) -> np.ndarray:
    pairs = generator.choice(words, (n, 2), replace=False)
    return np.concatenate([start, pairs.ravel(), generator.permutation(pairs).ravel()]).astype(np.int64)


@torch.no_grad()
def recall(
    model: Model, prompts: Sequence[Prompts], *, batch: int = 16, advance: Advance = no_progress
) -> list[Recall]:
    """Ask the model, `batch` prompts at a time.

    Raises:
        PruningError: a log-probability is not finite.
    """
    return [_recall(model, p, batch, advance) for p in prompts]


def _recall(model: Model, prompts: Prompts, batch: int, advance: Advance) -> Recall:
    device = model.embeddings.weight.device
    at = prompts.queries.to(device)
    answers = Answers(prompts, device)
    for rows in prompts.ids.to(device).split(batch):
        count, length = rows.shape
        hidden, _ = model(rows.flatten(), range(0, count * length + 1, length))
        logits = wide(model.logits(hidden.view(count, length, -1)[:, at].flatten(0, 1)))
        logits = logits.view(count, prompts.pairs, -1)
        for query in range(prompts.pairs):
            answers.add(rows, query, logits[:, query].log_softmax(-1))
        advance(rows.numel())
    return answers.recall()


class Answers:
    """Counts how well a model answers the queries of `prompts`."""

    def __init__(self, prompts: Prompts, device: torch.device) -> None:
        self._prompts = prompts
        self._at = prompts.queries.to(device)
        self._hits = torch.zeros((), dtype=torch.int64, device=device)
        self._among = torch.zeros((), dtype=torch.int64, device=device)
        self._log_prob = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, rows: Tensor, query: int, log_probs: Tensor) -> None:
        """Count the answers to one query of several prompts.

        Args:
            rows: the prompts, int64 `[n, length]`.
            query: which of their queries, from 0.
            log_probs: `[n, vocab]`, what the model makes of the next token there.
        """
        values = rows[:, self._at + 1]
        value = values[:, query, None]
        self._log_prob += log_probs.gather(-1, value).sum(dtype=torch.float64)
        self._hits += (log_probs.argmax(-1, keepdim=True) == value).sum()
        # The values of a prompt, in the order of the queries: query i is right if it finds the i-th.
        self._among += (log_probs.gather(-1, values).argmax(-1) == query).sum()

    def recall(self) -> Recall:
        """The figures, once all queries of all prompts are counted.

        Raises:
            PruningError: a log-probability is not finite.
        """
        pairs = self._prompts.pairs
        queries = self._prompts.ids.shape[0] * pairs
        if not bool(self._log_prob.isfinite()):
            raise PruningError(f"recall of {pairs} pairs: the model gives NaN or Inf")
        hits, among = int(self._hits), int(self._among)
        return Recall(pairs, queries, hits / queries, among / queries, float(self._log_prob) / queries)
