"""Training for recovery: cross entropy and distillation, AdamW, cosine schedule; resumed where it was killed."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowkey.publishing import replacing
from modeling.model import Model
from modeling.ops import GatedDeltaRule
from pruning.batches import Batches
from pruning.calibration import WINDOW
from pruning.errors import PruningError
from pruning.evaluation import perplexity
from pruning.interrupts import saving
from pruning.trainable import TRAINABLE_SETS, TrainableSet, trainable

WARMUP = 0.05
"""Share of the steps over which the learning rate rises."""
BETAS = (0.9, 0.95)
CLIP = 1.0
"""Largest norm of a step's gradient."""
SAVE_SECONDS = 180.0
LOGITS = 2**26
"""Logits held at once; those of a whole batch would be the largest tensors by far."""

OnStep = Callable[[int, float], None]
"""Called after each step with its tokens and its cross entropy."""


def no_report(tokens: int, loss: float) -> None:
    """An `OnStep` for callers that show nothing."""


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then half a cosine to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. Raises PruningError for values that can't be meant."""

    tokens: int
    """How many tokens to train on, rounded up to whole steps."""
    train: TrainableSet = "small"
    lr: float = 1e-3
    """Peak learning rate."""
    batch: int = 8
    """Windows per forward pass."""
    accumulate: int = 1
    """Forward passes per step, whose gradients are added up."""
    window: int = WINDOW
    """Tokens to predict per window; each window starts from an empty state."""
    ce_weight: float = 1.0
    """Weight of the cross entropy in the loss."""
    kl_weight: float = 1.0
    """Weight of the distillation, `temperature^2 * KL(dense || reduced)`, in the loss."""
    temperature: float = 2.0
    """Temperature of the distillation."""
    rank: int = 32
    """Rank of the adapters."""
    alpha: int = 64
    """Adapters are scaled by alpha / rank."""
    seed: int = 0
    """Seed of the order of the text and of the adapters."""
    evaluations: int = 10
    """Points of the held-out curve after the first."""

    def __post_init__(self) -> None:
        if self.train not in TRAINABLE_SETS:
            raise PruningError(f"train={self.train!r} must be one of {', '.join(TRAINABLE_SETS)}")
        for name in ("tokens", "batch", "accumulate", "window", "rank", "alpha", "evaluations"):
            if getattr(self, name) < 1:
                raise PruningError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise PruningError(f"{name}={getattr(self, name)} must be a positive number")
        weights = (self.ce_weight, self.kl_weight)
        if not all(0 <= w < math.inf for w in weights) or not any(weights):
            raise PruningError(
                f"ce_weight={self.ce_weight} and kl_weight={self.kl_weight} must be 0 or more, and one above 0"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.window * self.batch * self.accumulate

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.tokens_per_step)

    def lr_at(self, step: int) -> float:
        return self.lr * schedule(step, self.steps)

    @property
    def evaluated_steps(self) -> set[int]:
        return {round(i * self.steps / self.evaluations) for i in range(self.evaluations + 1)}


@dataclass(frozen=True)
class Point:
    """One point of the curve; losses in nats per token. The training losses are means since the point before."""

    step: int
    tokens: int
    lr: float
    train_loss: float | None
    """Cross entropy; None before the first step."""
    train_kl: float | None
    """`temperature^2 * KL(dense || reduced)` at the temperature; None without distillation."""
    heldout_loss: float


@dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    curve: list[Point]
    trained_parameters: int


@dataclass
class _Progress:
    """What a run carries from step to step, besides parameters and optimiser state."""

    step: int
    curve: list[Point]
    ce: float = 0.0
    kl: float = 0.0
    """`ce` and `kl` are sums over the steps since the last point."""


