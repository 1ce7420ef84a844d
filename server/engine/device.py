"""What the engine must know of the device it runs on: how results come back, what memory there is, whether steps can be
recorded.

A seam: tests put a device with a clock of its own here, and see what is launched, copied and waited for, in what order.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lowkey.memory import host_memory
from modeling.runtime.gpu.graphs import CudaRecorder, Recorder


class Download(Protocol):
    """The results of one step, copied to the host behind the step's own work."""

    def add(self, tensor: Tensor) -> Tensor:
        """Queue a copy of the tensor. Returns the host's, to be read after `wait`."""
        ...

    def seal(self) -> None:
        """Say that nothing more will be added: what `wait` waits for is complete."""
        ...

    def wait(self) -> None:
        """Wait until the copies are there. What was launched after `seal` may still run."""
        ...


class Device(Protocol):
    """Where a model runs.

    `depth` is how many steps are launched ahead of the one being collected (`Engine`), `logit_rows` for how many
    positions logits are made and sampled at a time.
    """

    name: str
    depth: int
    logit_rows: int

    @property
    def torch_device(self) -> torch.device: ...

    def download(self) -> Download: ...

    def recorder(self) -> Recorder | None:
        """What records decode steps; None where they can't be recorded, or needn't be."""
        ...

    def free_memory(self) -> int:
        """Bytes that can still be allocated, whoever has the rest."""
        ...

    def total_memory(self) -> int: ...

    def peak_memory(self, work: Callable[[], object]) -> int:
        """How many bytes more than now are in use at the most while `work` runs. It runs twice: what compiles or
        measures itself at first does not count."""
        ...

    def release_memory(self) -> None:
        """Give back what is held but not in use."""
        ...


class _Here:
    """The results of a step on the CPU: nothing is to be copied or waited for."""

    def add(self, tensor: Tensor) -> Tensor:
        return tensor

    def seal(self) -> None: ...

    def wait(self) -> None: ...


class Host:
    """The CPU, which has done a step when its launch returns."""

    name = "cpu"
    depth = 0
    logit_rows = 64

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def download(self) -> Download:
        return _Here()

    def recorder(self) -> Recorder | None:
        return None

    def free_memory(self) -> int:
        return host_memory()

    def total_memory(self) -> int:
        return host_memory()

    def peak_memory(self, work: Callable[[], object]) -> int:
        return 0

    def release_memory(self) -> None: ...


HOST = Host()


class _CudaDownload:
    """Copies to pinned memory, and an event behind them."""

    def __init__(self) -> None:
        # A thread that waits sleeps: the next step is queued already.
        self._event = torch.cuda.Event(blocking=True)

    def add(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def seal(self) -> None:
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class Cuda:
    """An NVIDIA GPU. Makes it the current device of this process.

    Args:
        name: cuda or cuda:N.
    """

    depth = 1
    logit_rows = 256

    def __init__(self, name: str) -> None:
        self.torch_device = torch.device("cuda", torch.device(name).index or 0)
        self.name = str(self.torch_device)
        torch.cuda.set_device(self.torch_device)

    def download(self) -> Download:
        return _CudaDownload()

    def recorder(self) -> Recorder | None:
        return CudaRecorder()

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def total_memory(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[1]

    def peak_memory(self, work: Callable[[], object]) -> int:
        work()
        torch.cuda.synchronize(self.torch_device)
        self.release_memory()
        before = torch.cuda.memory_allocated(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        work()
        peak = torch.cuda.max_memory_reserved(self.torch_device)
        self.release_memory()
        return max(peak - before, 0)

    def release_memory(self) -> None:
        torch.cuda.empty_cache()
