"""One unordered pair of classes, the mathematics of the symmetry gap (Sy-FAR, arXiv 2509.12939, Eq. 4)."""

import triton
import triton.language as tl

from .common import sign


@triton.jit
def pair_penalty(forward, backward, eps, DAMPED: tl.constexpr):
    """Penalty of the rates of a pair and its derivative by ``forward``; that by ``backward`` is it with them exchanged.

    Not ``DAMPED`` is the limit eps = 0, whose derivatives would divide by tiny masses. A NaN rate gives NaN.
    """
    gap = forward - backward
    mass = forward + backward
    size = tl.abs(gap)
    if DAMPED:
        nothing = mass == 0  # not NaN, which is let through
        damping = tl.where(nothing, 0.0, mass / tl.where(nothing, 1.0, mass + eps))
        down = tl.where(nothing, 0.0, size / tl.where(nothing, 1.0, mass + eps)) * (eps / (mass + eps))
        return size * damping, sign(gap) * damping + down
    return size, sign(gap) + 0 * gap
