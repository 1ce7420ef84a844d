"""How fla's kernels for prompts are launched, on cards for which that is fixed.

fla tunes each of them at its first launch, for each number of heads and each d_k: 34 configurations are compiled and
timed where 5 will be used, and two engines that start on one card disturb each other's timing. On the cards below each
kernel has one configuration; `scripts/gpu_check.sh --only prompts` says what that costs. On any other card fla tunes as
it always does, and keeps what it found on disk beside the kernels.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from triton import Config
from triton.runtime.autotuner import Autotuner, Heuristics

logger = logging.getLogger("lowkey.modeling")

KERNELS = {
    "chunk_local_cumsum_scalar_kernel": "fla.ops.utils.cumsum",
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel": "fla.ops.gated_delta_rule.chunk_fwd",
    "recompute_w_u_fwd_kernel": "fla.ops.gated_delta_rule.wy_fast",
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": "fla.ops.common.chunk_delta_h",
    "chunk_fwd_kernel_o": "fla.ops.common.chunk_o",
}
"""The kernels of `chunk_gated_delta_rule` in the order in which it launches them, and the modules that they are in."""

FIXED: dict[tuple[int, int], dict[str, dict[str, int]]] = {
    (9, 0): {
        "chunk_local_cumsum_scalar_kernel": {"num_warps": 1},
        "chunk_gated_delta_rule_fwd_kkt_solve_kernel": {"BK": 64, "num_warps": 1},
        "recompute_w_u_fwd_kernel": {"num_warps": 4, "num_stages": 3},
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": {"BV": 32, "num_warps": 4, "num_stages": 2},
        "chunk_fwd_kernel_o": {"BK": 64, "BV": 64},
    }
}
"""By compute capability: the configuration of each kernel, as much of it as tells it from fla's others. None spills a
register at any d_k that fla allows, or takes more than 156 of a Hopper card's 227 KB of shared memory."""

Tuned = dict[str, list[Config]]
"""Names of kernels, and the configurations that are tried at their first launch."""


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """In the place of torch's decorators while fla is imported."""
    return (lambda decorated: decorated) if function is None else function


def _kernel(name: str) -> Any:
    """One of `KERNELS` with what decorators have wrapped around it. Raises ImportError where this version of fla has no
    such kernel."""
    # fla marks what torch.compile is to leave alone, and a few functions that it is to compile. That alone imports all
    # of torch's compiler, 1.5 s of each engine's start, and no engine uses it.
    with patch.object(torch.compiler, "disable", _unmarked), patch.object(torch, "compile", _unmarked):
        module = import_module(KERNELS[name])
    if not hasattr(module, name):
        raise ImportError(f"this version of fla has no {name}")
    return getattr(module, name)


def tuner(name: str) -> Autotuner | None:
    """What chooses the configuration of one of `KERNELS`, somewhere within what decorators have wrapped around it; None
    where this version of fla has no such kernel."""
    try:
        kernel = _kernel(name)
    except ImportError:
        return None
    while kernel is not None and not isinstance(kernel, Autotuner):
        kernel = getattr(kernel, "fn", None)
    return kernel


class Launcher:
    """Launches one of `KERNELS`: as fla does, but where it has one configuration, past all that chooses one at every
    launch, which takes the host as long as the launch itself.

    Raises:
        ImportError: this version of fla has no such kernel, or does not tune it.
    """

    def __init__(self, name: str) -> None:
        self._kernel = kernel = _kernel(name)
        self._flags: dict[str, Callable[[dict[str, Any]], Any]] = {}
        chooser = tuner(name)
        if chooser is None:
            raise ImportError(f"this version of fla does not tune {name}")
        self._tuner = chooser
        while kernel is not chooser:
            if isinstance(kernel, Heuristics):
                self._flags |= kernel.values
            kernel = kernel.fn

    def __call__(self, grid: Any, **arguments: Any) -> None:
        """Launch it.

        Args:
            grid: programs along each axis, or a function that gives them for a configuration.
            arguments: all of the kernel's but those that its configurations and flags set.
        """
        configs = self._tuner.configs
        if len(configs) > 1:
            self._kernel[grid](**arguments)
            return
        for flag, value in self._flags.items():
            arguments[flag] = value(arguments)
        self._tuner.fn[grid](**arguments, **configs[0].all_kwargs())


def use_fixed(capability: tuple[int, int]) -> Tuned:
    """Leave fla's kernels only the configurations that are fixed for cards of this compute capability.

    A kernel that has no such configuration, in another version of fla, goes on being tuned, and the log says so.

    Returns:
        What the kernels would have been tuned with.
    """
    chosen: Tuned = {}
    for name, wanted in FIXED.get(capability, {}).items():
        chooser = tuner(name)
        fitting = [c for c in chooser.configs if wanted.items() <= c.all_kwargs().items()] if chooser else []
        if chooser is None or not fitting:
            logger.warning(
                "this version of fla has no %s with %s: it is tuned at its first launch", name, wanted
            )
            continue
        chosen[name] = fitting[:1]
    return use(chosen)


def use(tuned: Tuned) -> Tuned:
    """Have kernels tuned with these configurations. Returns those that they had."""
    before: Tuned = {}
    for name, configs in tuned.items():
        chooser = tuner(name)
        if chooser is not None:
            before[name], chooser.configs = chooser.configs, configs
    return before
