"""Reconstruction: each layer of a reduced checkpoint is fitted to what the dense layer gives, one after the other.

No gradient goes through more than one layer. Memory holds one layer of each checkpoint, and the hidden states of all
tokens twice: as the dense model has them and as the reduced one has them. A reduced layer reads the second and is
fitted to what the dense layer makes of the first, so it also makes good what the layers before it got wrong.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeling.checkpoint import FLOATS, Checkpoint
from modeling.families import TensorMap
from modeling.layers import Block, DeltaMixer
from modeling.ops import GatedDeltaRule
from modeling.spec import ModelSpec
from pruning.calibration import Origin, cu_seqlens
from pruning.errors import PruningError
from pruning.evaluation.likelihood import CPU_BATCH, GPU_BATCH
from pruning.finite import finite
from pruning.progress import Advance, no_progress
from pruning.streaming import layers_to_run
from pruning.training import BETAS, CLIP, flushed_denormals, schedule

HELD_OUT = 16
"""One of so many windows is not fitted to: errors are measured on these."""


@dataclass(frozen=True)
class ReconstructionSettings:
    """How to fit. Raises PruningError for values that can't be meant."""

    steps: int = 200
    """Steps of Adam for each layer."""
    batch: int = 4
    """Windows in each step."""
    lr: float = 1e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of the order of the windows."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise PruningError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.lr < math.inf:
            raise PruningError(f"lr={self.lr} must be a positive number")


@dataclass(frozen=True)
class LayerFit:
    """How one layer was fitted. Errors are mean squares of what its output is off by on windows that it was not fitted
    to, as a share of the variance of the dense layer's output; the mean over the channels."""

    layer: int
    """Index of the layer in the model."""
    before: float
    """The error of the layer as it was, behind fitted ones."""
    after: float
    """The error with the fitted weights, in the dtypes of the checkpoint. Where it is not below `before` the layer has
    stayed as it was."""
    seconds: float


@dataclass(frozen=True)
class Reconstruction:
    """The fitted layers of a reduced checkpoint."""

    tensors: Mapping[str, Tensor]
    """The fitted tensors under the checkpoint's names, in its dtypes and shapes, on the CPU."""
    fits: tuple[LayerFit, ...]
    """One for each linear-attention layer, in their order."""

    def as_json(self, origin: Origin, settings: ReconstructionSettings) -> dict[str, Any]:
        """What `state_reduction.json` says about it."""
        return {
            "tokens": origin.tokens,
            "origin": origin.as_json(),
            "settings": asdict(settings),
            "seconds": sum(fit.seconds for fit in self.fits),
            "layers": [asdict(fit) for fit in self.fits],
        }


def run_together(device: torch.device) -> int:
    """How many windows run together where nothing is trained."""
    return GPU_BATCH if device.type == "cuda" else CPU_BATCH


