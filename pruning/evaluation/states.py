"""What the recurrent states of real text hold: how much of their rank is used, and how well they are read.

The states are those that the layer really has, with its decay and its beta.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.layers import l2_normalise
from modeling.model import Model
from modeling.ops import RuleInputs, chunked_gated_delta_rule
from modeling.state import DeltaState, SequenceState
from pruning.errors import PruningError
from pruning.progress import Advance, no_progress

FIRST_POSITION = 32
NOISE = (0.0, 0.1, 0.2, 0.5, 1.0)
LAG = 64

PerHead = list[list[list[float]]]


@dataclass(frozen=True)
class Rank:
    """Rank utilisation of the state, (||S||_F^2 / ||S||_2^2) / min(d_k, d_v), a mean over windows."""

    windows: int
    positions: list[int]
    """How many tokens the state has seen at each point."""
    utilisation: PerHead
    """Rank utilisation, from 0 to 1, as `[layer][position][value head]`; the layers are the linear ones in order."""


@dataclass(frozen=True)
class Retrieval:
    """Errors of reads with noisy queries; docs/pruning.md defines both."""

    tokens: int
    noise: list[float]
    """Levels of noise: its norm over the norm of the query."""
    retrieval_error: PerHead
    """As `[layer][noise][value head]`, the mean sine of the angle between what a noisy key reads and the value it was
    stored with."""
    read_error: PerHead
    """As `[layer][noise][value head]`, how much noise on the model's own query changes a read: the norm of the change
    over that of the read. It is the median over tokens, since a read of almost nothing would rule the mean."""


def utilisation(state: Tensor) -> Tensor:
    """Stable rank over the largest possible rank, of states `[..., d_k, d_v]`; 0 for a state of zeros."""
    s = state.double()
    gram = s @ s.mT if s.shape[-2] <= s.shape[-1] else s.mT @ s
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    largest = squares[..., -1]
    stable = torch.where(largest > 0, squares.sum(-1) / largest.clamp(min=1e-300), 0.0)
    return stable / gram.shape[-1]


def positions(window: int) -> list[int]:
    """Powers of two from 32, and the end of the window."""
    found = []
    at = FIRST_POSITION
    while at < window:
        found.append(at)
        at *= 2
    return [*found, window]


@torch.no_grad()
def rank(model: Model, windows: Tensor, *, batch: int = 4, advance: Advance = no_progress) -> Rank:
    """Rank utilisation along `windows` int64 `[count, length]`.

    Raises:
        PruningError: a state is not finite.
    """
    count, length = windows.shape
    at = positions(length)
    sums = {
        layer: torch.zeros(len(at), mixer.num_v_heads, dtype=torch.float64)
        for layer, mixer in model.spec.deltas.items()
    }
    for rows in windows.to(model.device).split(batch):
        states: list[SequenceState] | None = None
        for i, piece in enumerate(rows.tensor_split(at[:-1], dim=1)):
            size = piece.shape[1]
            _, states = model(piece.flatten(), range(0, piece.numel() + 1, size), states)
            for layer, total in sums.items():
                state = states[layer]
                assert isinstance(state, DeltaState)
                if not bool(state.recurrent.isfinite().all()):
                    raise PruningError(f"layer {layer}: the state after {at[i]} tokens holds NaN or Inf")
                total[i] += utilisation(state.recurrent).sum(0).cpu()
        advance(rows.numel())
    return Rank(count, at, [(total / count).tolist() for total in sums.values()])


@torch.no_grad()
def retrieval(
    model: Model,
    windows: Tensor,
    *,
    noise: Sequence[float] = NOISE,
    seed: int = 0,
    batch: int = 4,
    advance: Advance = no_progress,
) -> Retrieval:
    """Errors of noisy reads on `windows` int64 `[count, length]`.

    Raises:
        PruningError: windows are of one token, which has none before it to read, or a read is not finite.
    """
    if windows.shape[1] < 2:
        raise PruningError(f"window={windows.shape[1]} leaves nothing to retrieve; give at least 2")
    readers = {layer: _Reader(noise, seed, layer) for layer in model.spec.linear_layers}
    current = 0

    def tap(layer: int, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal current
        current = layer
        return q, k

    def rule(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
        return readers[current](inputs)

    length = windows.shape[1]
    for rows in windows.to(model.device).split(batch):
        model(rows.flatten(), range(0, rows.numel() + 1, length), rule=rule, tap=tap)
        advance(rows.numel())
    errors = {layer: (reader.retrieval_error(), reader.read_error()) for layer, reader in readers.items()}
    for layer, found in errors.items():
        if not all(bool(values.isfinite().all()) for values in found):
            raise PruningError(f"layer {layer}: reads from the state hold NaN or Inf")
    return Retrieval(
        windows.numel(),
        list(noise),
        [found[0].tolist() for found in errors.values()],
        [found[1].tolist() for found in errors.values()],
    )


class _Reader:
    """Runs one layer's gated delta rule with other queries: the state does not depend on them."""

    def __init__(self, noise: Sequence[float], seed: int, layer: int) -> None:
        self._noise = noise
        self._generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        self._sines: list[Tensor | float] = [0.0] * len(noise)
        self._changes: list[list[Tensor]] = [[] for _ in noise]
        self._reads = 0

    def __call__(self, inputs: RuleInputs) -> tuple[Tensor, Tensor]:
        q, k, v = inputs.q, inputs.k, inputs.v
        o, state = chunked_gated_delta_rule(inputs)
        at, of = _earlier(inputs.cu_seqlens, self._generator)
        at, of = at.to(q.device), of.to(q.device)
        queries = torch.zeros_like(k).index_copy(0, at, k[of])
        self._reads += len(at)
        for i, level in enumerate(self._noise):
            read, _ = chunked_gated_delta_rule(replace(inputs, q=self._noisy(queries, level), scale=1.0))
            cosine = F.cosine_similarity(read[at].double(), v[of].double(), dim=-1)
            self._sines[i] = self._sines[i] + (1 - cosine.square()).clamp(min=0).sqrt().sum(0)
            noisy, _ = chunked_gated_delta_rule(replace(inputs, q=self._noisy(q, level)))
            self._changes[i].append(((noisy - o).norm(dim=-1) / o.norm(dim=-1).clamp(min=1e-30)).cpu())
        return o, state

    def _noisy(self, rows: Tensor, level: float) -> Tensor:
        """Gaussian noise of `level` times the row's norm (RMS), then normalised again as the layer does."""
        e = torch.randn(rows.shape, generator=self._generator).to(rows) * rows.shape[-1] ** -0.5
        return l2_normalise(rows + level * e * rows.norm(dim=-1, keepdim=True))

    def retrieval_error(self) -> Tensor:
        return torch.stack([torch.as_tensor(s) for s in self._sines]).cpu() / self._reads

    def read_error(self) -> Tensor:
        return torch.stack([torch.cat(changes).median(0).values for changes in self._changes])


def _earlier(cu_seqlens: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions that have an earlier one in their sequence, and one of the `LAG` before each, at random."""
    starts = torch.tensor(cu_seqlens[:-1]).repeat_interleave(torch.tensor(cu_seqlens).diff())
    position = torch.arange(len(starts)) - starts
    at = position.nonzero().squeeze(1)
    reach = position[at].clamp(max=LAG)
    back = 1 + (torch.rand(len(at), generator=generator) * reach).long().clamp(max=reach - 1)
    return at, at - back
