"""Philox4x32-10 (Salmon et al., SC 2011): the numbers that the reference and the native kernels draw."""

import triton
import triton.language as tl


@triton.jit
def words(counter, stream, seed):
    """Four 32-bit words each; number 4 c + w of a stream comes from word w of counter c."""
    low = counter.to(tl.uint32)
    high = (counter.to(tl.int64) >> 32).to(tl.uint32)
    nothing = tl.zeros_like(low)
    return tl.philox(tl.cast(seed, tl.int64), low, high, nothing + stream, nothing)


@triton.jit
def uniform(word, REAL: tl.constexpr):
    """[0, 1) in steps of 2^-24, exact in every type from fp32 up."""
    return (word >> 8).to(REAL) * 5.9604644775390625e-08


@triton.jit
def in_order(first, second, third, fourth):
    """Words, or what became of them, one counter's after the other's: four times as many in the last dimension."""
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