def products(device: torch.device) -> torch.dtype:
    """The dtype of products: on a CPU bfloat16 is slower than float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def held_out(count: int) -> int:
    """How many of `count` windows are not fitted to; they are the last ones."""
    return max(1, count // HELD_OUT)


def tokens_to_run(spec: ModelSpec, windows: Tensor, settings: ReconstructionSettings) -> int:
    """How many tokens `reconstruct` runs through one layer or another."""
    count, length = windows.shape
    of_layer = settings.steps * settings.batch + 2 * held_out(count)
    return length * (2 * layers_to_run(spec) * count + len(spec.linear_layers) * of_layer)


def reconstruct(
    dense: Checkpoint,
    reduced: Checkpoint,
    windows: Tensor,
    settings: ReconstructionSettings,
    *,
    device: torch.device | str = "cpu",
    hidden_device: torch.device | str | None = None,
    rule: GatedDeltaRule | None = None,
    advance: Advance = no_progress,
) -> Reconstruction:
    """Fit the linear-attention layers of `reduced` to those of `dense`, of which it was cut.

    Fitted are all parameters of a layer's mixer and the norm before it, to the output of the whole layer; where that
    does not lower the error on the windows that are held out, the layer stays as it was. So do layers of other kinds.
    On a GPU products are in bfloat16 with float32 weights, on the CPU in float32; there the result depends on the
    arguments alone, to the last bit.

    Args:
        windows: int64 `[count, length]`, at least two.
        device: where each layer runs.
        hidden_device: where the hidden states of all tokens stay, `8 * count * length * hidden_size` bytes; None for
            `device`.
        rule: as `Model.forward`; it must be differentiable.
        advance: told of `tokens_to_run` tokens in all.

    Raises:
        PruningError: there is one window, or a layer gives NaN or Inf.
        CheckpointError: a tensor is missing or of another shape than the config says.
    """
    device = torch.device(device)
    if len(windows) < 2:
        raise PruningError(f"windows={len(windows)} must be at least 2: one is fitted to, and one measures")
    run = _Run(windows, settings, dense.spec.eos_token_ids, device, rule, advance)
    # Of a mapped file only the rows that are needed are read.
    embeddings = dense.tensor(dense.name_of("embeddings.weight"))
    taught = embeddings[windows.flatten()].float().view(*windows.shape, -1).to(hidden_device or device)
    del embeddings
    hidden = taught.clone()
    tensors: dict[str, Tensor] = {}
    fits = []
    with flushed_denormals():
        for layer in range(layers_to_run(dense.spec)):
            began = time.perf_counter()
            run.forward(dense.block(layer, device=device), taught, into=taught)
            block = reduced.block(layer, device=device)
            if not isinstance(block.mixer, DeltaMixer):
                run.forward(block, hidden, into=hidden)
                continue
            loss = _Loss(taught)
            before = run.error(block, hidden, loss)
            run.fit(block, hidden, loss)
            fitted = _as_stored(reduced, block, layer)
            _read_back(reduced, block, layer, fitted)
            after = run.error(block, hidden, loss)
            if after < before:
                tensors |= fitted
            else:
                block = reduced.block(layer, device=device)
            run.forward(block, hidden, into=hidden)
            fits.append(LayerFit(layer, before, after, time.perf_counter() - began))
    return Reconstruction(tensors, tuple(fits))


class _Loss:
    """The error of a layer's output, the dense layer's being `target` `[count, length, hidden]`: mean squares as shares
    of each channel's variance, so that a few channels of large numbers do not decide alone."""

    def __init__(self, target: Tensor) -> None:
        self._target = target
        variance = target.flatten(0, 1).var(0, correction=0)
        # A channel that hardly varies weighs no more than one of a millionth of the others' variance.
        variance = variance.clamp_min(1e-6 * float(variance.mean())).clamp_min(1e-20)
        self._weight = 1 / (variance * len(variance))

    def __call__(self, y: Tensor, windows: Tensor | slice) -> Tensor:
        """The mean over the tokens of y `[windows, length, hidden]`, the outputs for some of the windows."""
        squares = (y - self._target[windows].to(y.device)).square()
        return (squares @ self._weight.to(y.device)).mean()


