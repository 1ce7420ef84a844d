"""The Triton product of one row, run by Triton's interpreter, against float64; and what goes to it."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from modeling.layers import RMSNorm
from modeling.runtime.gpu import products as module
from modeling.runtime.gpu.products import Tile, gated_product, launch, product, tile_of

TILES = [Tile(8, 256, 3), Tile(16, 64, 3), Tile(8, 512, 4)]
SHAPES = [(40, 72), (200, 513), (33, 1000)]
"""Columns of a result, and of x."""
AROUND = [(True, False, False), (False, True, False), (True, False, True), (False, True, True)]
"""Whether there is a norm before, a residual to add to, and SwiGLU behind."""
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
"""Sums are in float32, and rounded once; the interpreter cuts bfloat16 off where a GPU rounds it."""


@pytest.fixture
def by_triton(monkeypatch):
    """Tiny weights go to the Triton kernels as well."""
    monkeypatch.setattr(module, "LEAST_WEIGHT", 0)


def draw(rows: int, size: int, width: int, dtype: torch.dtype, *, gated: bool = False):
    torch.manual_seed(0)
    x = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(size * (1 + gated), width) * width**-0.5).to(dtype)
    norm = RMSNorm(width, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(width) + 0.5)
    return x, weight, norm.requires_grad_(False)


def reference(x, weight, norm=None, residual=None, *, gated=False):
    x = x.double()
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    y = x @ weight.double().T
    if gated:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else residual.double() + y


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_product_and_all_that_goes_around_it(tile, dtype):
    for (size, width), (has_norm, adds, gated) in itertools.product(SHAPES, AROUND):
        x, weight, norm = draw(1, size, width, dtype, gated=gated)
        before = norm if has_norm else None
        out = torch.randn(1, size).to(dtype)
        expected = reference(x, weight, before, out if adds else None, gated=gated)
        assert launch(tile, x, weight, before, out, gated=gated, adds=adds) is out
        assert error(out, expected) < TOLERANCE[dtype], (size, width, has_norm, adds, gated)


@pytest.mark.parametrize("least", [0, 1 << 20], ids=["triton", "libraries"])
@pytest.mark.parametrize("rows", [1, 33])
def test_both_ways_are_the_same_product(monkeypatch, rows, least):
    monkeypatch.setattr(module, "LEAST_WEIGHT", least)
    x, weight, norm = draw(rows, 40, 72, torch.bfloat16, gated=True)
    assert (tile_of(x, weight, gated=True) is not None) == (rows == 1 and not least)
    for before in (norm, None):
        y = gated_product(x, weight, before)
        assert y.shape == (rows, 40) and y.dtype == x.dtype
        assert error(y, reference(x, weight, before, gated=True)) < TOLERANCE[torch.bfloat16]
        y = product(x, weight, before)
        assert y.shape == (rows, 80) and error(y, reference(x, weight, before)) < TOLERANCE[torch.bfloat16]
        residual = torch.randn(rows, 80).to(x.dtype)
        expected = reference(x, weight, before, residual)
        assert product(x, weight, before, residual) is residual
        assert error(residual, expected) < TOLERANCE[torch.bfloat16]


def test_several_rows_and_other_dtypes_are_left_to_the_libraries():
    x = torch.empty(2, 2560, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(4096, 2560, dtype=torch.bfloat16, device="meta")
    assert tile_of(x[:1], weight, gated=False) is not None
    assert tile_of(x, weight, gated=False) is None
    assert tile_of(x[:1].float(), weight.float(), gated=False) is None
    assert tile_of(x[:0], weight, gated=False) is None


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy, which the interpreter computes with, warns of NaN
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(by_triton, value):
    """The engine tells the client by it that a request is broken."""
    x, weight, norm = draw(1, 40, 72, torch.bfloat16, gated=True)
    x[0, 5] = value
    assert gated_product(x, weight, norm).isnan().all()
    assert not product(x, weight).isfinite().any()
