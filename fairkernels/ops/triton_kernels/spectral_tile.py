"""The leading singular value of a matrix that one program works on, and what larger ones share with it.

The matrix lies in the registers, a tile, or in the cache, whence it is read for every product.

Power iteration on A = MᵀM accelerated by its last two directions, or the plain one, as csrc/cpu/iteration.h has it.
Vectors and scalars are float64 whatever the matrix: they are few beside its M · N terms, and a basis of three that is
orthonormal only to float32 breaks down near convergence.
"""

import torch
import triton
import triton.language as tl


def default_steering(
    method: str, iters: int | None, tol: float | None, dtype: torch.dtype
) -> tuple[int, float, float, bool]:
    """``(iters, tol, noise, locg)`` with what is not given filled in; ``noise`` is a residual that rounding leaves."""
    double, locg = dtype == torch.float64, method == "locg"
    usual = (256 if double else 64) if locg else 1000
    return (
        usual if iters is None else iters,
        (1e-10 if double else 1e-5) if tol is None else tol,
        2e-15 if double else 1e-6,
        locg,
    )


# --- the direction to start from ----------------------------------------------------------------------------------


@triton.jit
def first_direction(at, n, nonnegative):
    """Ones overlap with the leading vector of a nonnegative matrix; a signed one may turn them into 0, so there every
    entry differs. Any block of places ``at``; 0 from n on."""
    turn = 0.618034 * at.to(tl.float64)
    signed = 1.0 + 0.5 * (turn - tl.floor(turn))
    return tl.where(at < n, tl.where(nonnegative, 1.0, signed), 0.0)


@triton.jit
def hint_weight(length):
    """1 / length of a hint that is of use, else 0."""
    useful = (length > 0) & (length < float("inf"))
    return tl.where(useful, 1.0 / tl.where(useful, length, 1.0), 0.0)


@triton.jit
def towards_hint(x, x_length, hint, weight):
    """A tenth of the usual direction is added to a hint: on disjoint blocks it may be orthogonal to what is sought."""
    hint = tl.where(weight > 0, hint.to(tl.float64), 0.0)  # it may be NaN
    return tl.where(weight > 0, weight * hint + (0.1 / x_length) * x, x)


@triton.jit
def with_hint(x, hint):
    """The same of whole vectors; a hint of zeros is none."""
    return towards_hint(x, norm(x), hint, hint_weight(norm(hint.to(tl.float64))))


@triton.jit
def start_tile(matrix, hint, n):
    """The first direction for ``leading_pair_tile``. ``hint``: [BLOCK_N], zeros where there is none; n real columns."""
    return with_hint(first_direction(tl.arange(0, matrix.shape[1]), n, tl.min(matrix) >= 0), hint)


# --- scaling ------------------------------------------------------------------------------------------------------


@triton.jit
def exponent_of(largest):
    """Of a finite number that is not 0: roughly its logarithm to the base of 2, at least -1023."""
    bits = largest.to(tl.float64).to(tl.int64, bitcast=True)
    return ((bits >> 52) & 0x7FF) - 1023


@triton.jit
def two_to_the(exponent):
    """Exact, -1022 <= exponent <= 1023."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def times_power_of_two(x, exponent):
    """In two steps: the power itself may be out of range."""
    half = exponent // 2
    return x * two_to_the(half).to(x.dtype) * two_to_the(exponent - half).to(x.dtype)


@triton.jit
def scaled_block(matrix, row, column, rows, columns, row_stride, column_stride, exponent, REAL: tl.constexpr):
    """Entries of a matrix in memory divided by 2^exponent; 0 outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
    return times_power_of_two(tl.load(matrix + at, mask=inside, other=0.0).to(REAL), -exponent)


BLOCK_IN_CACHE = tl.constexpr(8192)  # bytes, of those that are read at a time


@triton.jit
def rows_in_cache(matrix, first, x):
    """A block of rows of a matrix ``(place, rows, columns, row stride, column stride, exponent)``, as long as x."""
    place, rows, columns, row_stride, column_stride, exponent = matrix
    REAL: tl.constexpr = tl.float64 if place.dtype.element_ty == tl.float64 else tl.float32
    ROWS: tl.constexpr = BLOCK_IN_CACHE // (x.shape[0] * (REAL.primitive_bitwidth // 8))
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, x.shape[0])
    return scaled_block(place, row, column, rows, columns, row_stride, column_stride, exponent, REAL)


