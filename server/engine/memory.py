"""What a variant's memory goes to: weights, decode graphs, workspace, and state slots from what is left."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modeling.checkpoint import Checkpoint
from modeling.model import Model
from modeling.state import StatePool
from server.engine.device import Device
from server.engine.forward import Forward
from server.engine.messages import DEFAULT_SLOTS, EngineConfig
from server.engine.sampler import Filters, draw

logger = logging.getLogger("lowkey.engine")

RESERVED = 2**30
"""Of a GPU, for what torch does not count: the CUDA context, kernels, libraries, fragments."""

GRAPH_BYTES = 8 * 2**20
"""Likewise, of each recorded decode step."""


class DoesNotFitError(Exception):
    """The variant can't have the memory that it needs. The message has the numbers."""


@dataclass(frozen=True)
class Needs:
    """Bytes of a variant that are not states: those of its parameters; the most that a prompt step and sampling take
    for a while; those of `graphs` recorded steps, and those that are left to what torch does not count."""

    weights: int
    workspace: int = 0
    graphs: int = 0
    reserved: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.workspace + self.graphs + self.reserved


@dataclass(frozen=True)
class MemoryPlan:
    """Of one variant on its device. `budget` is what it may take in all; None on a CPU, where nothing bounds it but
    `state_memory`."""

    device: str
    budget: int | None
    needs: Needs
    slots: int
    bytes_per_slot: int

    @property
    def states(self) -> int:
        """Bytes of the pool, its null slot included."""
        return (self.slots + 1) * self.bytes_per_slot

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they are for."""
        n = self.needs
        return {
            "weights": n.weights,
            "workspace": n.workspace,
            "graphs": n.graphs,
            "reserved": n.reserved,
            "states": self.states,
        }

    def __str__(self) -> str:
        return table(self.device, self.budget, {**self.parts, "total": sum(self.parts.values())})


def table(device: str, budget: int | None, parts: dict[str, int]) -> str:
    """One line for each part."""
    lines = [f"memory on {device}" + ("" if budget is None else f", of {budget:,} bytes for this variant")]
    lines += [f"  {name:<10} {size:>18,} bytes {size / 2**30:>8.2f} GiB" for name, size in parts.items()]
    return "\n".join(lines)


def check_weights(config: EngineConfig, device: Device, weights: int) -> None:
    """Before they are loaded. Raises DoesNotFitError."""
    if device.name == "cpu":
        return
    budget, free = _budget(config, device), device.free_memory()
    if weights > min(budget, free):
        raise DoesNotFitError(
            f"the weights alone are {weights:,} bytes; of the {device.total_memory():,} bytes of {device.name} "
            f"{free:,} are free, and this variant may take {budget:,} (device_memory {config.device_memory:.3g})"
        )


def plan_memory(config: EngineConfig, device: Device, needs: Needs, bytes_per_slot: int) -> MemoryPlan:
    """How many slots the pool has. Raises DoesNotFitError when not even one and the null slot fit."""
    budget = None if device.name == "cpu" else _budget(config, device)
    left = device.free_memory() if budget is None else budget - needs.total
    memory = config.state_memory
    if memory is None and budget is None:
        slots = config.max_requests or DEFAULT_SLOTS
        return MemoryPlan(device.name, budget, needs, slots, bytes_per_slot)
    if memory is None:
        memory = left
    elif isinstance(memory, float):
        memory = int(memory * left)
    plan = MemoryPlan(device.name, budget, needs, memory // bytes_per_slot - 1, bytes_per_slot)
    if plan.slots < 1:
        raise DoesNotFitError(
            f"{memory:,} bytes are left for states (state_memory={config.state_memory}), and two states of this model, "
            f"the least that a pool can have, are {2 * bytes_per_slot:,} bytes; {_advice(config, plan)}"
        )
    if budget is not None and plan.states > (most := min(left, _unclaimed(device, needs))):
        raise DoesNotFitError(
            f"{plan.slots} slots are {plan.states:,} bytes, and {most:,} are left for them; {_advice(config, plan)}"
        )
    return plan


def _budget(config: EngineConfig, device: Device) -> int:
    return int(config.device_memory * device.total_memory())


def _unclaimed(device: Device, needs: Needs) -> int:
    """What the device has free now, less what will be taken besides states; the weights are there already."""
    return device.free_memory() - needs.workspace - needs.graphs


def _advice(config: EngineConfig, plan: MemoryPlan) -> str:
    needs = table(plan.device, plan.budget, {**plan.parts, "states": 0})
    return f"lower state_memory, or raise device_memory (now {config.device_memory:.3g})\n{needs}"


@torch.inference_mode()
def measure(
    config: EngineConfig,
    model: Model,
    pool: StatePool,
    device: Device,
    weights: int,
    prefill_tokens: int,
    sizes: Sequence[int],
) -> Needs:
    """What the largest steps need, found by running them on the null slot of a small pool.

    Also has all kernels compiled and tuned that requests would wait for.

    Args:
        prefill_tokens: the most prompt tokens of a step.
        sizes: batch sizes that will be recorded; none: nothing is.
    """
    if device.name == "cpu":
        return Needs(weights)
    forward = Forward(model, pool)
    at, null, tokens = forward.device, pool.null_slot, prefill_tokens
    sequences = min(tokens, config.max_requests or tokens)
    rows = min(device.logit_rows, tokens)

    def prefill() -> None:
        """A step of one prompt, one of as many as there may be, and a sample with all filters."""
        hidden = forward.prefill([[0] * tokens], [null])[0]
        forward.prefill([[0] * (tokens // sequences)] * sequences, [null] * sequences)
        ones = torch.ones(rows, dtype=torch.float64, device=at)
        every = torch.arange(rows, device=at)
        filters = Filters(every, every * 0 + 1, ones * 0.5, ones * 0.1)
        draw(forward.logits(hidden[:rows]), ones, ones * 0.5, filters)

    def decode() -> None:
        slots = torch.full((max(sizes),), null, dtype=torch.long, device=at)
        forward.decode(torch.zeros_like(slots), slots)

    workspace = device.peak_memory(prefill)
    graphs = device.peak_memory(decode) + len(sizes) * GRAPH_BYTES if sizes else 0
    return Needs(weights, workspace, graphs, RESERVED)


def weights_of(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the parameters once they are loaded."""
    return sum(shape.numel() * kind.itemsize for shape, kind in checkpoint.parameter_types(dtype).values())
