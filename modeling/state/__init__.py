"""What requests and packed sequences hold between tokens; each kind of mixer's state has a file of its own."""

from modeling.state.base import LayerState, SequenceState
from modeling.state.delta import DeltaState
from modeling.state.kv import KVState, PagedKV
from modeling.state.pages import PAGE_TOKENS, Pages, page_bytes, pages_for
from modeling.state.pool import StatePool

__all__ = [
    "PAGE_TOKENS",
    "DeltaState",
    "KVState",
    "LayerState",
    "PagedKV",
    "Pages",
    "SequenceState",
    "StatePool",
    "page_bytes",
    "pages_for",
]
