"""Triton kernels of norms."""

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, weight, residual, out, eps, size: tl.constexpr, block: tl.constexpr):
    """One row of `[rows, size]` per program; plus the residual, unless that is None."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, block)
    mask = index < size
    y = tl.load(x + row * size + index, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + index, mask=mask, other=0.0)  # before the sum, which waits for all threads
    if residual is not None:
        before = tl.load(residual + row * size + index, mask=mask, other=0.0)
    y *= tl.rsqrt(tl.sum(y * y, axis=0) / size + eps)
    y *= scale.to(tl.float32)
    if residual is not None:
        y += before.to(tl.float32)
    tl.store(out + row * size + index, y.to(out.dtype.element_ty), mask=mask)
