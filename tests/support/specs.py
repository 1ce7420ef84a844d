"""Specs of single mixers."""

from modeling.spec import DeltaSpec


def mixer_spec(**changes) -> DeltaSpec:
    """A small gated one-head mixer, but for `changes`."""
    base = dict(
        num_k_heads=1,
        num_v_heads=1,
        d_k=16,
        d_v=16,
        conv_kernel=4,
        conv_bias=False,
        has_decay=True,
        has_beta=True,
        beta_scale=1.0,
        gate="silu",
        norm_eps=1e-5,
    )
    return DeltaSpec(**(base | changes))
