"""The norm of hidden states, run by Triton's interpreter, against its definition in float64."""

import pytest
import torch

from modeling.layers import RMSNorm
from modeling.runtime.gpu.norms import add_normed, normed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 130), (17, 7)])
def test_a_norm_and_the_sum_with_it(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, *shape, generator=generator).to(dtype)
    norm = RMSNorm(shape[1], 1e-5).requires_grad_(False)
    norm.weight.normal_(1, 0.3, generator=generator)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(normed(norm, x).double(), expected, **tolerance)
    expected = residual.double() + expected
    out = add_normed(norm, x, residual)
    assert out is residual and out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, **tolerance)
