"""Back ends: what computes a model for serving, chosen once when the model is loaded and reported by name."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch.nn.functional as F
from torch import Tensor

from lowkey import how_to_install
from modeling.layers import Block, BlockStep, Mixer, MixerInputs, MixerStep
from modeling.ops import GatedDeltaRule, UnavailableError, chunked_gated_delta_rule
from modeling.state import SequenceState, StatePool

if TYPE_CHECKING:
    from modeling.model import Model

logger = logging.getLogger("lowkey.modeling")


class Decode(Protocol):
    """The decode step of a whole model: `Model.decode`."""

    def __call__(self, model: "Model", input_ids: Tensor, pool: StatePool, slots: Tensor, /) -> Tensor: ...


class Prefill(Protocol):
    """Packed sequences through a whole model, without gradients: `Model.forward`."""

    def __call__(
        self, model: "Model", input_ids: Tensor, cu_seqlens: Sequence[int], state: SequenceState | None, /
    ) -> tuple[Tensor, SequenceState]: ...


@dataclass(frozen=True)
class Backend:
    """The sequence form of the gated delta rule (prefill, training) and what comes before it, the decode step, and the
    head's product.

    `head(hidden, weight)` is `[n, hidden]` times `[vocab, hidden]` transposed. `prefill` is None where `Model.forward`
    goes from block to block, as it does anyway when it is given a rule or a tap.
    """

    name: str
    rule: GatedDeltaRule
    decode: Decode
    head: Callable[[Tensor, Tensor], Tensor] = F.linear
    inputs: MixerInputs = Mixer.inputs
    prefill: Prefill | None = None


def by_layer(step: MixerStep, block_step: BlockStep = Block.decode) -> Decode:
    """A decode step that goes from block to block, with a mixer's `step` in each."""

    def decode(model: "Model", input_ids: Tensor, pool: StatePool, slots: Tensor) -> Tensor:
        x = model.embeddings(input_ids)
        for block, recurrent, conv in zip(model.layers, pool.recurrent, pool.conv, strict=True):
            assert isinstance(block, Block)
            x = block_step(block, x, recurrent, conv, slots, step)
        y: Tensor = model.norm(x)
        return y

    return decode


TORCH = Backend("torch", chunked_gated_delta_rule, by_layer(Mixer.step))
"""Plain torch operations: any device, differentiable."""


def choose(model: "Model") -> Backend:
    """The fastest back end for serving this model where it is; its parameters stay as they are from now on.

    On a CPU the model compiled for it ("cpu"), on an NVIDIA GPU Triton's and fla's kernels ("triton"), or, said
    in the log, plain torch ("torch").
    """
    try:
        return triton_backend() if model.embeddings.weight.device.type == "cuda" else cpu_backend(model)
    except UnavailableError as e:
        logger.warning("decoding by plain torch operations, several times slower than compiled: %s", e)
        return TORCH


def cpu_backend(model: "Model") -> Backend:
    """The model compiled for this machine. Raises UnavailableError."""
    from modeling.ops.cpu import CompiledModel, compiled_gated_delta_rule

    compiled = CompiledModel(model)
    return Backend(
        "cpu", compiled_gated_delta_rule, compiled.decode, compiled.linear, prefill=compiled.prefill
    )


def triton_backend() -> Backend:
    """Fused decode and fla's chunk kernels, for NVIDIA GPUs. Raises UnavailableError."""
    try:
        from modeling.ops.fla_rule import fla_gated_delta_rule
        from modeling.ops.triton_prefill import triton_inputs
        from modeling.ops.triton_step import triton_block, triton_step
    except ImportError as e:
        raise UnavailableError(f"{e}: {how_to_install('gpu')}") from e
    return Backend("triton", fla_gated_delta_rule, by_layer(triton_step, triton_block), inputs=triton_inputs)