LOST = tl.constexpr(1e-12)  # of theta, where the largest entry lies in [1, 2): the first direction is mapped to 0

# --- the iteration ------------------------------------------------------------------------------------------------


@triton.jit
def norm(x):
    return tl.sqrt(tl.sum(x * x))


@triton.jit
def direction_of(x):
    """x at length 1, or 0."""
    length = norm(x)
    return x / tl.where(length > 0, length, 1.0)


@triton.jit
def image_of(matrix, x):
    """M x, in the dtype of the matrix."""
    return tl.sum(matrix * x.to(matrix.dtype)[None, :], 1)


@triton.jit
def normal_product(matrix, x):
    """MᵀM x of a tile, or of a matrix in the cache, see ``rows_in_cache``."""
    if isinstance(matrix, tl.tensor):
        product = matrix * image_of(matrix, x)[:, None]
    else:
        block = rows_in_cache(matrix, 0, x)
        product = block * image_of(block, x)[:, None]
        for first in range(block.shape[0], matrix[1], block.shape[0]):
            block = rows_in_cache(matrix, first, x)
            product += block * image_of(block, x)[:, None]
    return tl.sum(product, 0).to(tl.float64)


@triton.jit
def best_combination(a, b, c, d, e):
    """The eigenvector, of length 1, of the largest eigenvalue of [[0, a, b], [a, c, d], [b, d, e]], a >= 0.

    (1, 0, 0) where a = b = 0. float64.

    Newton's method on the characteristic polynomial falls monotonically from an upper bound, the eigenvalue of
    [[0, h], [h, m]] with h = |(a, b)| and m that of the lower block.
    """
    h2 = a * a + b * b
    m = (c + e) / 2 + tl.sqrt((c - e) * (c - e) / 4 + d * d)
    root = tl.sqrt(m * m / 4 + h2)
    x = tl.where(m > 0, m / 2 + root, h2 / tl.where(m > 0, 1.0, root - m / 2))
    turn = 0
    going = h2 > 0
    while going & (turn < 16):
        block = (x - c) * (x - e) - d * d
        value = x * block - a * a * (x - e) - b * b * (x - c) - 2 * a * b * d
        slope = block + x * (2 * x - c - e) - h2
        change = value / slope
        going = change > 1e-12 * x
        x = tl.where(going, x - change, x)
        turn += 1
    along_v = (x - c) * (x - e) - d * d
    along_r = a * (x - e) + b * d
    along_p = b * (x - c) + a * d
    length = tl.sqrt(along_v * along_v + along_r * along_r + along_p * along_p)
    moves = (h2 > 0) & (length > 0)
    length = tl.where(moves, length, 1.0)
    of_v = tl.where(moves, along_v / length, 1.0)
    return of_v, tl.where(moves, along_r / length, 0.0), tl.where(moves, along_p / length, 0.0)


@triton.jit
def without_two(p, ap, v, av, r, ar):
    """The direction p made orthogonal to v and r, of length 1, its product along with it; and what was left of it."""
    along_v = tl.sum(p * v)
    along_r = tl.sum(p * r)
    left = 1 - along_v * along_v - along_r * along_r
    scale = 1 / tl.sqrt(tl.maximum(left, 1e-6))
    return scale * (p - along_v * v - along_r * r), scale * (ap - along_v * av - along_r * ar), left


@triton.jit
def orthonormal_direction(matrix, p, ap, v, av, r, ar):
    """The last direction outside v and r, its product, and whether enough is left of it: the rest is mostly rounding.

    Twice where much is taken away, which leaves rounding errors along v and r; where even more is, the product is a
    difference of large numbers, whose error would grow from step to step, and is taken anew.
    """
    p, ap, left = without_two(p, ap, v, av, r, ar)
    least = left
    if (left > 1e-6) & (left <= 0.5):
        p, ap, again = without_two(p, ap, v, av, r, ar)
        least = tl.minimum(left, again)
    if (least > 1e-6) & (least < 1e-2):
        ap = normal_product(matrix, p)
    return p, ap, least > 1e-6