def train(
    model: Model,
    teacher: Model | None,
    batches: Batches,
    heldout: Tensor,
    settings: TrainingSettings,
    *,
    saved: Path,
    fingerprint: Mapping[str, Any],
    save_seconds: float = SAVE_SECONDS,
    rule: GatedDeltaRule | None = None,
    on_step: OnStep = no_report,
) -> Result:
    """Train the model in place: float32 master weights, bfloat16 autocast.

    The result depends on the arguments alone: on the CPU it is bitwise the same whether or not it was killed and
    called again in between.

    Args:
        model: parameters in float32, on the device to train on.
        teacher: the dense model on the same device, or None to train on cross entropy alone.
        batches: Batches of `settings.batch` windows.
        heldout: int64 `[count, window + 1]`, measured in float32 for the curve.
        saved: file of a run's progress, written every `save_seconds`, when Ctrl-C is pressed and at the end; if it
            exists, the run goes on from there. The caller removes it.
        fingerprint: says which run this is; a file of another run is refused.
        rule: what all models train with, as in `Model.forward`; it must be differentiable.

    Raises:
        PruningError: loss or gradient is not finite (`saved` then holds the last good state), `saved` belongs to
            another run, or peft is missing.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP, once the progress is saved.
        OutputError: it could not be saved then.
    """
    which = {"rank": settings.rank, "alpha": settings.alpha, "seed": settings.seed}
    with flushed_denormals(), trainable(model, settings.train, **which) as parameters:
        optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, betas=BETAS, weight_decay=0.0)
        evaluated = settings.evaluated_steps

        def measured(progress: _Progress) -> Point:
            steps = progress.step - (progress.curve[-1].step if progress.curve else 0)
            return Point(
                step=progress.step,
                tokens=progress.step * settings.tokens_per_step,
                lr=settings.lr_at(progress.step),
                train_loss=progress.ce / steps if steps else None,
                train_kl=progress.kl / steps if steps and teacher is not None else None,
                heldout_loss=heldout_loss(model, heldout),
            )

        if saved.exists():
            progress = _load(saved, parameters, optimizer, fingerprint)
        else:
            progress = _Progress(0, [])
            progress.curve.append(measured(progress))

        def save(path: Path) -> None:
            _save(path, parameters, optimizer, progress, fingerprint)

        with saving(saved, save, save_seconds) as step_done:
            while progress.step < settings.steps:
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr_at(progress.step)
                first = progress.step * settings.accumulate
                losses = [
                    backward(model, teacher, batches[first + i], settings, rule)
                    for i in range(settings.accumulate)
                ]
                norm = nn.utils.clip_grad_norm_(parameters.values(), CLIP)
                ce, kl, size = torch.cat([torch.stack(losses).mean(0), norm[None]]).tolist()
                if not all(map(math.isfinite, (ce, kl, size))):
                    raise PruningError(
                        f"step {progress.step + 1} of {settings.steps}: cross entropy {ce}, KL {kl}, gradient norm "
                        f"{size}; a smaller lr than {settings.lr} may help"
                        + (f" (the last good state stays in {saved})" if saved.exists() else "")
                    )
                optimizer.step()
                optimizer.zero_grad()
                progress.step += 1
                progress.ce += ce
                progress.kl += kl
                if progress.step in evaluated:
                    progress.curve.append(measured(progress))
                    progress.ce = progress.kl = 0.0
                step_done(last=progress.step == settings.steps)
                on_step(settings.tokens_per_step, ce)
        return Result(progress.curve, sum(p.numel() for p in parameters.values()))


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Takes denormal numbers for zero in the block: decays of a whole chunk underflow, and denormals are slow."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def backward(
    model: Model,
    teacher: Model | None,
    rows: Tensor,
    settings: TrainingSettings,
    rule: GatedDeltaRule | None = None,
) -> Tensor:
    """Add the gradient of `ce_weight * CE + kl_weight * T^2 KL(teacher || model)`, over `accumulate`.

    Args:
        rows: `[batch, window + 1]`.
        rule: as for `train`.

    Returns:
        CE and T^2 KL, nats per token, `[2]`.
    """
    device = model.embeddings.weight.device
    rows = rows.to(device)
    inputs, targets = rows[:, :-1].flatten(), rows[:, 1:].flatten()
    cu_seqlens = range(0, len(inputs) + 1, rows.shape[1] - 1)
    autocast = torch.autocast(device.type, torch.bfloat16)
    with autocast:
        hidden, _ = model(inputs, cu_seqlens, rule=rule)
        if teacher is None:
            taught = hidden.detach()
        else:
            with torch.no_grad():
                taught, _ = teacher(inputs, cu_seqlens, rule=rule)
    # Logits and their gradients exist for some rows at a time; the blocks' backward runs once, from their sum.
    leaf = hidden.detach().requires_grad_()
    part = max(1, LOGITS // model.spec.vocab_size)
    sums = torch.zeros(2, device=device)
    for h, t, y in zip(leaf.split(part), taught.split(part), targets.split(part), strict=True):
        with autocast:
            logits = model.logits(h)
        logits = logits.float()
        ce = F.cross_entropy(logits, y, reduction="sum")
        kl = ce.new_zeros(())
        if teacher is not None:
            with torch.no_grad(), autocast:
                goal = teacher.logits(t)
            temperature = settings.temperature
            kl = temperature**2 * F.kl_div(
                F.log_softmax(logits / temperature, -1),
                F.log_softmax(goal.float() / temperature, -1),
                log_target=True,
                reduction="sum",
            )
        loss = settings.ce_weight * ce + settings.kl_weight * kl
        (loss / (len(inputs) * settings.accumulate)).backward()
        sums += torch.stack([ce.detach(), kl.detach()])
    hidden.backward(leaf.grad)
    return sums / len(inputs)


def heldout_loss(model: Model, windows: Tensor) -> float:
    """Nats per token; see `pruning.evaluation.perplexity`."""
    on_cpu = model.embeddings.weight.device.type == "cpu"
    return perplexity(model, windows, batch=4 if on_cpu else 32).loss


def _save(
    file: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: _Progress,
    fingerprint: Mapping[str, Any],
) -> None:
    tensors = {}
    for name, p in parameters.items():
        tensors[f"{name}:value"] = p.detach()
        tensors |= {f"{name}:{key}": value for key, value in optimizer.state[p].items()}
    metadata = {"fingerprint": json.dumps(fingerprint), "progress": json.dumps(asdict(progress))}
    with replacing(file) as temporary:
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, temporary, metadata)


