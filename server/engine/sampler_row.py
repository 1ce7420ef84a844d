"""Where a preempted request's sampling was."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SamplerRow:
    """What the sampler's tables said of one slot, on the device, and the token that the next step feeds."""

    parameters: list[Tensor]
    """The slot's row of each of the sampler's tables."""
    tokens: list[Tensor] | None
    """The request's row of each table over the vocabulary, if it has one."""
    last_token: Tensor