class _Run:
    """What is the same for all layers."""

    def __init__(
        self,
        windows: Tensor,
        settings: ReconstructionSettings,
        separators: tuple[int, ...],
        device: torch.device,
        rule: GatedDeltaRule | None,
        advance: Advance,
    ) -> None:
        self._windows, self._settings, self._separators = windows, settings, separators
        self._device, self._rule, self._advance = device, rule, advance
        self._fitted_to = len(windows) - held_out(len(windows))
        """How many windows layers are fitted to; errors are of the others."""

    @torch.no_grad()
    def forward(self, block: Block, inputs: Tensor, *, into: Tensor) -> None:
        """Run all windows, from `inputs` to `into`, both `[count, length, hidden]`."""
        for some in self._parts(0):
            into[some] = self._output(block, inputs, some)

    @torch.no_grad()
    def error(self, block: Block, inputs: Tensor, loss: _Loss) -> float:
        """The loss of a block's outputs for the windows that are held out.

        Raises:
            PruningError: it is not finite.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for some in self._parts(self._fitted_to):
            total += (some.stop - some.start) * loss(self._output(block, inputs, some), some)
        error = float(total) / (len(self._windows) - self._fitted_to)
        if not math.isfinite(error):
            raise PruningError(f"layer {block.mixer.layer}: the error of its output is {error}: NaN or Inf")
        return error

    def _parts(self, first: int) -> Iterator[slice]:
        """The windows from `first` on, in parts that run together."""
        count, length = self._windows.shape
        together = run_together(self._device)
        for at in range(first, count, together):
            yield slice(at, min(at + together, count))
            self._advance((min(at + together, count) - at) * length)

    def fit(self, block: Block, inputs: Tensor, loss: _Loss) -> None:
        """Train the parameters of a block."""
        s = self._settings
        parameters = [*block.mixer_norm.parameters(), *block.mixer.parameters()]
        for p in parameters:
            p.requires_grad_()
        optimizer = torch.optim.AdamW(parameters, lr=s.lr, betas=BETAS, weight_decay=0.0)
        generator = torch.Generator().manual_seed(s.seed)
        epochs = -(-s.steps * s.batch // self._fitted_to)
        order = torch.cat([torch.randperm(self._fitted_to, generator=generator) for _ in range(epochs)])
        for step, some in enumerate(order[: s.steps * s.batch].split(s.batch)):
            for group in optimizer.param_groups:
                group["lr"] = s.lr * schedule(step, s.steps)
            loss(self._output(block, inputs, some), some).backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            self._advance(s.batch * self._windows.shape[1])
        block.requires_grad_(False)

    def _output(self, block: Block, inputs: Tensor, some: Tensor | slice) -> Tensor:
        """A block's output for some of the windows, float32 `[windows, length, hidden]`."""
        x = inputs[some].to(self._device)
        narrow = products(self._device) == torch.bfloat16
        with torch.autocast(self._device.type, torch.bfloat16, enabled=narrow):
            y, _ = block(x.flatten(0, 1), cu_seqlens(self._windows[some], self._separators), rule=self._rule)
        output: Tensor = y.view(x.shape).float()
        return output


def _fitted(checkpoint: Checkpoint, layer: int) -> Iterator[TensorMap]:
    """The tensors that are fitted: those of a layer's mixer and of the norm before it."""
    names = (f"layers.{layer}.mixer.", f"layers.{layer}.mixer_norm.")
    return (m for m in checkpoint.maps if m.ours.startswith(names))


def _as_stored(checkpoint: Checkpoint, block: Block, layer: int) -> dict[str, Tensor]:
    """What is fitted of a block under the checkpoint's names, in its dtypes and shapes."""
    parameters = dict(block.named_parameters(f"layers.{layer}"))
    after = f"{checkpoint.source}: after reconstruction, in the checkpoint's own dtype"
    stored = {}
    for m in _fitted(checkpoint, layer):
        for name, tensor in zip(m.theirs, m.split(parameters[m.ours].detach()), strict=True):
            dtype, shape = checkpoint.dtype_and_shape(name)
            # A copy: parts of one matrix would keep the whole of it, and on the CPU in float32.
            part = tensor.to("cpu", FLOATS[dtype], copy=True).reshape(shape)
            stored[name] = finite(part, name, after)
    return stored


def _read_back(checkpoint: Checkpoint, block: Block, layer: int, stored: Mapping[str, Tensor]) -> None:
    """Give a block the weights that are stored, which are rounded: the layers behind it then correct that, too."""
    types = checkpoint.parameter_types(torch.float32)
    parameters = dict(block.named_parameters(f"layers.{layer}"))
    for m in _fitted(checkpoint, layer):
        shape, kind = types[m.ours]
        p = parameters[m.ours]
        p.data = m.join((stored[name] for name in m.theirs), shape, kind, p.device)
