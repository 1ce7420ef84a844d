"""Criteria that choose the kept channels. A new one is one file here and one entry in `CRITERIA`."""

from pruning.criteria.base import Choice, Criterion, Head
from pruning.criteria.bilinear import Bilinear
from pruning.criteria.drrqr import DRRQR
from pruning.criteria.energy import Energy
from pruning.criteria.l1 import L1
from pruning.criteria.loss_aware import LossAware
from pruning.criteria.pca import PCA
from pruning.criteria.random import Random
from pruning.criteria.read_write import ReadWrite
from pruning.criteria.taylor import Taylor
from pruning.criteria.wanda import Wanda
from pruning.errors import PruningError

__all__ = ["CRITERIA", "Choice", "Criterion", "Head", "criterion_named"]

_all: tuple[Criterion, ...] = (
    Random(),
    L1(),
    Wanda(),
    Taylor(),
    Energy(),
    PCA(),
    DRRQR(),
    Bilinear(),
    LossAware(),
    ReadWrite(),
)

CRITERIA: dict[str, Criterion] = {c.name: c for c in _all}


def criterion_named(name: str) -> Criterion:
    """The criterion called `name`. Raises PruningError for one that we don't have."""
    if name not in CRITERIA:
        raise PruningError(f"method={name!r} is unknown; known methods: {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]
