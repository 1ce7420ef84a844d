"""Memory that work on a model takes, computed from its shapes, and whether it is there."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowkey.memory import host_memory
from lowkey.words import in_units
from modeling.checkpoint import FLOATS, Checkpoint
from modeling.layers import Block
from modeling.spec import TOKEN_BLOCK, AttentionSpec, DeltaSpec, LayerSpec, MixerSpec, ModelSpec, MoESpec
from pruning.calibration import BATCH
from pruning.capacity import parameter_count
from pruning.errors import PruningError
from pruning.gradients import need_gradients
from pruning.statistics import FORWARD, StatisticName, shapes

PROCESS_BYTES = 400 * 10**6
"""Bytes that a process holds without any model: Python, torch and the libraries that it loads."""


def statistics_bytes(spec: ModelSpec, names: Collection[StatisticName]) -> int:
    """Bytes of the statistics, in memory and as a file."""
    return 8 * sum(
        torch.Size(shape).numel() for layer in shapes(spec, names).values() for shape in layer.values()
    )


def activation_bytes(spec: ModelSpec, length: int, *, gradients: bool) -> int:
    """Upper bound of what one step holds beside weights and statistics: a batch forward, or one window with autograd.

    Counted in tensors of `modeling.layers` and `modeling.ops.chunked` that are alive together, in float32.
    """
    hidden = spec.hidden_size
    mixer = [3 * hidden + _mixer_activations(layer.mixer) for layer in spec.layers]
    ffn = [3 * hidden + 5 * layer.ffn.active_size for layer in spec.layers]
    forward = BATCH * length * max(*mixer, *ffn)
    if not gradients:
        return 4 * forward
    logits = 3 * length * spec.vocab_size
    weights = sum(sum(m.in_proj_sizes) for m in spec.deltas.values()) * hidden
    return 4 * max(forward, length * (sum(mixer) + sum(ffn)) + logits + weights)


def _mixer_activations(mixer: MixerSpec) -> int:
    """Numbers for each token that are alive together in a mixer, beside what goes in and comes out."""
    if isinstance(mixer, DeltaSpec):
        chunked = mixer.num_v_heads * (4 * TOKEN_BLOCK + 5 * (mixer.d_k + mixer.d_v))
        # The last term: float64 rows of the Grams, raw and normalised.
        return sum(mixer.in_proj_sizes) + 4 * mixer.conv_channels + chunked + 4 * 2 * mixer.key_dim
    if isinstance(mixer, AttentionSpec):
        # Keys and values are repeated for the heads of their group.
        return 2 * sum(mixer.in_proj_sizes) + 4 * mixer.q_dim
    return 0


@dataclass(frozen=True)
class Memory:
    """Bytes that calibration holds, beside `PROCESS_BYTES`."""

    weights: int
    """In float32: all of them, or, one layer at a time, those of the largest layer, its experts as they are stored."""
    activations: int
    statistics: int
    hidden: int = 0
    """Of all tokens, on their way from layer to layer."""

    @property
    def total(self) -> int:
        """Bytes of all, and of the process."""
        return PROCESS_BYTES + self.weights + self.activations + self.statistics + self.hidden

    def on(self, device: torch.device) -> int:
        """Bytes on the device that the model runs on: a GPU holds weights and activations only."""
        return self.weights + self.activations if device.type == "cuda" else self.total


def whole_memory(spec: ModelSpec, names: Collection[StatisticName], length: int) -> Memory:
    """What collecting `names` takes with the whole model in memory, in windows of `length` tokens."""
    active = activation_bytes(spec, length, gradients=need_gradients(names))
    return Memory(4 * parameter_count(spec), active, statistics_bytes(spec, names))


def streaming_memory(checkpoint: Checkpoint, count: int, length: int) -> Memory:
    """What `pruning.streaming` takes for `count` windows of `length` tokens."""
    spec = checkpoint.spec
    width = expert_dtype(checkpoint).itemsize
    return Memory(
        max(_layer_bytes(layer, spec.hidden_size, width) for layer in set(spec.layers)),
        activation_bytes(spec, length, gradients=False),
        statistics_bytes(spec, FORWARD),
        4 * count * length * spec.hidden_size,
    )


def evaluation_memory(specs: Sequence[ModelSpec], length: int) -> Memory:
    """What comparing models with the first of them takes, in windows of `length` tokens: the first stays in memory,
    the others are there one at a time."""
    first, *others = map(parameter_count, specs)
    active = max(activation_bytes(spec, length, gradients=False) for spec in specs)
    return Memory(4 * (first + max(others, default=0)), active, 0)


def expert_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that experts are stored in."""
    experts = [m.theirs[0] for m in checkpoint.maps if m.role == "experts"]
    if not experts or not checkpoint.has_weights:
        return config_dtype(checkpoint.config)
    return FLOATS[checkpoint.dtype_and_shape(experts[0])[0]]


def config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that weights have by their config.json; float32 where it names none that is read."""
    text = config.get("text_config")
    for place in (text if isinstance(text, Mapping) else {}, config):
        for key in ("dtype", "torch_dtype"):  # the second is what older versions of transformers wrote
            for dtype in FLOATS.values():
                if place.get(key) == str(dtype).removeprefix("torch."):
                    return dtype
    return torch.float32


def _layer_bytes(layer: LayerSpec, hidden: int, expert_width: int) -> int:
    """Bytes of one layer in float32, but for its experts."""
    with torch.device("meta"):
        total = 4 * sum(p.numel() for p in Block(layer, hidden, 0).parameters())
    if isinstance(layer.ffn, MoESpec):
        total -= (4 - expert_width) * layer.ffn.num_experts * 3 * layer.ffn.expert_size * hidden
    return total


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()


def fits(memory: Memory, device: torch.device) -> bool:
    """Whether there is so much."""
    return memory.on(device) <= free_memory(device)


def check_fits(memory: Memory, device: torch.device, what: str, instead: str) -> None:
    """Raises PruningError unless there is so much; it says what takes it, and what to do instead."""
    if not fits(memory, device):
        raise PruningError(
            f"{what} takes about {in_units(memory.on(device))} of memory on {device}, and "
            f"{in_units(free_memory(device))} are free: use a machine with more, or {instead}"
        )
