"""NaN and Inf in weights: found before hours of work, and never written."""

from torch import Tensor, aminmax

from modeling.checkpoint import Checkpoint
from pruning.errors import PruningError


def finite(tensor: Tensor, name: str, source: str) -> Tensor:
    """The tensor. Raises PruningError, with its name and the checkpoint that it is of, if it holds NaN or Inf."""
    low, high = aminmax(tensor)  # both are NaN if any entry is, and no copy of a large matrix is made
    if not bool(low.isfinite() & high.isfinite()):
        raise PruningError(f"{source}: tensor {name!r} holds NaN or Inf")
    return tensor


def check_finite(checkpoint: Checkpoint) -> None:
    """Read all weights of a checkpoint, one tensor at a time.

    Raises:
        PruningError: one holds NaN or Inf: no selection from it would mean anything.
        CheckpointError: one can't be read.
    """
    for name in checkpoint.files:
        finite(checkpoint.tensor(name), name, checkpoint.source)
