"""Memory that work on a model takes, computed from its shapes, and whether it is there."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowkey.memory import host_memory
from lowkey.words import in_units
from modeling.checkpoint import FLOATS, Checkpoint
from modeling.layers import Block
from modeling.spec import TOKEN_BLOCK, AttentionSpec, DeltaSpec, LayerSpec, MixerSpec, ModelSpec, MoESpec
from pruning.calibration import BATCH
from pruning.capacity import parameter_count
from pruning.errors import DoesNotFitError
from pruning.evaluation.likelihood import CPU_BATCH, GPU_BATCH, predicted_together
from pruning.gradients import need_gradients
from pruning.reconstruction import run_together
from pruning.statistics import FORWARD, StatisticName, shapes
from pruning.trainable import trained_count
from pruning.training import LOGITS, TrainingSettings

PROCESS_BYTES = 400 * 10**6
"""Bytes that a process holds without any model: Python, torch and the libraries that it loads."""
_LOGITS_ALIVE = 6
"""Tensors as large as the logits that are alive together where two models' predictions are compared: both, their
logarithms, what is made of these, and a sum's copy in float64, which is of two."""
_CPU = torch.device("cpu")


def statistics_bytes(spec: ModelSpec, names: Collection[StatisticName]) -> int:
    """Bytes of the statistics, in memory and as a file."""
    return 8 * sum(
        torch.Size(shape).numel() for layer in shapes(spec, names).values() for shape in layer.values()
    )


def activation_bytes(spec: ModelSpec, length: int, *, gradients: bool) -> int:
    """Upper bound of what one step of a calibration holds beside weights and statistics: a batch forward, or one window
    with autograd.

    Counted in tensors of `modeling.layers` and `modeling.ops.chunked` that are alive together, in float32.
    """
    forward = _forward_bytes(spec, BATCH * length)
    if not gradients:
        return forward
    logits = 3 * length * spec.vocab_size
    weights = sum(sum(m.in_proj_sizes) for m in spec.deltas.values()) * spec.hidden_size
    return max(forward, 4 * (length * sum(_layer_activations(spec)) + logits + weights))


def _forward_bytes(spec: ModelSpec, tokens: int) -> int:
    """Bytes of activations where so many tokens run together, in the layer that has the most."""
    return 4 * tokens * max(_layer_activations(spec))


def _layer_activations(spec: ModelSpec) -> list[int]:
    """Numbers for each token that are alive together, in each mixer and in each feed-forward part."""
    around = 3 * spec.hidden_size
    return [
        *(around + _mixer_activations(layer.mixer) for layer in spec.layers),
        *(around + 5 * layer.ffn.active_size for layer in spec.layers),
    ]


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
    """Bytes that work on models holds, beside `PROCESS_BYTES`."""

    weights: int
    """Weights in float32: all of them, or, one layer at a time, those of the largest layer, its experts as they are
    stored."""
    activations: int
    statistics: int = 0
    hidden: int = 0
    """Hidden states of all tokens, on their way from layer to layer."""
    training: int = 0
    """Gradients, and the moments that the optimiser keeps."""
    waiting: int = 0
    """What is on the CPU, whatever device computes: weights that wait for their turn, or copies that are written."""

    @property
    def total(self) -> int:
        """Bytes of all, and of the process."""
        return PROCESS_BYTES + self._computing + self.statistics + self.hidden + self.waiting

    @property
    def _computing(self) -> int:
        return self.weights + self.activations + self.training

    def on(self, device: torch.device) -> dict[torch.device, int]:
        """Bytes on each device that holds some where models run on `device`: a GPU has the models, and the CPU the
        process, statistics and hidden states."""
        if device.type == "cpu":
            return {device: self.total}
        return {device: self._computing, _CPU: self.total - self._computing}


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


def evaluation_memory(specs: Sequence[ModelSpec], length: int, device: torch.device) -> Memory:
    """What comparing models with the first of them takes, in windows of `length` tokens: the first stays in memory,
    the others are there one at a time."""
    first, *others = map(parameter_count, specs)
    active = max(_evaluated(spec, length, device) for spec in specs)
    return Memory(4 * (first + max(others, default=0)), active)


