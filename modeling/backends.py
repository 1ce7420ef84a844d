"""Back ends: what computes a model's gated delta rule, chosen once when the model is loaded and reported by name."""

from dataclasses import dataclass

from modeling.layers import Block, BlockStep, Mixer, MixerStep
from modeling.ops import GatedDeltaRule, chunked_gated_delta_rule


@dataclass(frozen=True)
class Backend:
    """The sequence form (prefill, training) and the decode step."""

    name: str
    rule: GatedDeltaRule
    step: MixerStep
    block: BlockStep = Block.decode


TORCH = Backend("torch", chunked_gated_delta_rule, Mixer.step)
"""Plain torch operations: any device, differentiable."""


def triton_backend() -> Backend:
    """Fused decode and fla's chunk kernels, for NVIDIA GPUs.

    Raises:
        ImportError: triton or flash-linear-attention is not installed (`pip install lowkey[gpu]`).
    """
    from modeling.ops.fla_rule import fla_gated_delta_rule
    from modeling.ops.triton_step import triton_block, triton_step

    return Backend("triton", fla_gated_delta_rule, triton_step, triton_block)