@triton.jit
def residual_of(v, av):
    """theta and the residual."""
    theta = tl.sum(v * av)
    return theta, av - theta * v


@triton.jit
def power_vector(matrix, v, av, iters, limit):
    theta, r = residual_of(v, av)
    far = norm(r) > limit * theta  # the compiler fails on a residual that is carried round for the condition alone
    step = 0
    while (step < iters) & far:
        v = av / norm(av)
        av = normal_product(matrix, v)
        theta, r = residual_of(v, av)
        far = norm(r) > limit * theta
        step += 1
    return v


@triton.jit
def locg_vector(matrix, v, av, iters, limit):
    theta, r = residual_of(v, av)
    p = tl.zeros_like(v)
    ap = tl.zeros_like(v)
    has_p = theta < 0  # never: A is positive semidefinite
    step = 0
    while (step < iters) & (norm(r) > limit * theta):
        r -= tl.sum(r * v) * v  # it is orthogonal but for rounding
        r = r / norm(r)
        ar = normal_product(matrix, r)
        if has_p:
            p, ap, has_p = orthonormal_direction(matrix, p, ap, v, av, r, ar)
        across_v = tl.where(has_p, tl.sum(v * ap), 0.0)
        across_r = tl.where(has_p, tl.sum(r * ap), 0.0)
        of_p = tl.where(has_p, tl.sum(p * ap), 0.0)
        of_v, of_r, by_p = best_combination(tl.sum(v * ar), across_v, tl.sum(r * ar) - theta, across_r, of_p - theta)

        # v turns towards the best combination; p becomes the direction, orthogonal to it, in which it has moved
        sine = tl.sqrt(of_r * of_r + by_p * by_p)
        has_p = sine > 0
        length = tl.where(has_p, sine, 1.0)
        towards = (of_r / length) * r + (by_p / length) * p
        a_towards = (of_r / length) * ar + (by_p / length) * ap
        p = of_v * towards - sine * v
        ap = of_v * a_towards - sine * av
        v = of_v * v + sine * towards
        av = of_v * av + sine * a_towards
        if step % 16 == 15:
            av = normal_product(matrix, v)
        theta, r = residual_of(v, av)
        step += 1
    return v


@triton.jit
def leading_pair_tile(matrix, start, iters, tol, noise, LOCG: tl.constexpr):
    """sigma, u [BLOCK_M] and v [BLOCK_N], all float64, of a tile in float32 or float64, 0 outside the real matrix.

    ``start`` [BLOCK_N], float64, is the first direction, see ``start_tile``. Zeros for a zero matrix, NaN if an entry
    is not finite; of the two signs the one with sum(v) >= 0.
    """
    size = tl.abs(matrix)
    in_each_row = tl.max(tl.where(size < float("inf"), size, float("inf")), 1)  # also for NaN
    largest = tl.max(in_each_row, 0)
    finite = largest < float("inf")
    exponent = exponent_of(tl.where(finite & (largest > 0), largest, 1.0))
    matrix = times_power_of_two(tl.where(finite, matrix, 0.0), -exponent)

    v = direction_of(start)
    av = normal_product(matrix, v)
    if finite & (largest > 0) & (tl.sum(v * av) < LOST):
        # the first direction happens to be one that the matrix maps to 0: the row with the largest entry is none
        chosen = tl.arange(0, matrix.shape[0]) == tl.argmax(in_each_row, 0)
        v = direction_of(tl.sum(tl.where(chosen[:, None], matrix, 0.0), 0).to(tl.float64))
        av = normal_product(matrix, v)

    limit = tl.maximum(tl.cast(tol, tl.float64), tl.cast(noise, tl.float64))
    v = locg_vector(matrix, v, av, iters, limit) if LOCG else power_vector(matrix, v, av, iters, limit)

    u = image_of(matrix, v).to(tl.float64)
    sigma = norm(u)
    v = tl.where(sigma > 0, v, 0.0)
    turned = tl.where(tl.sum(v) < 0, -1.0, 1.0)
    poison = tl.where(finite, 0.0, float("nan"))
    u = u * (turned / tl.where(sigma > 0, sigma, 1.0)) + poison
    v = v * turned + poison
    return times_power_of_two(sigma, exponent) + poison, u, v