def _evaluated(spec: ModelSpec, length: int, device: torch.device) -> int:
    """Bytes of activations and predictions where windows of `length` tokens are scored."""
    batch = GPU_BATCH if device.type == "cuda" else CPU_BATCH
    logits = min(length, predicted_together(spec.vocab_size)) * spec.vocab_size
    return _forward_bytes(spec, batch * length) + 4 * _LOGITS_ALIVE * logits


def training_memory(
    student: ModelSpec,
    teacher: ModelSpec | None,
    settings: TrainingSettings,
    length: int,
    device: torch.device,
) -> Memory:
    """What a recovery takes whose held-out windows have `length` tokens: training, and then the result beside the
    same as it is read again, which is measured."""
    weights = 4 * parameter_count(student)
    trained = 4 * trained_count(student, settings.train, settings.rank)
    tokens = settings.batch * settings.window
    logits = _LOGITS_ALIVE * min(max(LOGITS, student.vocab_size), tokens * student.vocab_size)
    # Autocast has a copy of the weights in bfloat16.
    active = 4 * (tokens * sum(_layer_activations(student)) + logits) + weights // 2
    taught = 0 if teacher is None else 4 * parameter_count(teacher)
    # A file of progress is written from the CPU; the result is run there once, beside what trains.
    waiting = max(3 * trained, weights) if device.type == "cuda" else 0
    # The result, when it is read again, is where the teacher, gradients and moments were.
    second = max(taught, weights - 3 * trained)
    active = max(active, _evaluated(student, length, device))
    return Memory(weights + second, active, training=3 * trained, waiting=waiting)


def reconstruction_memory(
    checkpoint: Checkpoint,
    windows: Tensor,
    batch: int,
    device: torch.device,
    *,
    hidden_device: torch.device,
) -> Memory:
    """What `pruning.reconstruction` takes on `windows` `[count, length]`, `batch` of them in a step: a layer of each
    checkpoint, one of which is trained, and on `hidden_device` the hidden states of all tokens twice."""
    spec, hidden = checkpoint.spec, checkpoint.spec.hidden_size
    count, length = windows.shape
    width = expert_dtype(checkpoint).itemsize
    layer = max(_layer_bytes(layer, hidden, width) for layer in set(spec.layers))
    mixers = [_mixer_bytes(spec.layers[i], hidden) for i in spec.linear_layers]
    each = _layer_activations(spec)
    # Forward and backward, what is kept of a whole layer and its gradients.
    trained = 2 * 4 * batch * length * (max(each[: len(spec.layers)]) + max(each[len(spec.layers) :]))
    # Autograd keeps experts in float32, and autocast has a copy of the weights in bfloat16.
    widened = max(
        _layer_bytes(layer, hidden, 4) - _layer_bytes(layer, hidden, width) for layer in set(spec.layers)
    )
    active = max(
        _forward_bytes(spec, min(count, run_together(device)) * length), trained + widened + layer // 2
    )
    states = 2 * 4 * windows.numel() * hidden
    beside = device.type == "cuda" and hidden_device == device
    return Memory(
        2 * layer,
        active + (states if beside else 0),
        hidden=0 if beside else states,
        training=3 * max(mixers),
        # All that is fitted, in the dtype that it is stored in.
        waiting=sum(mixers) * config_dtype(checkpoint.config).itemsize // 4,
    )


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


def _mixer_bytes(layer: LayerSpec, hidden: int) -> int:
    """Bytes of a layer's mixer in float32."""
    with torch.device("meta"):
        return 4 * sum(p.numel() for p in Block(layer, hidden, 0).mixer.parameters())


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()


def fits(memory: Memory, device: torch.device) -> bool:
    """Whether there is so much, on the device and on the CPU."""
    return all(size <= free_memory(place) for place, size in memory.on(device).items())


def check_fits(memory: Memory, device: torch.device, what: str, instead: str) -> None:
    """Raises DoesNotFitError unless there is so much; it says what takes it, and what to do instead."""
    for place, size in memory.on(device).items():
        free = free_memory(place)
        if size > free:
            raise DoesNotFitError(
                f"{what} takes about {in_units(size)} of memory on {place}, and {in_units(free)} are free: use a "
                f"machine with more, or {instead}"
            )
