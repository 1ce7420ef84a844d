"""Vectorised sampling whose draws depend on (seed, choice, position) only.

Each draw is one uniform number from a counter-based generator, looked up in the cumulative distribution over token
ids. So a request draws the same tokens whatever it is batched with, and a small change of the logits changes a token
only where the number falls that close to a boundary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.engine.messages import Sampling

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that passes BigCrush as a counter generator."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)) & _MASK
        x = ((x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)) & _MASK
        x = ((x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)) & _MASK
        result: np.ndarray = x ^ (x >> np.uint64(31))
    return result


def uniform(seeds: list[int], choices: list[int], positions: list[int]) -> np.ndarray:
    """Numbers in [0, 1), float64 `[n]`, each a function of its own (seed, choice, position)."""
    x = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    x = _splitmix64(x)
    x = _splitmix64(x ^ np.array(choices, dtype=np.uint64))
    x = _splitmix64(x ^ np.array(positions, dtype=np.uint64))
    result: np.ndarray = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


@dataclass(frozen=True)
class SamplingBatch:
    """The rows to sample: parameters, and for each row the index (from 0) of the token that it samples."""

    rows: list[Sampling]
    positions: list[int]


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set what top-k, then top-p, then min-p exclude to -inf; the most likely token always stays.

    Args:
        logits: `[n, vocab]`, already divided by the temperature.
        top_k: int64 `[n]`, 0 for off.
        top_p, min_p: `[n]`.
    """
    vocab = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)
    drop = (top_k[:, None] > 0) & (rank >= top_k[:, None])
    probs = ordered.masked_fill(drop, float("-inf")).softmax(-1)
    # A token stays when the mass before it is under top_p.
    # 1 is off exactly: rounding may take the mass before the last tokens to 1.
    drop |= (top_p[:, None] < 1) & ((probs.cumsum(-1) - probs) >= top_p[:, None])
    drop |= probs < min_p[:, None] * probs[:, :1]
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Next token of each row: logits `[n, vocab]` -> int64 `[n]`, on the logits' device."""
    tokens = logits.argmax(-1)
    drawn = [i for i, row in enumerate(batch.rows) if row.temperature > 0]
    if not drawn:
        return tokens
    rows = [batch.rows[i] for i in drawn]
    device = logits.device
    index = torch.tensor(drawn, device=device)
    temperature = torch.tensor([row.temperature for row in rows], dtype=torch.float64, device=device)
    scaled = logits[index].double()
    # The largest is 0 before it is divided: however small the temperature, no infinity meets another.
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / temperature[:, None]
    if any(row.top_k > 0 or row.top_p < 1 or row.min_p > 0 for row in rows):
        scaled = filter_logits(
            scaled,
            torch.tensor([row.top_k for row in rows], device=device),
            torch.tensor([row.top_p for row in rows], dtype=torch.float64, device=device),
            torch.tensor([row.min_p for row in rows], dtype=torch.float64, device=device),
        )
    cumulative = scaled.softmax(-1).cumsum(-1)
    u = uniform([row.seed for row in rows], [row.choice for row in rows], [batch.positions[i] for i in drawn])
    target = torch.from_numpy(u).to(device)[:, None] * cumulative[:, -1:]
    # right=True: the first token whose cumulative mass exceeds the target, so never one of zero probability.
    drawn_tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    # Beyond the end only where the logits are not numbers; an id outside the vocabulary would end the engine.
    tokens[index] = drawn_tokens.clamp(max=logits.shape[-1] - 1)
    return tokens
