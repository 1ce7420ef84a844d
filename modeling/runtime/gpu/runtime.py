"""A model on an NVIDIA GPU: Triton kernels for decode steps and for what surrounds the chunk kernels of prompts.

Each kind of mixer and of feed-forward has functions that take x `[tokens, hidden]`, the norm that comes before it (None
for none) and the residual. They add what they compute to the residual, in its memory, which may be that of x, and
return it; where it is None, they return what they compute alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modeling.layers import MLP, AttentionMixer, Block, DeltaMixer, MoE, RMSNorm
from modeling.model import Model
from modeling.ops import GatedDeltaRule
from modeling.runtime.gpu.attention import MOST_HEAD_DIM, add_attention, add_attention_prefill
from modeling.runtime.gpu.compiling import compile_ahead
from modeling.runtime.gpu.delta import add_delta
from modeling.runtime.gpu.delta_int8 import WORD
from modeling.runtime.gpu.mlp import add_mlp
from modeling.runtime.gpu.moe import add_moe
from modeling.runtime.gpu.norms import add_normed, normed
from modeling.runtime.gpu.prefill import add_delta_prefill
from modeling.runtime.gpu.products import product
from modeling.runtime.interface import UnavailableError
from modeling.runtime.torch import TorchRuntime
from modeling.spec import StateTypes
from modeling.state import LayerState

MIXERS: dict[type, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    DeltaMixer: (add_delta_prefill, add_delta),
    AttentionMixer: (add_attention_prefill, add_attention),
}
"""The prefill of each kind of mixer, which also takes (cu_seqlens, state, slots, rule), and its decode step, which also
takes (state, slots)."""

FEED_FORWARDS: dict[type, Callable[..., Tensor]] = {MLP: add_mlp, MoE: add_moe}
"""The function of each kind of feed-forward."""

SHARED_MEMORY = 192 * 1024
"""Bytes of a multiprocessor's shared memory that a program of softmax attention or of experts takes, at most. An H100
has 228 KB, an A100 164 KB."""


class GpuRuntime(TorchRuntime):
    """`modeling.runtime.Runtime` with the small work between a block's products fused, which would cost more to launch
    than to do, and the residual sums inside the products.

    Args:
        model: on the GPU.
        rule: the gated delta rule of prompts.

    Raises:
        UnavailableError: a layer is of a kind, or has attention heads of a width, for which there are no kernels, or
            the GPU is too small for them.
    """

    name = "triton"

    def __init__(self, model: Model, rule: GatedDeltaRule) -> None:
        super().__init__(model)
        self._rule = rule
        for i, block in enumerate(self._blocks):
            for part in (block.mixer, block.ffn):
                if type(part) not in (*MIXERS, *FEED_FORWARDS):
                    raise UnavailableError(
                        f"layer {i} has a {type(part).__name__}, for which there are no kernels"
                    )
            if isinstance(block.mixer, AttentionMixer) and block.mixer.spec.head_dim > MOST_HEAD_DIM:
                raise UnavailableError(
                    f"layer {i} has attention heads of {block.mixer.spec.head_dim} channels; on a GPU they may have "
                    f"{MOST_HEAD_DIM}"
                )
        if any(isinstance(b.mixer, AttentionMixer) or isinstance(b.ffn, MoE) for b in self._blocks):
            _check_shared_memory(model.device)

    def check_states(self, types: StateTypes) -> None:
        for layer, mixer in self.model.spec.deltas.items():
            if types.recurrent == torch.int8 and mixer.d_v % WORD:
                raise UnavailableError(
                    f"on a GPU states in int8 need a d_v that is a multiple of {WORD}, and that of layer {layer} is "
                    f"{mixer.d_v}; bfloat16 would do"
                )

    @property
    def recordable(self) -> bool:
        return True

    @property
    def independent_rows(self) -> bool:
        """The tiles of experts follow from the number of rows, and each row of a tile is computed by itself."""
        return True

    def compile_ahead(self, work: Callable[[], object]) -> None:
        compile_ahead(work)

    def logits(self, hidden: Tensor) -> Tensor:
        return product(hidden, self.model.lm_head.weight)

    def _finish(self, x: Tensor) -> Tensor:
        return normed(self.model.norm, x)

    def _prefill_block(
        self, layer: int, x: Tensor, cu_seqlens: Sequence[int], state: LayerState, slots: Tensor
    ) -> Tensor:
        block = self._blocks[layer]
        add_prefill, _ = MIXERS[type(block.mixer)]
        x = _add(add_prefill, block, block.mixer, block.mixer_norm, x, cu_seqlens, state, slots, self._rule)
        return _add(FEED_FORWARDS[type(block.ffn)], block, block.ffn, block.ffn_norm, x)

    def _decode_block(self, layer: int, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        block = self._blocks[layer]
        _, add_step = MIXERS[type(block.mixer)]
        x = _add(add_step, block, block.mixer, block.mixer_norm, x, state, slots)
        return _add(FEED_FORWARDS[type(block.ffn)], block, block.ffn, block.ffn_norm, x)


def _add(
    function: Callable[..., Tensor], block: Block, part: nn.Module, norm: RMSNorm, x: Tensor, *further: Any
) -> Tensor:
    """x plus a part of the block, in x's memory, the norm being where the block has it."""
    if block.norm_after:
        return add_normed(norm, function(part, x, None, None, *further), x)
    return function(part, x, norm, x, *further)


def _check_shared_memory(device: torch.device) -> None:
    """Raises UnavailableError where a GPU has too little of it for softmax attention or experts."""
    if device.type != "cuda":  # Triton's interpreter
        return
    properties = torch.cuda.get_device_properties(device)
    if properties.shared_memory_per_multiprocessor < SHARED_MEMORY:
        raise UnavailableError(
            f"softmax attention and experts need {SHARED_MEMORY:,} bytes of shared memory, and a multiprocessor of "
            f"{properties.name} has {properties.shared_memory_per_multiprocessor:,}; an H100 or H200 would do"
        )
