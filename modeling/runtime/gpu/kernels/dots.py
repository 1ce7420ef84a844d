"""Products of tiles."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, sums):
    """`sums + a @ b`, sums in float32: on tensor cores, or for float32 exact.

    Triton's interpreter keeps bfloat16 in whole numbers, and would multiply those.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")
