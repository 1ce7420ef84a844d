"""The tensors of delta rule states, of a pool or of packed sequences."""


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
