"""A model's layers as layer.h has them. Only this module knows which kinds of mixers and feed-forwards there are."""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, Array, Structure, Union, c_float, c_int32, c_int64, c_void_p
from typing import Any

from modeling.layers import MLP, AttentionMixer, Block, DeltaMixer, MoE
from modeling.runtime.cpu.attention import KV, Attention, Pages
from modeling.runtime.cpu.delta import Delta, State
from modeling.runtime.cpu.mlp import Mlp
from modeling.runtime.cpu.moe import Moe
from modeling.runtime.cpu.parameters import Parameters
from modeling.runtime.interface import UnavailableError
from modeling.state import DeltaState, LayerState, PagedKV

_MIXERS: dict[type, tuple[int, str, Callable[..., Structure]]] = {
    DeltaMixer: (0, "delta", Delta.of),
    AttentionMixer: (1, "attention", Attention.of),
}
"""Kinds of mixers: `MixerKind`, the member of `AnyMixer`, and what makes it of (mixer, parameters)."""

_FEED_FORWARDS: dict[type, tuple[int, str, Callable[..., Structure]]] = {
    MLP: (0, "mlp", Mlp.of),
    MoE: (1, "moe", Moe.of),
}
"""Kinds of feed-forwards: `FeedForwardKind`, the member of `AnyFeedForward`, and what makes it likewise."""

_STATES: dict[type, tuple[str, Callable[..., Structure]]] = {
    DeltaState: ("delta", State.of),
    PagedKV: ("kv", KV.of),
}
"""Kinds of states: the member of `AnyState`, and what makes it of a state."""


class _AnyMixer(Union):
    _fields_ = [("delta", Delta), ("attention", Attention)]


class _AnyFeedForward(Union):
    _fields_ = [("mlp", Mlp), ("moe", Moe)]


class AnyState(Union):
    """`LayerState` of layer.h."""

    _fields_ = [("delta", State), ("kv", KV)]


class Layer(Structure):
    """`Layer` of layer.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("mixer_norm", "ffn_norm")),
        ("norm_eps", c_float),
        *((name, c_int32) for name in ("norm_after", "mixer_kind", "ffn_kind")),
        ("mixer", _AnyMixer),
        ("ffn", _AnyFeedForward),
    ]

    @classmethod
    def of(cls, block: Block, parameters: Parameters) -> "Layer":
        """A layer's parameters, where they lie. Raises UnavailableError for one that the C++ does not take."""
        mixer_kind, mixer, make_mixer = _MIXERS[type(block.mixer)]
        ffn_kind, ffn, make_ffn = _FEED_FORWARDS[type(block.ffn)]
        return cls(
            mixer_norm=parameters.vector(block.mixer_norm.weight),
            ffn_norm=parameters.vector(block.ffn_norm.weight),
            norm_eps=block.mixer_norm.eps,
            norm_after=block.norm_after,
            mixer_kind=mixer_kind,
            ffn_kind=ffn_kind,
            mixer=_AnyMixer(**{mixer: make_mixer(block.mixer, parameters)}),
            ffn=_AnyFeedForward(**{ffn: make_ffn(block.ffn, parameters)}),
        )


class ModelStructure(Structure):
    """`Model` of layer.h."""

    _fields_ = [
        ("embeddings", c_void_p),
        ("norm", c_void_p),
        ("layers", POINTER(Layer)),
        ("norm_eps", c_float),
        *((name, c_int32) for name in ("num_layers", "hidden", "vocab", "bf16_weights")),
    ]


def knows(block: Block) -> bool:
    """Whether a layer's mixer and feed-forward are of kinds that are written in C++."""
    return type(block.mixer) in _MIXERS and type(block.ffn) in _FEED_FORWARDS


def states_of(states: Sequence[LayerState | DeltaState]) -> Array[AnyState]:
    """The addresses of each layer's states. Raises ValueError for some that the C++ would misread."""

    def state_of(state: Any) -> AnyState:
        member, make = _STATES[type(state)]
        return AnyState(**{member: make(state)})

    return (AnyState * len(states))(*map(state_of, states))


def check_layout(library: ctypes.CDLL) -> None:
    """Raises UnavailableError if the library's structures do not have the sizes of their mirrors."""
    mirrors = (ModelStructure, Layer, Delta, Attention, Mlp, Moe, Pages, State, KV)
    if list((c_int64 * len(mirrors)).in_dll(library, "lowkey_layout")) != [*map(ctypes.sizeof, mirrors)]:
        raise UnavailableError("the C++ sources and their mirrors in Python disagree about their structures")
