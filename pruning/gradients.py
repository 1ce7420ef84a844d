"""Gradient statistics: how the loss on the calibration text depends on each key channel.

L is the negative log-likelihood (a sum, in nats) of one window, every document in it from an empty state. Two things
are kept, both sums over windows, in float64:

- dL/dWq and dL/dWk of the q and k projections, for first-order scores (LLM-Pruner, arXiv 2305.11627, eq. 3);
- the Fisher information of a gate z = 1 on each channel of q and of k after convolution and SiLU:
  F_c = sum over windows of (dL/dz_qc + dL/dz_kc)^2.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.model import Model
from modeling.ops import wide
from pruning.calibration import cu_seqlens
from pruning.errors import PruningError

GradientName = Literal["q_gradient", "k_gradient", "gate_fisher"]
"""Gradients of the q and k projections, `[num_k_heads, d_k, hidden]`, and the gates' Fisher information,
`[num_k_heads, d_k]`."""

GRADIENTS: tuple[GradientName, ...] = get_args(GradientName)


def need_gradients(names: Collection[str]) -> bool:
    """Whether statistics of these names take a backward pass."""
    return not {*GRADIENTS}.isdisjoint(names)


def check_predicts(window_length: int) -> None:
    """Raises PruningError for windows that have no token to predict, and so no loss."""
    if window_length < 2:
        raise PruningError(f"window_length={window_length} leaves no token to predict; give at least 2")


def add_gradients(model: Model, windows: Tensor, sums: Mapping[int, Mapping[Any, Tensor]]) -> Iterator[int]:
    """Run `windows` int64 `[count, length]` forward and backward, one at a time, and add to `sums`.

    Args:
        sums: Float64 sums of each linear-attention layer by its index, and by name. Those whose name is no
            `GradientName` are left alone.

    Yields:
        The tokens of each window, once all of it has been added.

    Raises:
        PruningError: a window has no token to predict, a gradient is not finite, or a layer's tap missed tokens.
    """
    check_predicts(windows.shape[1])
    weights = {layer: mixer.in_proj.weight for layer, mixer in model.deltas.items()}
    for window in windows.to(model.device):
        with _gradients_of(weights.values()):
            for layer, found in _of_window(model, window, weights):
                for name, value in found.items():
                    if name not in sums[layer]:
                        continue
                    if not bool(value.isfinite().all()):
                        raise PruningError(
                            f"layer {layer}: {name} holds NaN or Inf; the loss has no gradient there"
                        )
                    value = value.to(sums[layer][name])
                    sums[layer][name].add_(value.square() if name == "gate_fisher" else value)
        yield len(window)


def _of_window(
    model: Model, window: Tensor, weights: Mapping[int, Tensor]
) -> Iterator[tuple[int, dict[GradientName, Tensor]]]:
    """Each linear-attention layer's index and the gradients of the loss on one window `[length]`. Those of the gates
    are not yet squared.

    Args:
        weights: The fused input projections by the index of their layer.
    """
    deltas = model.spec.deltas
    gates = {i: weights[i].new_ones(m.num_k_heads, m.d_k).requires_grad_() for i, m in deltas.items()}
    tokens = dict.fromkeys(deltas, 0)

    # One gate on both q and k: its gradient is the sum of those of a gate on each.
    def tap(layer: int, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        tokens[layer] += q.shape[0]
        return q * gates[layer], k * gates[layer]

    hidden, _ = model(window, cu_seqlens(window[None], model.spec.eos_token_ids), tap=tap)
    for layer, seen in tokens.items():
        if seen != len(window):
            raise PruningError(
                f"layer {layer}: the tap saw {seen} of {len(window)} tokens; its gate is no gate"
            )
    loss = F.cross_entropy(wide(model.logits(hidden[:-1])), window[1:], reduction="sum")
    found = torch.autograd.grad(loss, [*gates.values(), *weights.values()])
    pairs = zip(found[: len(gates)], found[len(gates) :], strict=True)
    for (layer, m), (gate, weight) in zip(deltas.items(), pairs, strict=True):
        q, k = weight[: 2 * m.key_dim].view(2, m.num_k_heads, m.d_k, -1)
        yield layer, {"q_gradient": q, "k_gradient": k, "gate_fisher": gate}


@contextmanager
def _gradients_of(weights: Collection[Tensor]) -> Iterator[None]:
    """Grad mode on, and `weights` require gradients, inside the block only."""
    before = [w.requires_grad for w in weights]
    try:
        for w in weights:
            w.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for w, required in zip(weights, before, strict=True):
            w.requires_grad_(required)
