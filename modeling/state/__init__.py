"""What requests and packed sequences hold between tokens; each kind of mixer's state has a file of its own."""

from modeling.state.base import LayerState
from modeling.state.delta import DeltaState
from modeling.state.kv import KVState
from modeling.state.pool import StatePool

__all__ = ["DeltaState", "KVState", "LayerState", "StatePool"]
