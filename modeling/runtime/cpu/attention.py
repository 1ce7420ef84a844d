"""Softmax attention as attention.h has it."""

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p, pointer

import torch
from torch import Tensor

from modeling.layers import AttentionMixer
from modeling.runtime.cpu.parameters import Parameters
from modeling.spec import RopeSpec
from modeling.state import PagedKV
from modeling.state import Pages as PoolPages

_NORMS = {"none": 0, "head": 1, "whole": 2}
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class Attention(Structure):
    """`Attention` of attention.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("in_proj", "o_proj", "q_norm", "k_norm", "frequencies")),
        ("norm_eps", c_float),
        *((name, c_int32) for name in ("num_heads", "num_kv_heads", "head_dim")),
        *((name, c_int32) for name in ("rotary_dims", "qk_norm", "gated")),
    ]

    @classmethod
    def of(cls, mixer: AttentionMixer, parameters: Parameters) -> "Attention":
        """A mixer's parameters, where they lie. Raises UnavailableError for one that the C++ does not take."""
        s = mixer.spec
        normed = s.qk_norm != "none"
        return cls(
            in_proj=parameters.matrix(mixer.in_proj.weight),
            o_proj=parameters.matrix(mixer.o_proj.weight),
            q_norm=parameters.vector(mixer.q_norm.weight) if normed else None,
            k_norm=parameters.vector(mixer.k_norm.weight) if normed else None,
            frequencies=None if s.rope is None else parameters.keep(_frequencies(s.rope)),
            norm_eps=s.norm_eps,
            num_heads=s.num_heads,
            num_kv_heads=s.num_kv_heads,
            head_dim=s.head_dim,
            rotary_dims=0 if s.rope is None else s.rope.dims,
            qk_norm=_NORMS[s.qk_norm],
            gated=s.gated,
        )


def _frequencies(rope: RopeSpec) -> Tensor:
    """How far each pair of channels turns from one position to the next, in radians, float64 `[dims / 2]`."""
    half = rope.dims // 2
    return rope.theta ** -(torch.arange(half, dtype=torch.float64) / half)


class Pages(Structure):
    """`Pages` of batch.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("blocks", "lengths")),
        *((name, c_int64) for name in ("max_pages", "num_pages")),
    ]

    @classmethod
    def of(cls, pages: PoolPages) -> "Pages":
        """Where the tables of a pool are. Raises ValueError for some that the C++ would misread."""
        for t in (pages.blocks, pages.lengths):
            if t.dtype != torch.int32 or t.device.type != "cpu" or not t.is_contiguous():
                raise ValueError(
                    f"tables of pages must be contiguous int32 on the CPU, got {t.dtype} on {t.device}"
                )
        return cls(pages.blocks.data_ptr(), pages.lengths.data_ptr(), pages.blocks.shape[1], pages.count)


class KV(Structure):
    """`PagedKV` of attention.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values")),
        ("pages", POINTER(Pages)),
        ("type", c_int32),
    ]

    @classmethod
    def of(cls, state: PagedKV) -> "KV":
        """Where a layer's keys and values are. Raises ValueError for tensors that the C++ would misread."""
        for t in (state.keys, state.values):
            if t.dtype not in _TYPES or t.dtype != state.keys.dtype or t.device.type != "cpu":
                raise ValueError(
                    f"keys and values must be float32 or bfloat16 on the CPU, got {t.dtype} on {t.device}"
                )
            if not t.is_contiguous():
                raise ValueError("keys and values must be contiguous")
        return cls(
            state.keys.data_ptr(),
            state.values.data_ptr(),
            pointer(Pages.of(state.pages)),
            _TYPES[state.keys.dtype],
        )
