"""What a variant's memory goes to: weights, decode graphs, workspace, and from what is left state slots, and pages for
the keys and values of softmax attention."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowkey.words import counted
from modeling.checkpoint import Checkpoint
from modeling.runtime import Runtime
from modeling.spec import ModelSpec, StateTypes
from modeling.state import PAGE_TOKENS, StatePool, pages_for
from server.engine.device import Device
from server.engine.forward import ROWS, Forward
from server.engine.sampler import Filters, draw, rows_at_once
from server.engine.scheduler import MAX_PROMPTS
from server.wire.messages import DEFAULT_SLOTS, EngineConfig

logger = logging.getLogger("lowkey.engine")

RESERVED = 2**30
"""Bytes of a GPU for what torch does not count: the CUDA context, kernels, libraries, fragments."""

MOST_D_K = 2**16
"""Widest d_k of a dense model that is believed where a reduced one's record names it."""

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
class Room:
    """How a model's requests use memory: bytes of a slot, and of the pages of a request of `context_tokens` tokens. A
    model without softmax attention has pages of 0 bytes, which means that it has none."""

    bytes_per_slot: int
    bytes_per_page: int
    context_tokens: int

    @property
    def pages(self) -> int:
        """Pages of such a request."""
        return pages_for(self.context_tokens) if self.bytes_per_page else 0

    @property
    def request(self) -> int:
        """Bytes of such a request."""
        return self.bytes_per_slot + self.pages * self.bytes_per_page

    def size(self, slots: int, pages: int) -> int:
        """Bytes of a pool, with the slot and the page that belong to nobody."""
        return (slots + 1) * self.bytes_per_slot + (pages + 1) * self.bytes_per_page

    @property
    def least(self) -> int:
        """Bytes of the smallest pool."""
        return self.size(1, 1 if self.bytes_per_page else 0)

    def split(self, memory: int) -> tuple[int, int]:
        """Slots and pages of the largest pool in so many bytes: a slot for each request of `context_tokens` tokens, and
        all the rest in pages. Both are 0 where not even the smallest pool fits."""
        if memory < self.least:
            return 0, 0
        slots = max((memory - self.size(0, 0)) // self.request, 1)
        if not self.bytes_per_page:
            return slots, 0
        return slots, (memory - self.size(slots, 0)) // self.bytes_per_page


@dataclass(frozen=True)
class MemoryPlan:
    """What one variant takes of its device. `budget` is what it may take in all; None on a CPU, where only what is free
    bounds it."""

    device: str
    budget: int | None
    needs: Needs
    slots: int
    pages: int
    """Pages of 64 tokens' keys and values; 0 for a model without softmax attention."""
    room: Room

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that a request holds whatever its length."""
        return self.room.bytes_per_slot

    @property
    def bytes_per_page(self) -> int:
        """Bytes of a page in all layers; 0 for a model without softmax attention."""
        return self.room.bytes_per_page

    @property
    def states(self) -> int:
        """Bytes of the pool: slots and pages, the null slot and the null page included."""
        return self.room.size(self.slots, self.pages)

    @property
    def longest(self) -> int | None:
        """Most tokens that one request can hold; None for a model whose requests do not grow."""
        return self.pages * PAGE_TOKENS if self.bytes_per_page else None

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they are for."""
        n = self.needs
        parts = {
            "weights": n.weights,
            "workspace": n.workspace,
            "graphs": n.graphs,
            "reserved": n.reserved,
            "states": (self.slots + 1) * self.bytes_per_slot,
        }
        if self.bytes_per_page:
            parts["pages"] = (self.pages + 1) * self.bytes_per_page
        return parts

    @property
    def counts(self) -> str:
        """How many slots and pages there are, in words."""
        pages = f" and {counted(self.pages, 'page')}" if self.bytes_per_page else ""
        return f"{counted(self.slots, 'slot')}{pages}"

    def meaning(self, spec: ModelSpec, types: StateTypes, dense_d_k: tuple[int, ...] | None = None) -> str:
        """What the pool means for whoever serves the model, in one line: how many requests it holds.

        Args:
            spec: the model's.
            types: dtypes of the states.
            dense_d_k: the d_k of the model that it was reduced from (`dense_d_k`); None for one that was not. Then the
                line also says how many requests of that model the same memory would hold.
        """
        tokens, most = self.room.context_tokens, min(self.longest or 0, spec.context_length)
        if self.longest is None:
            line = f"room for {counted(self.slots, 'request')} of any length"
        elif self.pages < self.room.pages:
            line = f"room for 1 request of up to {most:,} tokens"
        else:
            line = f"room for {counted(self.slots, 'request')} of {tokens:,} tokens"
            line += f", at most {most:,} in one" if most > tokens else ""
        if dense_d_k is not None and dense_d_k != spec.d_k:
            dense = replace(self.room, bytes_per_slot=spec.with_d_k(dense_d_k).state_bytes(0, types))
            slots, pages = dense.split(self.states)
            line += f"; {slots if pages >= self.room.pages else 0:,} if the model were not reduced"
        return f"{line} ({self.counts})" if self.bytes_per_page else line

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
    config: EngineConfig,
    device: Device,
    needs: Needs,
    bytes_per_slot: int,
    bytes_per_page: int,
    sharing: int = 1,
    *,
    context_length: int | None = None,
) -> MemoryPlan:
    """Plan how many slots and pages the pool has.

    Args:
        needs: what is not states; of it, the weights are on the device already.
        bytes_per_page: bytes of a page in all softmax attention layers; 0 for a model that has none.
        sharing: variants that load on this CPU at the same time and each take as much; a GPU is shared by its budgets.
        context_length: the model's; no request is expected to hold more tokens.

    Raises:
        DoesNotFitError: not even one slot, one page and the null ones fit, or there is not as much as is asked for.
    """
    tokens = min(config.context_tokens, context_length or config.context_tokens)
    room = Room(bytes_per_slot, bytes_per_page, tokens)
    budget = None if device.name == "cpu" else _budget(config, device)
    free = device.free_memory()
    left = free if budget is None else budget - needs.total
    unclaimed = free // sharing if budget is None else free - needs.workspace - needs.graphs
    asked = config.state_memory
    if asked is None and budget is None:
        requests = config.max_requests or DEFAULT_SLOTS
        memory = room.size(requests, requests * room.pages)
    elif asked is None:
        memory = left
    else:
        memory = int(asked * left) if isinstance(asked, float) else asked
    plan = MemoryPlan(device.name, budget, needs, *room.split(memory), room)
    most = min(left, unclaimed)
    make_room = _make_room(config, device, unclaimed - left)
    if plan.slots < 1:
        least = room.least
        share = isinstance(asked, float) and left > 0
        enough = f"{1.01 * least / left:.3g}" if share else f"{least:,} bytes"  # rounded, it is still enough
        advice = make_room if asked is None or most < least else f"raise state_memory to {enough} at least"
        had = (
            f"{memory:,} bytes are left for states"
            if asked is None
            else f"state_memory={asked} is {memory:,} bytes"
        )
        two = "states and two pages of keys and values" if bytes_per_page else "states of this model"
        raise DoesNotFitError(
            f"{had}, and two {two}, the least that a pool can have, are {least:,} bytes; {advice}\n"
            + _without_states(plan)
        )
    if plan.states > most:
        advice = make_room
        if budget is None:
            limit = f"{100 // sharing / 100}" if isinstance(asked, float) else f"{most:,} bytes"
            fewer = "max_requests or context_tokens" if bytes_per_page else "max_requests"
            advice = f"set state_memory to {limit} at most" + ("" if asked else f", or lower {fewer}")
        elif isinstance(asked, int):
            advice = f"lower state_memory to {most:,} bytes at most, or {make_room}"
        each = f" ({free:,} bytes are free, for {sharing} variants)" if sharing > 1 else ""
        raise DoesNotFitError(
            f"{plan.counts} are {plan.states:,} bytes, and {most:,} are left for them{each}; {advice}\n"
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
    """The table of everything else."""
    return table(
        plan.device,
        plan.budget,
        plan.parts | dict.fromkeys(("states", "pages") if plan.bytes_per_page else ("states",), 0),
    )


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
    longest = min(tokens, pool.pages.longest or tokens)  # a context may be shorter than a step
    sequences = max(min(tokens, MAX_PROMPTS, config.max_requests or tokens), -(-tokens // longest))
    rows = min(device.logit_rows, tokens)
    drawn = min(rows, rows_at_once(runtime.model.spec.vocab_size))

    def shortest() -> None:
        """What launches every kernel of prompts and decode steps: some depend on how many rows there are, and some of
        prompts with experts are others for half the length."""
        length = tokens
        while length:
            fed(length)
            length //= 2
        for size in sizes or (ROWS,):
            hidden = forward.decode(*idle(size))
        forward.logits(hidden[:1])

    def fed(total: int) -> list[Tensor]:
        """Hidden states of a step of so many tokens, in prompts as long as they may be."""
        prompts = [[0] * min(longest, total - start) for start in range(0, total, longest)]
        return forward.prefill(prompts, [null] * len(prompts))

    def idle(size: int) -> tuple[Tensor, Tensor]:
        """Ids and slots of a decode step in which nobody is."""
        slots = torch.full((size,), null, dtype=torch.long, device=at)
        return torch.zeros_like(slots), slots

    def prefill() -> None:
        """A step of the longest prompts, one of as many as there may be, log-probabilities, and a sample with all
        filters."""
        hidden = torch.cat([of_prompt[:rows] for of_prompt in fed(tokens)])
        forward.prefill([[0] * (tokens // sequences)] * sequences, [null] * sequences)
        logits = forward.logits(hidden[:rows])
        logits.float().log_softmax(-1)  # as much as copies of all rows take that have some adjusted
        ones = torch.ones(drawn, dtype=torch.float64, device=at)
        every = torch.arange(drawn, device=at)
        filters = Filters(every, every * 0 + 1, ones * 0.5, ones * 0.1)
        draw(logits[:drawn], ones, ones * 0.5, filters)

    def decode() -> None:
        forward.decode(*idle(max(sizes)))

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


def dense_d_k(checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """The d_k of each linear layer of the model that a checkpoint was reduced from, as its `state_reduction.json` says;
    None for one that was not reduced, or whose file does not say."""
    source = (checkpoint.reduction or {}).get("source")
    widths = source.get("d_k") if isinstance(source, dict) else None
    now = checkpoint.spec.d_k
    if not isinstance(widths, list) or len(widths) != len(now):
        return None
    if not all(
        type(wide) is int and narrow <= wide <= MOST_D_K for wide, narrow in zip(widths, now, strict=True)
    ):
        return None
    return tuple(widths)


def weights_of(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the parameters once they are loaded."""
    return sum(shape.numel() * kind.itemsize for shape, kind in checkpoint.parameter_types(dtype).values())
