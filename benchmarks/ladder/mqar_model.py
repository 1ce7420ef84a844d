"""Small models of fla's families, and their training on MQAR."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from models import delta_net, gated_deltanet
from mqar_task import Questions, draw, length_for
from optimizers import optimizers
from torch import Tensor, nn

from modeling.model import Model
from modeling.ops import GatedDeltaRule
from pruning.mqar_table import TrainingPoint

WARMUP = 100
"""Steps over which the learning rate rises."""
DECAY = 0.5
"""Share of the training, at its end, over which the learning rate falls to zero."""
LEARNT = 0.9
"""Accuracy at which the next number of pairs joins the training."""
MEMORY = 0.95
"""Weight of the past in the running mean of the accuracy."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    family: str = "gated_deltanet"
    layers: int = 2
    hidden: int = 128
    heads: int = 1
    d_k: int = 128
    d_v: int = 128
    vocab: int = 8192

    def config(self, longest: int) -> dict[str, Any]:
        """fla's config.json for sequences of up to `longest` tokens. Raises ValueError for a family we don't make."""
        families = {"gated_deltanet": gated_deltanet, "delta_net": delta_net}
        if self.family not in families:
            raise ValueError(f"family={self.family!r} must be gated_deltanet or delta_net")
        sizes = (self.hidden, self.layers, self.heads, 2 * self.hidden, self.d_k, self.d_v)
        own = {"vocab_size": self.vocab, "max_position_embeddings": longest, "dtype": "float32"}
        return families[self.family](*sizes) | own


@dataclass(frozen=True)
class Training:
    """How to train."""

    pairs: tuple[int, ...]
    """Numbers of pairs, ascending: each is trained on once the one before it is learnt."""
    steps: int
    tokens: int
    """Tokens of a step."""
    lr: float
    seconds: float | None = None
    """End after this time, however many steps that is. The outcome then depends on the machine's speed."""


def train(
    model: Model,
    training: Training,
    generator: torch.Generator,
    *,
    learnt: int = 0,
    rule: GatedDeltaRule | None = None,
    report: Callable[[TrainingPoint], object] = lambda point: None,
) -> list[TrainingPoint]:
    """Train the model in place on questions that are drawn anew for each step; the loss is of the answers alone.

    Args:
        generator: on the model's device.
        learnt: how many numbers of pairs, from the front, the model knows already.
        rule: the gated delta rule; None for the plain one.
        report: called with each of the points.

    Returns:
        Twenty points, the last one at the end.
    """
    model.requires_grad_(True)
    chosen = optimizers(model, training.lr, other_decay=0.0)
    running: dict[int, float] = {}
    points: list[TrainingPoint] = []
    open_levels = min(learnt + 1, len(training.pairs))
    began = time.monotonic()
    for step in range(1, training.steps + 1):
        done = (step - 1) / training.steps
        if training.seconds is not None:
            done = max(done, (time.monotonic() - began) / training.seconds)
        ends = step == training.steps or done >= 1
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = training.lr * max(0.0, min(1.0, step / WARMUP, (1 - done) / DECAY))
        level = int(torch.randint(open_levels, (1,), generator=generator, device=generator.device))
        pairs = training.pairs[level]
        questions = draw(
            generator, max(1, training.tokens // length_for(pairs)), pairs, model.spec.vocab_size
        )
        logits = answers(model, questions, rule)
        F.cross_entropy(logits, questions.values.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        accuracy = (logits.argmax(-1) == questions.values.flatten()).float().mean().item()
        running[pairs] = MEMORY * running.get(pairs, 0.0) + (1 - MEMORY) * accuracy
        if level == open_levels - 1 and running[pairs] > LEARNT:
            open_levels = min(open_levels + 1, len(training.pairs))
        if ends or done >= len(points) / 20:
            points.append(TrainingPoint(step, time.monotonic() - began, dict(running)))
            report(points[-1])
        if ends:
            break
    return points


def answers(model: Model, questions: Questions, rule: GatedDeltaRule | None = None) -> Tensor:
    """Log-odds over the vocabulary where the questions are asked, float32 `[sequences * pairs, vocab]`."""
    count, length = questions.ids.shape
    with torch.autocast(questions.ids.device.type, torch.bfloat16, enabled=questions.ids.is_cuda):
        hidden, _ = model(questions.ids.flatten(), range(0, count * length + 1, length), rule=rule)
        asked = hidden.view(count, length, -1).gather(
            1, questions.at[..., None].expand(-1, -1, hidden.shape[-1])
        )
        return model.logits(asked.flatten(0, 1)).float()
