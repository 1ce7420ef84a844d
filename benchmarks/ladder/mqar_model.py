"""Small models of fla's families, and their training on MQAR."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mqar_task import Questions, draw, length_for
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
        common = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_heads": self.heads,
            "intermediate_size": 2 * self.hidden,
            "hidden_act": "swish",
            "use_short_conv": True,
            "conv_size": 4,
            "norm_eps": 1e-6,
            "max_position_embeddings": longest,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "attn": None,
            "dtype": "float32",
        }
        if self.family == "gated_deltanet":
            return {
                "architectures": ["GatedDeltaNetForCausalLM"],
                "model_type": self.family,
                **common,
                "num_v_heads": None,
                "head_dim": self.d_k,
                "expand_v": self.d_v / self.d_k,
                "use_gate": True,
            }
        if self.family == "delta_net":
            return {
                "architectures": ["DeltaNetForCausalLM"],
                "model_type": self.family,
                **common,
                "expand_k": self.heads * self.d_k / self.hidden,
                "expand_v": self.heads * self.d_v / self.hidden,
                "use_gate": False,
                "use_beta": True,
                "qk_norm": "l2",
                "qk_activation": "silu",
                "use_output_norm": True,
            }
        raise ValueError(f"family={self.family!r} must be gated_deltanet or delta_net")


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
    matrices = [p for n, p in model.layers.named_parameters() if n.endswith("proj.weight")]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=training.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=training.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    running: dict[int, float] = {}
    points: list[TrainingPoint] = []
    open_levels = min(learnt + 1, len(training.pairs))
    began = time.monotonic()
    for step in range(1, training.steps + 1):
        done = (step - 1) / training.steps
        if training.seconds is not None:
            done = max(done, (time.monotonic() - began) / training.seconds)
        ends = step == training.steps or done >= 1
        for optimizer in optimizers:
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
        for optimizer in optimizers:
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
