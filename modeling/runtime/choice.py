"""Which runtime a model gets."""

import contextlib
import logging
from threading import Thread

import torch

from lowkey import how_to_install
from modeling.model import Model
from modeling.runtime.interface import Runtime, UnavailableError
from modeling.runtime.torch import TorchRuntime

logger = logging.getLogger("lowkey.modeling")


def compile_model(model: Model) -> Runtime:
    """The fastest runtime for a model where it is; its parameters stay as they are from now on.

    On a CPU the model compiled for it ("cpu"), on an NVIDIA GPU Triton's and fla's kernels ("triton"), or, said
    in the log, plain torch ("torch").
    """
    try:
        return _on_gpu(model) if model.device.type == "cuda" else _on_cpu(model)
    except UnavailableError as e:
        logger.warning("decoding by plain torch operations, several times slower than compiled: %s", e)
        return TorchRuntime(model)


def prepare(device: torch.device) -> None:
    """Begin to import, in a thread, what `compile_model` needs for a model there. On a GPU that takes seconds, in which
    the model's weights can be read."""

    def load() -> None:
        with contextlib.suppress(ImportError):  # `compile_model` will say so
            import modeling.runtime.gpu.fla_rule  # noqa: F401

    if device.type == "cuda":
        Thread(target=load, name="imports", daemon=True).start()


def _on_cpu(model: Model) -> Runtime:
    from modeling.runtime.cpu import CpuRuntime

    return CpuRuntime(model)


def _on_gpu(model: Model) -> Runtime:
    try:
        from modeling.runtime.gpu.fla_kernels import use_fixed
        from modeling.runtime.gpu.fla_rule import fla_gated_delta_rule
        from modeling.runtime.gpu.runtime import GpuRuntime
    except ImportError as e:
        raise UnavailableError(f"{e}: {how_to_install('gpu')}") from e
    use_fixed(torch.cuda.get_device_capability(model.device))
    return GpuRuntime(model, fla_gated_delta_rule)
