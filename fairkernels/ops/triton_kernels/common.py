"""What kernels share: where a problem begins, types of sums, signs and limits that let NaN through."""

import triton
import triton.language as tl

from . import launch

DISGUISE = tl.constexpr(launch.DISGUISE)


@triton.jit
def offset_of(problem, sizes, strides):
    """Where problem number ``problem`` begins, in elements; sizes and strides of its leading dimensions."""
    offset = tl.cast(0, tl.int64)
    rest = tl.cast(problem, tl.int64)
    for d in tl.static_range(1, len(sizes) + 1):  # an index that is computed here would be no constant to the compiler
        size = undisguised(sizes[len(sizes) - d])
        offset += (rest % size) * undisguised(strides[len(sizes) - d])
        rest = rest // size
    return offset


@triton.jit
def undisguised(number):
    """A size or a stride out of a tuple, see ``launch.disguised``."""
    number = tl.cast(number, tl.int64)
    return tl.where(number < DISGUISE, number, (number - DISGUISE) >> 1)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def number(value, REAL: tl.constexpr):
    """A Python float in this dtype. The kernel's parameter must be annotated ``tl.float64``, others arrive in fp32."""
    return tl.full((), value, REAL)


@triton.jit
def divided(numerator, denominator):
    """The quotient, 0 where the denominator is 0; NaN is let through."""
    empty = denominator == 0
    return tl.where(empty, 0.0, numerator / tl.where(empty, 1.0, denominator))
