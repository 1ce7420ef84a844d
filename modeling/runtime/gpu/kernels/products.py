"""The product of one row with a weight as a Triton kernel; `modeling.runtime.gpu.products` launches it."""

import triton
import triton.language as tl


@triton.jit
def one_row(
    x,  # [width]
    weight,  # [size, width], or `gate | up` of so many rows each
    norm_weight,  # [width], or None
    out,  # [size]
    size,
    width,
    eps,
    gated: tl.constexpr,
    adds: tl.constexpr,
    is_even: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    stages: tl.constexpr,
):
    """`block_n` columns of `norm(x) @ weight.T`, or of SwiGLU of it, to a program; plus what is in `out` if it `adds`.

    Without tensor cores: each thread multiplies what it has loaded, and the threads' sums are added up in the end. The
    norm's weight goes into x, its root mean square into the sums.
    """
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    k = tl.arange(0, block_k)
    w_at = weight + tl.minimum(n, size - 1).to(tl.int64)[:, None] * width + k[None, :]
    up_at = w_at + tl.cast(size, tl.int64) * width
    squares = tl.zeros([block_k], tl.float32)
    products = tl.zeros([block_n, block_k], tl.float32)
    up_products = tl.zeros([block_n, block_k], tl.float32)
    for first in tl.range(0, width, block_k, num_stages=stages):
        inside = (first + k < width) | is_even
        w = tl.load(w_at + first, mask=inside[None, :], other=0.0)
        a = tl.load(x + first + k, mask=inside, other=0.0).to(tl.float32)
        if norm_weight is not None:
            squares += a * a
            a *= tl.load(norm_weight + first + k, mask=inside, other=0.0).to(tl.float32)
        products += a[None, :] * w.to(tl.float32)
        if gated:
            w = tl.load(up_at + first, mask=inside[None, :], other=0.0)
            up_products += a[None, :] * w.to(tl.float32)
    y = tl.sum(products, axis=1)
    up = tl.sum(up_products, axis=1)
    if norm_weight is not None:
        norm = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
        y *= norm
        up *= norm
    if gated:
        y *= tl.sigmoid(y) * up
    mask = n < size
    if adds:
        y += tl.load(out + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=mask)
