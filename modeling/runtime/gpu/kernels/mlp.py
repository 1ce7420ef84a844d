"""Triton kernels of the dense feed-forward."""

import triton
import triton.language as tl


@triton.jit
def swiglu(x, out, size, block: tl.constexpr):
    """silu(gate) * up of one row's `block` columns; x is `[rows, 2 * size]`, rows `gate | up`."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * block + tl.arange(0, block)
    mask = index < size
    gate = tl.load(x + row * 2 * size + index, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + index, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + index, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)
