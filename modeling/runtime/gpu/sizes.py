"""Sizes of grids and blocks. Triton's own functions for them are for kernels too, and take the host microseconds."""


def ceil_div(size: int, block: int) -> int:
    """How many blocks it takes."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least power of two that is not less than a positive size."""
    return 1 << (size - 1).bit_length()
