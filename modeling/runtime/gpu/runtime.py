"""A model on an NVIDIA GPU: Triton kernels for decode steps, a chunk kernel for prompts."""

from collections.abc import Sequence

from torch import Tensor

from modeling.layers import MLP, DeltaMixer
from modeling.model import Model
from modeling.ops import GatedDeltaRule
from modeling.runtime.gpu.delta import delta_prefill, delta_step
from modeling.runtime.gpu.mlp import add_mlp
from modeling.runtime.gpu.norms import normed
from modeling.runtime.interface import UnavailableError
from modeling.runtime.torch import TorchRuntime
from modeling.state import DeltaState, LayerState


class GpuRuntime(TorchRuntime):
    """`modeling.runtime.Runtime` with the small work between a block's products fused: one kernel each for a mixer's
    step, a norm and SwiGLU, which would cost more to launch than to do, and the residual sums inside the products.

    Args:
        model: on the GPU.
        rule: the gated delta rule of prompts.

    Raises:
        UnavailableError: a layer is of a kind that has no kernels.
    """

    name = "triton"

    def __init__(self, model: Model, rule: GatedDeltaRule) -> None:
        super().__init__(model)
        self.rule = rule
        for i, block in enumerate(model.blocks):
            for part, kind in ((block.mixer, DeltaMixer), (block.ffn, MLP)):
                if not isinstance(part, kind):
                    raise UnavailableError(
                        f"layer {i} has a {type(part).__name__}, for which there are no kernels"
                    )

    def _prefill_block(
        self, layer: int, x: Tensor, cu_seqlens: Sequence[int], state: LayerState
    ) -> tuple[Tensor, LayerState]:
        block = self._blocks[layer]
        assert isinstance(block.mixer, DeltaMixer)
        assert isinstance(state, DeltaState)
        y, after = delta_prefill(block.mixer, block.mixer_norm(x), cu_seqlens, state, self.rule)
        x = x + y
        return x + block.ffn(block.ffn_norm(x)), after

    def _decode_block(self, layer: int, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        block = self._blocks[layer]
        mixer, ffn = block.mixer, block.ffn
        assert isinstance(mixer, DeltaMixer)
        assert isinstance(state, DeltaState)
        assert isinstance(ffn, MLP)
        y = delta_step(mixer, mixer.in_proj(normed(block.mixer_norm, x)), state, slots)
        x.addmm_(y, mixer.o_proj.weight.t())
        return add_mlp(ffn, x, normed(block.ffn_norm, x))
