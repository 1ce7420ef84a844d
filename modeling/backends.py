"""Back ends: what computes a model's gated delta rule, chosen once when the model is loaded and reported by name."""

from dataclasses import dataclass

from modeling.layers import Mixer, MixerStep
from modeling.ops import GatedDeltaRule, chunked_gated_delta_rule


@dataclass(frozen=True)
class Backend:
    """The sequence form (prefill, training) and the decode step."""

    name: str
    rule: GatedDeltaRule
    step: MixerStep


TORCH = Backend("torch", chunked_gated_delta_rule, Mixer.step)
"""Plain torch operations: any device, differentiable."""
