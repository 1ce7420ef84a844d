"""Which parameters recovery trains, and how they get back into the model.

Our mixer has one fused input projection. For training it is taken apart, so that what trains q and k alone touches
nothing else: no gradient is masked, and no optimiser state or weight decay reaches other rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lowkey import how_to_install
from modeling.layers import DeltaMixer
from modeling.model import Model
from modeling.spec import ModelSpec
from pruning.errors import PruningError

TrainableSet = Literal["lora", "small", "full"]
TRAINABLE_SETS: tuple[TrainableSet, ...] = get_args(TrainableSet)

_PARTS = ("q", "k", "v", "rest")
_ADAPTED = r".*\.mixer\.in_proj\.(q|k|v)"


class SplitProjection(nn.Module):
    """A mixer's input projection as four: q, k, v, and the rest (gate, beta, decay)."""

    def __init__(self, mixer: DeltaMixer) -> None:
        super().__init__()
        s = mixer.spec
        for name, rows in zip(_PARTS, mixer.in_proj.weight.split(part_rows(mixer)), strict=True):
            part = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
            part.weight = nn.Parameter(rows.detach().clone())
            setattr(self, name, part)
        self.out_features = sum(s.in_proj_sizes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in _PARTS], dim=-1)


def part_rows(mixer: DeltaMixer) -> list[int]:
    """Rows of q, k, v and the rest in the fused projection."""
    s = mixer.spec
    return [s.key_dim, s.key_dim, s.value_dim, sum(s.in_proj_sizes) - s.conv_channels]


@contextmanager
def trainable(
    model: Model, which: TrainableSet, *, rank: int = 32, alpha: int = 64, seed: int = 0
) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters to train, by name; outside the block the model is an ordinary one again, training merged in.

    `lora`: adapters of `rank` on q, k and v (scale `alpha / rank`), convolutions, norms and biases.
    `small`: q and k projections, convolutions and norms. `full`: everything. Mixers of another kind than linear
    attention are trained by `full` alone.

    Args:
        seed: Seed of the adapters' initial values.

    Raises:
        PruningError: `which` is "lora" and peft is not installed.
    """
    mixers = model.deltas.values()
    for mixer in mixers:
        mixer.in_proj = SplitProjection(mixer)  # type: ignore[assignment]
    model.requires_grad_(False)
    try:
        if which == "lora":
            _add_adapters(model, rank, alpha, seed)
        for parameter in _trained(model, which):
            parameter.requires_grad_()
        yield {name: p for name, p in model.named_parameters() if p.requires_grad}
    finally:
        for mixer in mixers:
            _fuse(mixer)
        if which == "lora":
            vars(model).pop("peft_config", None)
        model.requires_grad_(False)


def trained_count(spec: ModelSpec, which: TrainableSet, rank: int) -> int:
    """How many parameters `trainable` gives. Raises PruningError as it does."""
    with torch.device("meta"):
        model = Model(spec)
        with trainable(model, which, rank=rank) as parameters:
            return sum(p.numel() for p in parameters.values())


def _trained(model: Model, which: TrainableSet) -> Iterator[nn.Parameter]:
    """The parameters of a set, in a model whose projections are split and have their adapters."""
    if which == "full":
        yield from model.parameters()
        return
    modules: list[nn.Module] = [model.norm]
    for block in model.blocks:
        modules += [block.mixer_norm, block.ffn_norm]
    for mixer in model.deltas.values():
        modules += [mixer.conv, mixer.o_norm]
        if which == "small":
            modules += [mixer.in_proj.get_submodule(part) for part in "qk"]
            continue
        yield from (p for name, p in mixer.in_proj.named_parameters() if "lora_" in name)  # peft's names
        if mixer.spec.has_decay:
            yield mixer.dt_bias
    for module in modules:
        yield from module.parameters()


def _add_adapters(model: Model, rank: int, alpha: int, seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as e:
        raise PruningError(f"train='lora' needs peft: {how_to_install('recover')}") from e
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=_ADAPTED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


@torch.no_grad()
def _fuse(mixer: DeltaMixer) -> None:
    """Merge the adapters, if any, and join the parts."""
    weights = []
    for name in _PARTS:
        part: Any = mixer.in_proj.get_submodule(name)
        if hasattr(part, "base_layer"):
            part.merge()
            part = part.get_base_layer()
        weights.append(part.weight)
    hidden = weights[0].shape[1]
    fused = nn.Linear(hidden, sum(mixer.spec.in_proj_sizes), bias=False, device="meta")
    fused.weight = nn.Parameter(torch.cat(weights))
    mixer.in_proj = fused
