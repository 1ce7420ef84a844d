"""The compiled products against float64, at every kind of tile that a batch, a depth and a number of rows call for.
Which kernels that runs depends on the machine: vectors of one width or another, or its matrix unit."""

import pytest
import torch
from checkpoints import DELTA

from modeling.families import family_of
from modeling.model import Model
from modeling.runtime.cpu import CpuRuntime

BATCHES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 100)
DEPTHS = (32, 64, 80, 96, 100, 1024)
ROWS = (8, 15, 16, 17, 31, 32, 33, 40, 47, 100, 264)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def runtime(request):
    return CpuRuntime(Model(family_of(DELTA).spec(DELTA)).to(request.param).requires_grad_(False))


@pytest.mark.parametrize("threads", [1, 3])
def test_products_are_those_of_float64(runtime, threads):
    dtype = runtime.model.embeddings.weight.dtype
    generator = torch.Generator().manual_seed(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in BATCHES:
            for depth in DEPTHS:
                x = torch.randn(batch, depth, generator=generator).to(dtype)
                w = torch.randn(max(ROWS), depth, generator=generator).to(dtype)
                exact = x.double() @ w.double().T
                for rows in ROWS:
                    y = runtime.linear(x, w[:rows])
                    error = (y - exact[:, :rows]).abs().max() / exact.abs().max()
                    assert y.isfinite().all() and error < 4e-6, (batch, depth, rows, float(error))
    finally:
        torch.set_num_threads(before)


def test_a_weight_of_too_few_rows_is_refused(runtime):
    dtype = runtime.model.embeddings.weight.dtype
    with pytest.raises(ValueError, match="a weight of 1 rows; products take 8 or more"):
        runtime.linear(torch.ones(2, 16, dtype=dtype), torch.ones(1, 16, dtype=dtype))
