"""Plain torch modules of a model's layers, over packed tokens; each kind of mixer and feed-forward has a file of its
own.

`forward` is the sequence form (training, calibration, evaluation, prefill); `decode` is one token of each of B
requests, in place on the state pool. Projections run in the parameters' dtype; norms, gates, decay and the recurrence
in float32 (float64 where the parameters are).
"""

from modeling.layers.attention import AttentionMixer
from modeling.layers.block import Block
from modeling.layers.delta import DeltaMixer, Tap
from modeling.layers.mixer import Mixer
from modeling.layers.mlp import MLP
from modeling.layers.moe import MoE
from modeling.layers.norms import L2_EPS, RMSNorm, l2_normalise

__all__ = [
    "L2_EPS",
    "MLP",
    "AttentionMixer",
    "Block",
    "DeltaMixer",
    "Mixer",
    "MoE",
    "RMSNorm",
    "Tap",
    "l2_normalise",
]
