"""Delta rule states, of a pool or of packed sequences: their tensors, and the same in float64."""

import torch

from modeling.state import DeltaState
from modeling.state.rounding import LEVELS, narrow


def recurrent(states):
    """Each layer's `[rows, num_v_heads, d_k, d_v]`."""
    return [layer.recurrent for layer in getattr(states, "layers", states)]


def conv(states):
    """Each layer's `[rows, conv_channels, conv_kernel - 1]`."""
    return [layer.conv for layer in getattr(states, "layers", states)]


def scales(states):
    """Each layer's `[rows, num_v_heads, d_v]`, where its recurrent state is in int8."""
    return [layer.scales for layer in getattr(states, "layers", states) if layer.scales is not None]


def tensors(states):
    """All of them."""
    return [*recurrent(states), *conv(states), *scales(states)]


def fill(states, seed=1):
    """Random states."""
    torch.manual_seed(seed)
    for layer in states.layers:
        recurrent = torch.randn(layer.recurrent.shape) * 0.2
        if layer.scales is None:
            layer.recurrent.copy_(recurrent)
        else:
            for t, value in zip((layer.recurrent, layer.scales), narrow(recurrent), strict=True):
                t.copy_(value)
        layer.conv.copy_(torch.randn(layer.conv.shape) * 0.2)


def exact_states(state):
    """The same numbers in float64."""
    recurrent = state.recurrent.double()
    if state.scales is not None:
        recurrent = recurrent * state.scales.double().unsqueeze(-2)
    return DeltaState(recurrent, state.conv.double())


def error_in_steps(state, exact):
    """How far a recurrent state in 8 bits is from rounding the float64 state `exact` `[..., d_k, d_v]`, in steps of its
    columns' scales: of codes beyond the half a step that rounding takes, and of what the scales make of the largest."""
    assert state.recurrent.dtype == torch.int8 and state.scales.isfinite().all()
    scales = exact.abs().amax(-2) / LEVELS
    per_step = torch.where(scales > 0, 1 / scales, 0.0)
    beyond = (state.recurrent - exact * per_step.unsqueeze(-2)).abs() - 0.5
    of_scales = (state.scales - scales).abs() * per_step * LEVELS
    return max(float(beyond.max()), float(of_scales.max()), 0.0)
