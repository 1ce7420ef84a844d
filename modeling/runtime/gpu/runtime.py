"""A model on an NVIDIA GPU: Triton kernels for decode steps and for what surrounds the chunk kernels of prompts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modeling.layers import MLP, DeltaMixer
from modeling.model import Model
from modeling.ops import GatedDeltaRule
from modeling.runtime.gpu.compiling import compile_ahead
from modeling.runtime.gpu.delta import add_delta
from modeling.runtime.gpu.delta_int8 import WORD
from modeling.runtime.gpu.mlp import add_mlp
from modeling.runtime.gpu.norms import normed
from modeling.runtime.gpu.prefill import add_delta_prefill
from modeling.runtime.interface import UnavailableError
from modeling.runtime.torch import TorchRuntime
from modeling.spec import StateTypes
from modeling.state import LayerState

MIXERS: dict[type, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    DeltaMixer: (add_delta_prefill, add_delta)
}
"""What adds each kind of mixer to the residual: its prefill, and its decode step."""

FEED_FORWARDS: dict[type, Callable[..., Tensor]] = {MLP: add_mlp}
"""What adds each kind of feed-forward to the residual."""


class GpuRuntime(TorchRuntime):
    """`modeling.runtime.Runtime` with the small work between a block's products fused: one kernel each for a mixer's
    step (three with states in int8), a norm and SwiGLU, which would cost more to launch than to do, and the residual
    sums inside the products.

    Args:
        model: on the GPU.
        rule: the gated delta rule of prompts.

    Raises:
        UnavailableError: a layer is of a kind that has no kernels.
    """

    name = "triton"

    def __init__(self, model: Model, rule: GatedDeltaRule) -> None:
        super().__init__(model)
        self._rule = rule
        for i, block in enumerate(self._blocks):
            if block.norm_after:
                raise UnavailableError(f"layer {i} has its norms behind, for which there are no kernels")
            for part in (block.mixer, block.ffn):
                if type(part) not in (*MIXERS, *FEED_FORWARDS):
                    raise UnavailableError(
                        f"layer {i} has a {type(part).__name__}, for which there are no kernels"
                    )

    def check_states(self, types: StateTypes) -> None:
        for layer, mixer in self.model.spec.deltas.items():
            if types.recurrent == torch.int8 and mixer.d_v % WORD:
                raise UnavailableError(
                    f"on a GPU states in int8 need a d_v that is a multiple of {WORD}, and that of layer {layer} is "
                    f"{mixer.d_v}; bfloat16 would do"
                )

    def compile_ahead(self, work: Callable[[], object]) -> None:
        compile_ahead(work)

    def _prefill_block(
        self, layer: int, x: Tensor, cu_seqlens: Sequence[int], state: LayerState, slots: Tensor
    ) -> Tensor:
        block = self._blocks[layer]
        add_prefill, _ = MIXERS[type(block.mixer)]
        x = add_prefill(block.mixer, x, normed(block.mixer_norm, x), cu_seqlens, state, slots, self._rule)
        return FEED_FORWARDS[type(block.ffn)](block.ffn, x, normed(block.ffn_norm, x))

    def _decode_block(self, layer: int, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        block = self._blocks[layer]
        _, add_mixer = MIXERS[type(block.mixer)]
        x = add_mixer(block.mixer, x, normed(block.mixer_norm, x), state, slots)
        return FEED_FORWARDS[type(block.ffn)](block.ffn, x, normed(block.ffn_norm, x))
