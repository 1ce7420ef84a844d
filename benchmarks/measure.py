"""What the speed figures share: rounds that interleave everything compared, medians with spread, the machine.

Machines are shared and noisy. Whatever is compared runs in turns in one process on one thread, so that a slow minute
hits all sides; ratios are taken round by round; and times are the CPU's: waiting for a core does not count, caches and
memory that neighbours take do.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from loadtest.facts import processor
from lowkey import how_to_install
from modeling.checkpoint import open_checkpoint
from modeling.families import family_of
from modeling.huge_pages import zeros
from modeling.layers import MoE
from modeling.model import Model

try:
    import transformers
except ImportError as e:
    sys.exit(f"{e}: {how_to_install('dev')}")

MINIMUM_ROUNDS, MAXIMUM_ROUNDS = 5, 200


def interleave(
    sides: dict[str, Callable[[], object]],
    seconds: float,
    calls: int = 1,
    *,
    rounds: int = MINIMUM_ROUNDS,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of a call by `clock`, round by round, for about `seconds` in all after one round of warming up.

    A side's turn is `calls` calls: all but the first find their weights where their own last call left them. There are
    `rounds` rounds at least. With several threads the CPU's time says nothing: then `clock` is the wall's.
    """

    def turn(side: Callable[[], object]) -> float:
        began = clock()
        for _ in range(calls):
            side()
        return (clock() - began) / calls

    for side in sides.values():
        side()
    return turns({name: partial(turn, side) for name, side in sides.items()}, seconds, rounds)


def turns(
    sides: dict[str, Callable[[], float]], seconds: float, rounds: int = MINIMUM_ROUNDS
) -> dict[str, list[float]]:
    """What each side says that its turns took, round by round, for about `seconds` in all and `rounds` at least."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    for n in range(MAXIMUM_ROUNDS):
        if n >= rounds and time.perf_counter() > end:
            break
        for name, side in sides.items():
            samples[name].append(side())
    return samples


def difference(a: Tensor, b: Tensor, tolerance: float, peer: str = "transformers") -> float:
    """Our logits' difference from the peer's, relative in norm; ends the run where both can't be the same function."""
    result = float((a.float() - b.float()).norm() / b.float().norm())
    if not result < tolerance:
        raise SystemExit(f"our logits differ from those of {peer} by {result:.2g}: figures of what?")
    return result


def products(model: nn.Module, rows: int, multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """The matrix products of `rows` tokens, whose experts are drawn at random."""
    linears = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    # The gate of the expert that all tokens take is one row, too few for our kernel by themselves.
    work = [(rows, w) for w in linears if len(w) > 1]
    for m in model.modules():
        if isinstance(m, MoE):
            drawn = torch.rand(rows, m.spec.num_experts).topk(m.spec.top_k, dim=-1).indices
            for e, n in zip(*drawn.unique(return_counts=True), strict=True):
                work += [(int(n), m.in_proj[e]), (int(n), m.out_proj[e])]
    dtype = work[0][1].dtype
    inputs = {size: torch.randn(size).to(dtype) for size in {(n, w.shape[1]) for n, w in work}}

    def run() -> None:
        for n, w in work:
            multiply(inputs[n, w.shape[1]], w)

    return run


def summary(values: Sequence[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4)
    return {"median": median(values), "q1": low, "q3": high, "n": len(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    return summary([a / b for a, b in zip(over, under, strict=True)])


def spread(s: dict[str, float], form: str = ".2f") -> str:
    return f"{s['median']:{form}} ({s['q1']:{form}} to {s['q3']:{form}})"


def read_memory() -> Callable[[], object]:
    """Reads 256 MiB in large pages, far more than caches hold."""
    block = zeros([1 << 26], torch.float32).uniform_()
    return block.sum


def copy_memory() -> Callable[[], object]:
    """Reads 128 MiB and writes 128 MiB."""
    source, target = (zeros([1 << 25], torch.float32).uniform_() for _ in range(2))
    return lambda: target.copy_(source)


def random_model(config: dict[str, Any]) -> Model:
    """A model of fla's configuration, with random weights that keep activations in range."""
    model = Model(family_of(config).spec(config)).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.2 if p.ndim == 1 else p.shape[-1] ** -0.5)
        if "norm" in name:
            p += 1
    return model


LARGE = {
    "model_type": "gated_deltanet",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_heads": 8,
    "head_dim": 128,
    "expand_v": 1.0,
    "intermediate_size": 2816,
    "norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
"""Config of a Gated DeltaNet of 171 M parameters."""


def load(source: str, d_k: int | None, dtype: torch.dtype) -> Model:
    """A checkpoint, or "random-171M"; with another d_k, random weights of the checkpoint's other shapes."""
    torch.manual_seed(0)
    if source == "random-171M":
        model = random_model(LARGE if d_k is None else {**LARGE, "head_dim": d_k, "expand_v": 128 / d_k})
    else:
        checkpoint = open_checkpoint(source)
        first = next(iter(checkpoint.spec.deltas.values()))
        if d_k in (None, first.d_k):
            return checkpoint.load(dtype=dtype).requires_grad_(False)
        model = random_model({**checkpoint.config, "head_dim": d_k, "expand_v": first.d_v / d_k})
    return model.to(dtype)


def quiet(threads: int = 1) -> None:
    """None of transformers' warnings that it has no GPU kernels, and no other threads than these."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()


def machine() -> dict[str, Any]:
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
