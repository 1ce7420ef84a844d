"""What a variant's memory goes to: weights, decode graphs, workspace, and state slots from what is left."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modeling.checkpoint import Checkpoint
from modeling.runtime import Runtime
from modeling.state import StatePool
from server.engine.device import Device
from server.engine.forward import Forward
from server.engine.sampler import Filters, draw
from server.engine.scheduler import MAX_PROMPTS
from server.wire.messages import DEFAULT_SLOTS, EngineConfig

logger = logging.getLogger("lowkey.engine")

RESERVED = 2**30
"""Bytes of a GPU for what torch does not count: the CUDA context, kernels, libraries, fragments."""

GRAPH_BYTES = 8 * 2**20
"""Bytes of a GPU that each recorded decode step takes."""


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
    """What one variant takes of its device. `budget` is what it may take in all; None on a CPU, where only what is free
    bounds it."""

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
    """Refuse weights that do not fit, before they are loaded. Raises DoesNotFitError."""
    free = device.free_memory()
    if device.name == "cpu":
        if weights > free:
            raise DoesNotFitError(
                f"the weights alone are {weights:,} bytes, and {free:,} are free on this machine; free some of its "
                "memory, or serve a smaller model"
            )
        return
    budget = _budget(config, device)
    if weights > min(budget, free):
        raise DoesNotFitError(
            f"the weights alone are {weights:,} bytes; of the {device.total_memory():,} bytes of {device.name} "
            f"{free:,} are free, and this variant may take {budget:,}; {_make_room(config, device, free - budget)}"
        )


def plan_memory(
    config: EngineConfig, device: Device, needs: Needs, bytes_per_slot: int, sharing: int = 1
) -> MemoryPlan:
    """Plan how many slots the pool has.

    Args:
        needs: what is not states; of it, the weights are on the device already.
        sharing: variants that load on this CPU at the same time and each take as much; a GPU is shared by its budgets.

    Raises:
        DoesNotFitError: not even one slot and the null slot fit, or there is not as much as is asked for.
    """
    budget = None if device.name == "cpu" else _budget(config, device)
    free = device.free_memory()
    left = free if budget is None else budget - needs.total
    unclaimed = free // sharing if budget is None else free - needs.workspace - needs.graphs
    asked = config.state_memory
    if asked is None and budget is None:
        memory = ((config.max_requests or DEFAULT_SLOTS) + 1) * bytes_per_slot
    elif asked is None:
        memory = left
    else:
        memory = int(asked * left) if isinstance(asked, float) else asked
    plan = MemoryPlan(device.name, budget, needs, memory // bytes_per_slot - 1, bytes_per_slot)
    room, least = min(left, unclaimed), 2 * bytes_per_slot
    make_room = _make_room(config, device, unclaimed - left)
    if plan.slots < 1:
        share = isinstance(asked, float) and left > 0
        enough = f"{1.01 * least / left:.3g}" if share else f"{least:,} bytes"  # rounded, it is still enough
        advice = make_room if asked is None or room < least else f"raise state_memory to {enough} at least"
        had = (
            f"{memory:,} bytes are left for states"
            if asked is None
            else f"state_memory={asked} is {memory:,} bytes"
        )
        raise DoesNotFitError(
            f"{had}, and two states of this model, the least that a pool can have, are {least:,} bytes; {advice}\n"
            + _without_states(plan)
        )
    if plan.states > room:
        advice = make_room
        if budget is None:
            most = f"{100 // sharing / 100}" if isinstance(asked, float) else f"{room:,} bytes"
            advice = f"set state_memory to {most} at most" + ("" if asked else ", or lower max_requests")
        elif isinstance(asked, int):
            advice = f"lower state_memory to {room:,} bytes at most, or {make_room}"
        each = f" ({free:,} bytes are free, for {sharing} variants)" if sharing > 1 else ""
        raise DoesNotFitError(
            f"{plan.slots} slots are {plan.states:,} bytes, and {room:,} are left for them{each}; {advice}\n"
            + _without_states(plan)
        )
    return plan


def _budget(config: EngineConfig, device: Device) -> int:
    return int(config.device_memory * device.total_memory())


def _make_room(config: EngineConfig, device: Device, beyond: int) -> str:
    """How a variant gets more memory. `beyond`: bytes that the device has free, over those that the variant may take;
    below 0 others hold what it may take."""
    if device.name == "cpu":
        return "free some memory of this machine, or serve fewer or smaller models"
    if beyond > 0:
        return f"raise device_memory (now {config.device_memory:.3g})"
    return f"free some memory of {device.name}: others hold what device_memory={config.device_memory:.3g} promises"


def _without_states(plan: MemoryPlan) -> str:
    return table(plan.device, plan.budget, {**plan.parts, "states": 0})


@torch.inference_mode()
def measure(
    config: EngineConfig,
    runtime: Runtime,
    pool: StatePool,
    device: Device,
    weights: int,
    prefill_tokens: int,
    sizes: Sequence[int],
) -> Needs:
    """What the largest steps need, found by running them on the null slot of a small pool.

    Also has all kernels compiled, and tuned, that requests would wait for; the log says what it is at.

    Args:
        prefill_tokens: the most prompt tokens of a step.
        sizes: batch sizes that will be recorded; none: nothing is.
    """
    if device.name == "cpu":
        return Needs(weights)
    forward = Forward(runtime, pool)
    at, null, tokens = forward.device, pool.null_slot, prefill_tokens
    sequences = min(tokens, MAX_PROMPTS, config.max_requests or tokens)
    rows = min(device.logit_rows, tokens)

    def shortest() -> None:
        """What launches every kernel of prompts and decode steps."""
        forward.prefill([[0] * tokens], [null])
        forward.decode(torch.zeros(1, dtype=torch.long, device=at), torch.tensor([null], device=at))

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

    logger.info(
        "%s: weights are loaded; compiling the kernels that are not in Triton's cache", config.variant
    )
    runtime.compile_ahead(shortest)
    for layer in pool.layers:
        layer.zero(null)
    logger.info("%s: running the largest steps, to measure what memory they take", config.variant)
    workspace = device.peak_memory(prefill)
    graphs = device.peak_memory(decode) + len(sizes) * GRAPH_BYTES if sizes else 0
    return Needs(weights, workspace, graphs, RESERVED)


def weights_of(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the parameters once they are loaded."""
    return sum(shape.numel() * kind.itemsize for shape, kind in checkpoint.parameter_types(dtype).values())
