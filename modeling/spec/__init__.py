"""Model shapes: everything the code needs to know about a checkpoint, made once from its config.json.

The classes are frozen, hold no tensors and belong to no checkpoint family. Each kind of mixer and of feed-forward has a
file of its own. Nothing assumes that the layers of a model share a shape or a kind: per-layer budgets give each linear
layer its own `d_k`.
"""

from modeling.spec.attention import AttentionSpec, QkNorm, RopeSpec
from modeling.spec.delta import DeltaSpec, GateActivation
from modeling.spec.mixer import MixerSpec
from modeling.spec.mlp import MLPSpec
from modeling.spec.model import TOKEN_BLOCK, LayerSpec, ModelSpec, NormSpec
from modeling.spec.moe import MoESpec
from modeling.spec.tensors import FLOAT32_STATES, StateTypes, TensorSpec
from modeling.state_dtype import STATE_DTYPES, StateDType

__all__ = [
    "FLOAT32_STATES",
    "STATE_DTYPES",
    "TOKEN_BLOCK",
    "AttentionSpec",
    "DeltaSpec",
    "GateActivation",
    "LayerSpec",
    "MLPSpec",
    "MixerSpec",
    "MoESpec",
    "ModelSpec",
    "NormSpec",
    "QkNorm",
    "RopeSpec",
    "StateDType",
    "StateTypes",
    "TensorSpec",
]
