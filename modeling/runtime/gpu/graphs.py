"""Decode steps as CUDA graphs: one graph per batch size, launched whole.

A decode step is a few hundred small kernels, which take the host longer to launch than a GPU to run. A graph is
recorded once and replayed with one call, always on the same memory: the buffers for ids and slots, the pool and the
hidden states stay where they are.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from modeling.runtime.interface import Runtime
from modeling.state import StatePool

logger = logging.getLogger("lowkey.modeling")

WARM_UP = 2
"""Runs before a recording: kernels are compiled, libraries take their workspace."""


MAX_BATCH = 1024
"""Larger batches are launched kernel by kernel: their states take the device longer than that takes the host, even in
8 bits."""


def graph_sizes(most: int) -> list[int]:
    """Batch sizes to record for up to `most` requests: from 8 on a quarter of a power of two apart, so that a batch is
    padded by less than a quarter."""
    most = min(most, MAX_BATCH)
    sizes = [1, 2, 4]
    size = 8
    while size < most:
        sizes.append(size)
        size += max(8, (1 << size.bit_length()) // 8)
    return [s for s in sizes if s < most] + [most]


class Recorder(Protocol):
    """Records what a function does on a device."""

    def __call__(self, function: Callable[[], Tensor], /) -> tuple[Callable[[], None], Tensor]:
        """Returns the replay, and the output, which each replay overwrites."""
        ...


class CudaRecorder:
    """`torch.cuda.CUDAGraph`, all from one memory pool."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor], /) -> tuple[Callable[[], None], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            output = function()
        return graph.replay, output


class DecodeGraphs:
    """`runtime.decode` for any batch up to the largest of `batch_sizes`.

    A batch runs on the smallest graph that holds it. The rows left over decode token 0 on the null slot, a slot of the
    pool that belongs to no request: several rows may write it at once, and what is in it means nothing.
    """

    def __init__(
        self,
        runtime: Runtime,
        pool: StatePool,
        batch_sizes: Sequence[int],
        recorder: Recorder,
    ) -> None:
        """Records one graph per batch size.

        Raises:
            ValueError: no batch size, or one below 1.
        """
        self.batch_sizes = sorted(set(batch_sizes))
        if not self.batch_sizes or self.batch_sizes[0] < 1:
            raise ValueError(f"batch_sizes={list(batch_sizes)} must name at least one size, all positive")
        device = runtime.model.device
        self._null_slot = pool.null_slot
        self._input_ids = torch.zeros(self.batch_sizes[-1], dtype=torch.int64, device=device)
        self._slots = torch.full_like(self._input_ids, pool.null_slot)
        self._graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}
        began = time.monotonic()
        # The largest first: the smaller ones fit into the memory that it leaves.
        with torch.inference_mode():
            for size in reversed(self.batch_sizes):
                ids, slots = self._input_ids[:size], self._slots[:size]

                def step(ids: Tensor = ids, slots: Tensor = slots) -> Tensor:
                    return runtime.decode(ids, pool, slots)

                self._graphs[size] = recorder(step)
        taken = time.monotonic() - began
        logger.info("recorded decode steps of %d batch sizes in %.1f s", len(self.batch_sizes), taken)

    def __call__(self, input_ids: Tensor, slots: Tensor) -> Tensor:
        """One token of each of B requests.

        Args:
            input_ids: int64 `[B]`, on the model's device.
            slots: int64 `[B]`, likewise; distinct, and not the null slot.

        Returns:
            Hidden states after the final norm, `[B, hidden]`, valid until the next call.

        Raises:
            ValueError: more requests than the largest batch size.
        """
        batch = input_ids.shape[0]
        if batch > self.batch_sizes[-1]:
            raise ValueError(f"a batch of {batch} exceeds the largest recorded size, {self.batch_sizes[-1]}")
        size = self.batch_sizes[bisect_left(self.batch_sizes, batch)]
        self._input_ids[:batch].copy_(input_ids, non_blocking=True)
        self._slots[:batch].copy_(slots, non_blocking=True)
        self._input_ids[batch:size].zero_()
        self._slots[batch:size].fill_(self._null_slot)
        replay, hidden = self._graphs[size]
        replay()
        return hidden[:batch]