@torch.no_grad()
def _load(
    file: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    fingerprint: Mapping[str, Any],
) -> _Progress:
    check_saved(file, fingerprint)
    state: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(parameters))}
    try:
        with safe_open(file, framework="pt") as f:
            progress = json.loads(f.metadata()["progress"])
            stored = set(f.keys())
            for i, (name, p) in enumerate(parameters.items()):
                if f"{name}:value" not in stored:  # files of before the feed-forward got its name
                    name = name.replace(".ffn", ".mlp")
                for key, shape in (
                    ("value", p.shape),
                    ("step", ()),
                    ("exp_avg", p.shape),
                    ("exp_avg_sq", p.shape),
                ):
                    tensor = f.get_tensor(f"{name}:{key}")
                    if tensor.shape != shape:
                        raise ValueError(f"{name}:{key} has shape {list(tensor.shape)}, not {list(shape)}")
                    state[i][key] = tensor
                p.copy_(state[i].pop("value"))
        progress["curve"] = [Point(**point) for point in progress["curve"]]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return _Progress(**progress)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise PruningError(f"{file} is no progress of a recovery run: {e}; remove it to start afresh") from e


def check_saved(file: Path, fingerprint: Mapping[str, Any]) -> int:
    """The number of steps that a progress file holds, 0 if there is none.

    Raises:
        PruningError: it can't be read, or is of another run.
    """
    if not file.exists():
        return 0
    try:
        with safe_open(file, framework="pt") as f:
            metadata = f.metadata() or {}
        found, step = json.loads(metadata["fingerprint"]), int(json.loads(metadata["progress"])["step"])
        if not isinstance(found, dict):
            raise TypeError(f"its fingerprint is a JSON {type(found).__name__}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise PruningError(f"{file} is no progress of a recovery run: {e}; remove it to start afresh") from e
    wanted = json.loads(json.dumps(fingerprint))
    if found != wanted:
        differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        values = ", ".join(f"{key} ({found.get(key)!r}, now {wanted.get(key)!r})" for key in differing)
        raise PruningError(
            f"{file} is the progress of a run with other {values}; "
            "repeat that run's options to go on, or remove the file to start afresh"
        )
    return step
