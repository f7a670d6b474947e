"""spectral_norm: the leading singular value of matrices of any size, and its gradient.

A matrix that fits into registers or the cache is one program's. Of a larger one only the Gram matrix of its shorter
side takes part in the iteration: one launch a step, in which every program multiplies some of its rows with the new
directions. The small vector work in between is done by every program again, which is cheaper than a launch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schema import accumulation_dtype
from .common import offset_of
from .launch import AS_WRITTEN, cdiv, launch, power_of_2, problems, real_type
from .spectral_tile import (
    LOST,
    best_combination,
    default_steering,
    direction_of,
    exponent_of,
    first_direction,
    hint_weight,
    image_of,
    leading_pair_tile,
    locg_vector,
    normal_product,
    power_vector,
    rows_in_cache,
    scaled_block,
    times_power_of_two,
    towards_hint,
    with_hint,
)
from .symmetry_gap import tile_of

# --- a matrix in registers ----------------------------------------------------------------------------------------
# It lies upright: its columns are the shorter side, along which the vectors of the iteration lie.


@triton.jit(do_not_specialize=["rows", "columns", "iters", "row_stride"])
def spectral_norm_on_chip(
    matrix, hint, sigma, u, v,
    rows, columns, row_stride, column_stride, hint_stride,
    sizes, strides, hint_sizes, hint_strides,
    iters, tol: tl.float64, noise: tl.float64,
    LOCG: tl.constexpr, TURNED: tl.constexpr, REAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Bound by latency: the matrix is read once, a step is two products with it, out of registers, and ten sums.
    # Nothing is to know that rows of a turned one are neighbours in memory: threads would be laid out along them, and
    # the vectors of the short side lie in each of them; it takes more than twice the registers.
    problem = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_M).to(tl.int64)
    column = tl.arange(0, BLOCK_N).to(tl.int64)
    at = offset_of(problem, sizes, strides) + row[:, None] * row_stride + column[None, :] * column_stride
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(matrix + at, mask=inside, other=0.0).to(REAL)

    nonnegative = tl.min(tile) >= 0
    x = first_direction(tl.arange(0, BLOCK_N), columns, nonnegative)
    if hint is not None:
        hint += offset_of(problem, hint_sizes, hint_strides)
        if TURNED:  # the hint is one for the other side
            x = first_direction(tl.arange(0, BLOCK_M), rows, nonnegative)
            x = with_hint(x, tl.load(hint + row * hint_stride, mask=row < rows, other=0.0))
            largest = tl.max(tl.abs(tile))
            x = tl.sum(tile / tl.where(largest > 0, largest, 1.0) * x.to(REAL)[:, None], 0).to(tl.float64)
        else:
            x = with_hint(x, tl.load(hint + column * hint_stride, mask=column < columns, other=0.0))

    length, left, right = leading_pair_tile(tile, x, iters, tol, noise, LOCG)
    if TURNED:
        turn = tl.where(tl.sum(left) < 0, -1.0, 1.0)
        left, right = left * turn, right * turn
    tl.store(sigma + problem, length.to(REAL))
    tl.store(u + problem * rows + row, left, mask=row < rows)
    tl.store(v + problem * columns + column, right, mask=column < columns)


# --- a matrix in the cache ----------------------------------------------------------------------------------------
# It lies upright as well. A product with it and its transpose is one pass over blocks of its rows.


@triton.jit
def extent_in_cache(matrix, x):
    """The largest entry by absolute value, infinite if one is not finite, the first row it is in, the least entry."""
    block = rows_in_cache(matrix, 0, x)
    ROWS: tl.constexpr = block.shape[0]
    largest = tl.full((ROWS,), -1.0, block.dtype)
    least = tl.full((ROWS,), float("inf"), block.dtype)
    place = tl.zeros((ROWS,), tl.int32)
    for first in range(0, matrix[1], ROWS):
        block = rows_in_cache(matrix, first, x)
        size = tl.abs(block)
        size = tl.max(tl.where(size < float("inf"), size, float("inf")), 1)  # also for NaN
        place = tl.where(size > largest, first + tl.arange(0, ROWS), place)
        largest = tl.maximum(largest, size)
        least = tl.minimum(least, tl.min(block, 1))
    most = tl.max(largest)
    return most, tl.min(tl.where(largest == most, place, matrix[1])), tl.min(least)


@triton.jit(do_not_specialize=["rows", "columns", "iters"])
def spectral_norm_in_cache(
    matrix, hint, sigma, u, v,
    rows, columns, row_stride, column_stride, hint_stride,
    sizes, strides, hint_sizes, hint_strides,
    iters, tol: tl.float64, noise: tl.float64,
    LOCG: tl.constexpr, TURNED: tl.constexpr, REAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Bound by the cache: a step reads the matrix once, and so do the extent, the start and, twice, the end.
    problem = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    matrix += offset_of(problem, sizes, strides)
    unscaled = (matrix, rows, columns, row_stride, column_stride, tl.full((), 0, tl.int64))
    x = tl.zeros((BLOCK_N,), tl.float64)
    largest, place, least = extent_in_cache(unscaled, x)
    finite = largest < float("inf")
    usable = finite & (largest > 0)
    exponent = exponent_of(tl.where(usable, largest, 1.0))
    scaled = (matrix, tl.where(finite, rows, 0), columns, row_stride, column_stride, exponent)
    ROWS: tl.constexpr = rows_in_cache(scaled, 0, x).shape[0]

    if hint is not None:
        hint += offset_of(problem, hint_sizes, hint_strides)
    if hint is not None and TURNED:  # the hint is one for the other side
        length, weight = start_lengths(hint, rows, hint_stride, least >= 0, ROWS)
        for first in range(0, rows, ROWS):
            h = start_block(hint, first + tl.arange(0, ROWS), rows, hint_stride, length, weight, least >= 0)
            x += tl.sum(rows_in_cache(scaled, first, x).to(tl.float64) * h[:, None], 0)
    else:
        length, weight = start_lengths(hint, columns, hint_stride, least >= 0, BLOCK_N)
        x = start_block(hint, column, columns, hint_stride, length, weight, least >= 0)

    x = direction_of(x)
    ax = normal_product(scaled, x)
    if usable & (tl.sum(x * ax) < LOST):
        # the first direction happens to be one that the matrix maps to 0: the row with the largest entry is none
        at = matrix + place.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
        x = direction_of(times_power_of_two(tl.load(at, mask=column < columns, other=0.0).to(tl.float64), -exponent))
        ax = normal_product(scaled, x)
    limit = tl.maximum(tol, noise)
    x = locg_vector(scaled, x, ax, iters, limit) if LOCG else power_vector(scaled, x, ax, iters, limit)

    squares = tl.zeros((ROWS,), tl.float64)
    sign_sum = tl.zeros((ROWS,), tl.float64)
    for first in range(0, rows, ROWS):
        image = image_of(rows_in_cache(scaled, first, x), x).to(tl.float64)
        squares += image * image
        sign_sum += image
    length = tl.sqrt(tl.sum(squares))
    x = tl.where(length > 0, x, 0.0)
    turn = tl.where((tl.sum(sign_sum) if TURNED else tl.sum(x)) < 0, -1.0, 1.0)
    poison = tl.where(finite, 0.0, float("nan"))
    per_length = turn / tl.where(length > 0, length, 1.0)
    for first in range(0, rows, ROWS):
        image = image_of(rows_in_cache(scaled, first, x), x).to(tl.float64)
        row = first + tl.arange(0, ROWS)
        tl.store(u + problem * rows + row, image * per_length + poison, mask=row < rows)
    tl.store(v + problem * columns + column, x * turn + poison, mask=column < columns)
    tl.store(sigma + problem, (times_power_of_two(length, exponent) + poison).to(REAL))


# --- the Gram matrix of a larger one ------------------------------------------------------------------------------
# `short` and `long` are its sides; `largest` its largest entry by absolute value, with which it is scaled.


@triton.jit
def problem_and_part(parts):
    """The problem of this program, int64, and which of the programs that share it this is."""
    return (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts


@triton.jit
def scale_of(largest, problem):
    """The exponent to divide by, and whether the matrix is finite and not 0."""
    size = tl.abs(tl.load(largest + problem).to(tl.float64))
    usable = (size > 0) & (size < float("inf"))
    return exponent_of(tl.where(usable, size, 1.0)), usable


@triton.jit(do_not_specialize=["short", "tiles", "parts", "splits", "long_each"])
def gram_matrix(
    matrix, largest, gram,
    short, long, width, tiles, parts, splits, long_each, short_stride, long_stride, sizes, strides,
    REAL: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # Bound by arithmetic: `long` multiply-adds an entry, of which half are computed. A program has a tile of the upper
    # triangle over a part of the long side; after each stretch its sums are added in float64. Column `short` of the
    # result holds the sums of the rows.
    problem, part = problem_and_part(parts)
    first, second = tile_of(part, tiles)
    split = tl.program_id(1).to(tl.int64)
    if first >= 0:
        exponent, _usable = scale_of(largest, problem)
        matrix += offset_of(problem, sizes, strides)
        i = first * BLOCK + tl.arange(0, BLOCK)
        j = second * BLOCK + tl.arange(0, BLOCK)
        end = tl.minimum(long, (split + 1) * long_each)
        total = tl.zeros((BLOCK, BLOCK), tl.float64)
        row_total = tl.zeros((BLOCK,), tl.float64)
        for begin in range(split * long_each, end, CHUNK * CHUNKS):
            stretch = tl.zeros((BLOCK, BLOCK), REAL)
            row_stretch = tl.zeros((BLOCK,), REAL)
            for chunk in range(tl.minimum(CHUNKS, tl.cdiv(end - begin, CHUNK))):
                k = begin + chunk * CHUNK + tl.arange(0, CHUNK)
                a = scaled_block(matrix, i, k, short, end, short_stride, long_stride, exponent, REAL)
                b = scaled_block(matrix, j, k, short, end, short_stride, long_stride, exponent, REAL)
                stretch = tl.dot(a, tl.trans(b), stretch, input_precision="ieee", out_dtype=REAL)
                row_stretch += tl.sum(a, 1)
            total += stretch.to(tl.float64)
            row_total += row_stretch.to(tl.float64)
        out = gram + (problem * splits + split) * short * width
        inside = (i < short)[:, None] & (j < short)[None, :]
        i = i.to(tl.int64)
        tl.store(out + i[:, None] * width + j[None, :], total, mask=inside)
        if first < second:
            tl.store(out + j[None, :].to(tl.int64) * width + i[:, None], total, mask=inside)
        else:
            tl.store(out + i * width + short, row_total, mask=i < short)


# --- steps on the Gram matrix -------------------------------------------------------------------------------------
# Each problem has two sets of state, which take turns: what one launch writes the next one reads. A set has the vectors
# v, r, p and their products with the Gram matrix; `sums` of all programs; a flag that ends the iteration. `answer` is
# the vector at which it has ended, theta behind it.

SUMS = tl.constexpr(8)  # v·Av, v·Ar, r·Ar, v·Ap, r·Ap, p·Ap, v·v, p·p
DIAGONAL = tl.constexpr(1024)  # a block of it


@triton.jit
def sum_of(sums, number, programs, PROGRAMS: tl.constexpr):
    part = tl.arange(0, PROGRAMS)
    return tl.sum(tl.load(sums + number * programs + part, mask=part < programs, other=0.0))


@triton.jit
def rotation(sums, programs, PROGRAMS: tl.constexpr):
    """The best combination of v, r and p: theta, then the factors of the three in the new v and in the new p."""
    v_length = tl.sqrt(sum_of(sums, 6, programs, PROGRAMS))
    p_length = tl.sqrt(sum_of(sums, 7, programs, PROGRAMS))
    per_v = 1 / tl.where(v_length > 0, v_length, 1.0)
    per_p = 1 / tl.where(p_length > 0, p_length, 1.0)
    theta = sum_of(sums, 0, programs, PROGRAMS) * per_v * per_v
    a = sum_of(sums, 1, programs, PROGRAMS) * per_v
    c = sum_of(sums, 2, programs, PROGRAMS) - theta
    b = sum_of(sums, 3, programs, PROGRAMS) * per_v * per_p
    d = sum_of(sums, 4, programs, PROGRAMS) * per_p
    e = sum_of(sums, 5, programs, PROGRAMS) * per_p * per_p - theta

    of_v, of_r, of_p = best_combination(a, b, c, d, e)
    theta += 2 * (of_v * of_r * a + of_v * of_p * b + of_r * of_p * d) + of_r * of_r * c + of_p * of_p * e
    sine = tl.sqrt(of_r * of_r + of_p * of_p)
    turn = of_v / tl.where(sine > 0, sine, 1.0)
    return theta, of_v * per_v, of_r, of_p * per_p, -sine * per_v, turn * of_r, turn * of_p * per_p


@triton.jit
def combined(state, number, at, n, of_v, of_r, of_p):
    """A block of the combination of three vectors, those from ``number`` on."""
    first = state + number * n + at
    v = tl.load(first, mask=at < n, other=0.0)
    r = tl.load(first + n, mask=at < n, other=0.0)
    p = tl.load(first + 2 * n, mask=at < n, other=0.0)
    return of_v * v + of_r * r + of_p * p


@triton.jit
def largest_diagonal(gram, n, width):
    """Where the diagonal is largest: a direction that is not mapped to 0."""
    best = tl.full((DIAGONAL,), -1.0, tl.float64)
    place = tl.zeros((DIAGONAL,), tl.int64)
    for first in range(0, n, DIAGONAL):
        at = first + tl.arange(0, DIAGONAL).to(tl.int64)
        entry = tl.load(gram + at * (width + 1), mask=at < n, other=-1.0).to(tl.float64)
        place = tl.where(entry > best, at, place)
        best = tl.maximum(best, entry)
    return tl.min(tl.where(best == tl.max(best), place, n))


@triton.jit
def gram_rows(gram, row, at, n, width):
    inside = (row < n)[:, None] & (at < n)[None, :]
    return tl.load(gram + row[:, None].to(tl.int64) * width + at[None, :], mask=inside, other=0.0)


@triton.jit
def has_entries(gram, at, n, width):
    """Whether a row of the matrix is not all 0: where it is, the vector is 0 from the beginning."""
    return tl.load(gram + at.to(tl.int64) * (width + 1), mask=at < n, other=0.0) != 0


@triton.jit
def keep(sums, number, part, programs, value):
    tl.store(sums + number * programs + part, value)


@triton.jit
def start_block(start, at, n, stride, x_length, weight, nonnegative):
    """A block of the first direction, not of length 1 yet."""
    x = first_direction(at, n, nonnegative)
    if start is not None:
        hint = tl.load(start + at.to(tl.int64) * stride, mask=at < n, other=0.0)
        x = towards_hint(x, x_length, hint, weight)
    return x


@triton.jit
def start_lengths(start, n, stride, nonnegative, BLOCK: tl.constexpr):
    """What ``start_block`` needs to know of the whole vector."""
    of_x = tl.zeros((BLOCK,), tl.float64)
    of_hint = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = first_direction(at, n, nonnegative)
        of_x += x * x
        if start is not None:
            hint = tl.load(start + at.to(tl.int64) * stride, mask=at < n, other=0.0).to(tl.float64)
            of_hint += hint * hint
    return tl.sqrt(tl.sum(of_x)), hint_weight(tl.sqrt(tl.sum(of_hint)))


@triton.jit(do_not_specialize=["short", "programs"])
def start_image(
    matrix, largest, start, image,
    short, long, programs, short_stride, long_stride, start_stride, sizes, strides, start_sizes, start_strides,
    REAL: tl.constexpr, NONNEGATIVE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Memory bound: one read of the matrix. A start is a vector of its long side, the iteration is one of the short.
    problem, part = problem_and_part(programs)
    row = part * ROWS + tl.arange(0, ROWS)
    exponent, _usable = scale_of(largest, problem)
    matrix += offset_of(problem, sizes, strides)
    start += offset_of(problem, start_sizes, start_strides)
    x_length, weight = start_lengths(start, long, start_stride, NONNEGATIVE, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in range(0, long, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = start_block(start, at, long, start_stride, x_length, weight, NONNEGATIVE)
        block = scaled_block(matrix, row, at, short, long, short_stride, long_stride, exponent, REAL)
        total += block.to(tl.float64) * x[None, :]
    tl.store(image + problem * short + row, tl.sum(total, 1), mask=row < short)


@triton.jit(do_not_specialize=["n", "programs"])
def begin_steps(
    gram, largest, start, state, sums, done, n, width, programs, start_stride, start_sizes, start_strides,
    LOCG: tl.constexpr, IMAGE: tl.constexpr, NONNEGATIVE: tl.constexpr,
    REAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Memory bound: one read of the Gram matrix. Writes the first set of state: v and Av, no other direction.
    problem, part = problem_and_part(programs)
    row = part * ROWS + tl.arange(0, ROWS)
    gram += problem * n * width
    state += problem * 12 * n
    sums += problem * 2 * SUMS * programs
    if start is not None:
        start += offset_of(problem, start_sizes, start_strides)
    _exponent, usable = scale_of(largest, problem)
    tl.store(done + 2 * problem, (~usable).to(tl.int32))

    # an image of a start is taken as it is
    x_length, weight = start_lengths(start, n, start_stride, NONNEGATIVE, BLOCK)
    of_v = tl.zeros((BLOCK,), tl.float64)
    product = tl.zeros((ROWS, BLOCK), REAL)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        if IMAGE:
            x = tl.load(start + at, mask=at < n, other=0.0)
        else:
            x = start_block(start, at, n, start_stride, x_length, weight, NONNEGATIVE)
        x = tl.where(has_entries(gram, at, n, width), x, 0.0)
        of_v += x * x
        product += gram_rows(gram, row, at, n, width) * x.to(REAL)[None, :]
    length = tl.sqrt(tl.sum(of_v))
    per_length = 1 / tl.where(length > 0, length, 1.0)

    if IMAGE:
        v = tl.load(start + row, mask=row < n, other=0.0)
    else:
        v = start_block(start, row, n, start_stride, x_length, weight, NONNEGATIVE)
    v = tl.where(has_entries(gram, row, n, width), v, 0.0) * per_length
    av = tl.sum(product, 1).to(tl.float64) * per_length
    tl.store(state + row, v, mask=row < n)
    tl.store(state + 3 * n + row, av, mask=row < n)
    keep(sums, 0, part, programs, tl.sum(v * av))
    if LOCG:
        for direction in tl.static_range(1, 3):
            tl.store(state + direction * n + row, 0.0, mask=row < n)
            tl.store(state + (direction + 3) * n + row, 0.0, mask=row < n)
        for number in tl.static_range(1, 6):
            keep(sums, number, part, programs, 0.0)
        keep(sums, 6, part, programs, tl.sum(v * v))
        keep(sums, 7, part, programs, 0.0)
    else:
        keep(sums, 1, part, programs, tl.sum(av * av))


@triton.jit(do_not_specialize=["turn", "n", "programs"])
def locg_step(
    gram, state, sums, done, answer, turn, n, width, programs, limit: tl.float64,
    REAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    # Memory bound: one read of the Gram matrix and, by every program, two of the six vectors of length n. Takes the
    # best combination of v, r and p, and multiplies it and the two directions that follow.
    problem, part = problem_and_part(programs)
    old, new = turn % 2, (turn + 1) % 2
    ended = tl.load(done + 2 * problem + old)
    row = part * ROWS + tl.arange(0, ROWS)
    gram += problem * n * width
    before = state + (2 * problem + old) * 6 * n
    after = state + (2 * problem + new) * 6 * n
    answer += problem * (n + 1)
    if ended == 0:
        sums_before = sums + (2 * problem + old) * SUMS * programs
        theta, v_v, v_r, v_p, p_v, p_r, p_p = rotation(sums_before, programs, PROGRAMS)

        # the residual of the new v, and how it and the new p lie to each other
        squares = tl.zeros((BLOCK,), tl.float64)
        r_v = tl.zeros((BLOCK,), tl.float64)
        p_to_v = tl.zeros((BLOCK,), tl.float64)
        p_to_r = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, n, BLOCK):
            at = first + tl.arange(0, BLOCK)
            v = combined(before, 0, at, n, v_v, v_r, v_p)
            p = combined(before, 0, at, n, p_v, p_r, p_p)
            r = combined(before, 3, at, n, v_v, v_r, v_p) - theta * v
            squares += r * r
            r_v += r * v
            p_to_v += p * v
            p_to_r += p * r
        r_along_v = tl.sum(r_v)
        residual = tl.sqrt(tl.maximum(tl.sum(squares) - r_along_v * r_along_v, 0.0))
        theta += r_along_v

        lost = theta < LOST
        if (residual > limit * theta) | lost:
            pick = tl.cast(-1, tl.int64)
            if lost:
                pick = largest_diagonal(gram, n, width)
            per_r = tl.where(lost, 0.0, 1 / tl.where(residual > 0, residual, 1.0))
            p_along_v = tl.sum(p_to_v)
            p_along_r = (tl.sum(p_to_r) - r_along_v * p_along_v) * per_r
            left = 1 - p_along_v * p_along_v - p_along_r * p_along_r
            has_p = (p_v != 0) & (left > 1e-6) & (~lost)  # the rest would be mostly rounding
            per_p = tl.where(has_p, 1 / tl.sqrt(tl.where(has_p, left, 1.0)), 0.0)
            theta -= r_along_v  # that of the residuals

            product_v = tl.zeros((ROWS, BLOCK), REAL)
            product_r = tl.zeros((ROWS, BLOCK), REAL)
            product_p = tl.zeros((ROWS, BLOCK), REAL)
            for first in range(0, n, BLOCK):
                at = first + tl.arange(0, BLOCK)
                block = gram_rows(gram, row, at, n, width)
                v = combined(before, 0, at, n, v_v, v_r, v_p)
                r = combined(before, 3, at, n, v_v, v_r, v_p) - theta * v
                r = (r - r_along_v * v) * per_r
                p = (combined(before, 0, at, n, p_v, p_r, p_p) - p_along_v * v - p_along_r * r) * per_p
                v = tl.where(at == pick, 1.0, v)
                product_v += block * v.to(REAL)[None, :]
                product_r += block * r.to(REAL)[None, :]
                product_p += block * p.to(REAL)[None, :]
            av = tl.sum(product_v, 1).to(tl.float64)
            ar = tl.sum(product_r, 1).to(tl.float64)
            ap = tl.sum(product_p, 1).to(tl.float64)

            v = combined(before, 0, row, n, v_v, v_r, v_p)
            r = combined(before, 3, row, n, v_v, v_r, v_p) - theta * v
            r = (r - r_along_v * v) * per_r
            p = (combined(before, 0, row, n, p_v, p_r, p_p) - p_along_v * v - p_along_r * r) * per_p
            v = tl.where(row == pick, 1.0, v)
            inside = row < n
            tl.store(after + row, v, mask=inside)
            tl.store(after + n + row, r, mask=inside)
            tl.store(after + 2 * n + row, p, mask=inside)
            tl.store(after + 3 * n + row, av, mask=inside)
            tl.store(after + 4 * n + row, ar, mask=inside)
            tl.store(after + 5 * n + row, ap, mask=inside)
            sums_after = sums + (2 * problem + new) * SUMS * programs
            keep(sums_after, 0, part, programs, tl.sum(v * av))
            keep(sums_after, 1, part, programs, tl.sum(v * ar))
            keep(sums_after, 2, part, programs, tl.sum(r * ar))
            keep(sums_after, 3, part, programs, tl.sum(v * ap))
            keep(sums_after, 4, part, programs, tl.sum(r * ap))
            keep(sums_after, 5, part, programs, tl.sum(p * ap))
            keep(sums_after, 6, part, programs, tl.sum(v * v))
            keep(sums_after, 7, part, programs, tl.sum(p * p))
        else:
            ended = tl.full((), 1, tl.int32)
            tl.store(answer + row, combined(before, 0, row, n, v_v, v_r, v_p), mask=row < n)
            tl.store(answer + n, theta)
    tl.store(done + 2 * problem + new, ended)


@triton.jit(do_not_specialize=["turn", "n", "programs"])
def power_step(
    gram, state, sums, done, answer, turn, n, width, programs, limit: tl.float64,
    REAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    # Memory bound: one read of the Gram matrix and, by every program, two of v and Av. Multiplies Av / |Av|.
    problem, part = problem_and_part(programs)
    old, new = turn % 2, (turn + 1) % 2
    ended = tl.load(done + 2 * problem + old)
    row = part * ROWS + tl.arange(0, ROWS)
    inside = row < n
    gram += problem * n * width
    before = state + (2 * problem + old) * 6 * n
    after = state + (2 * problem + new) * 6 * n
    answer += problem * (n + 1)
    if ended == 0:
        sums_before = sums + (2 * problem + old) * SUMS * programs
        theta = sum_of(sums_before, 0, programs, PROGRAMS)
        length = tl.sqrt(sum_of(sums_before, 1, programs, PROGRAMS))

        squares = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, n, BLOCK):
            at = first + tl.arange(0, BLOCK)
            v = tl.load(before + at, mask=at < n, other=0.0)
            r = tl.load(before + 3 * n + at, mask=at < n, other=0.0) - theta * v
            squares += r * r

        lost = theta < LOST
        if (tl.sqrt(tl.sum(squares)) > limit * theta) | lost:
            pick = tl.cast(-1, tl.int64)
            if lost:
                pick = largest_diagonal(gram, n, width)
            per_length = tl.where(lost, 0.0, 1 / tl.where(lost, 1.0, length))
            product = tl.zeros((ROWS, BLOCK), REAL)
            for first in range(0, n, BLOCK):
                at = first + tl.arange(0, BLOCK)
                v = tl.load(before + 3 * n + at, mask=at < n, other=0.0) * per_length
                v = tl.where(at == pick, 1.0, v)
                product += gram_rows(gram, row, at, n, width) * v.to(REAL)[None, :]
            av = tl.sum(product, 1).to(tl.float64)
            v = tl.load(before + 3 * n + row, mask=inside, other=0.0) * per_length
            v = tl.where(row == pick, 1.0, v)
            tl.store(after + row, v, mask=inside)
            tl.store(after + 3 * n + row, av, mask=inside)
            sums_after = sums + (2 * problem + new) * SUMS * programs
            keep(sums_after, 0, part, programs, tl.sum(v * av))
            keep(sums_after, 1, part, programs, tl.sum(av * av))
        else:
            ended = tl.full((), 1, tl.int32)
            tl.store(answer + row, tl.load(before + row, mask=inside), mask=inside)
            tl.store(answer + n, theta)
    tl.store(done + 2 * problem + new, ended)


@triton.jit(do_not_specialize=["turn", "short", "programs", "parts"])
def end_steps(
    matrix, largest, gram, state, sums, done, answer, sigma, short_out, long_out, turn,
    short, long, width, programs, parts, short_stride, long_stride, sizes, strides,
    LOCG: tl.constexpr, SHORT_IS_V: tl.constexpr, REAL: tl.constexpr,
    LONG: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    # Memory bound: one read of the matrix. The vector of the long side is M or its transpose times the other one.
    problem, part = problem_and_part(parts)
    first_column = part.to(tl.int64) * LONG
    column = first_column + tl.arange(0, LONG)
    old = turn % 2
    exponent, usable = scale_of(largest, problem)
    matrix += offset_of(problem, sizes, strides)
    gram += problem * short * width
    state += (2 * problem + old) * 6 * short
    sums += (2 * problem + old) * SUMS * programs
    answer += problem * (short + 1)
    ended = tl.load(done + 2 * problem + old) != 0
    if ended:
        theta = tl.load(answer + short, mask=usable, other=0.0)
        v_v = tl.full((), 1.0, tl.float64)
        v_r = tl.full((), 0.0, tl.float64)
        v_p = tl.full((), 0.0, tl.float64)
        place = answer
    else:
        place = state
        if LOCG:
            theta, v_v, v_r, v_p, _p_v, _p_r, _p_p = rotation(sums, programs, PROGRAMS)
        else:
            theta = sum_of(sums, 0, programs, PROGRAMS)
            v_v = tl.full((), 1.0, tl.float64)
            v_r = tl.full((), 0.0, tl.float64)
            v_p = tl.full((), 0.0, tl.float64)
    length = tl.sqrt(theta)
    answered = tl.where(usable, short, 0)
    moving = tl.where(ended, 0, short) if LOCG else 0
    poison = tl.where(usable | (tl.load(largest + problem) == 0), 0.0, float("nan"))

    product = tl.zeros((BLOCK, LONG), tl.float64)
    sign_sum = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, short, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = short_block(place, at, short, answered, moving, v_v, v_r, v_p)
        block = scaled_block(matrix, at, column, short, long, short_stride, long_stride, exponent, REAL)
        product += tl.where(usable, block.to(tl.float64), 0.0) * x[:, None]
        if SHORT_IS_V:
            sign_sum += x
        else:
            row_sums = tl.load(gram + at.to(tl.int64) * width + short, mask=at < answered, other=0.0)
            sign_sum += x * row_sums.to(tl.float64)
    sign = tl.where(tl.sum(sign_sum) < 0, -1.0, 1.0)
    image = tl.sum(product, 0) * (sign / tl.where(length > 0, length, 1.0)) + poison
    tl.store(long_out + problem * long + column, image, mask=column < long)
    if first_column < short:
        x = short_block(place, column, short, answered, moving, v_v, v_r, v_p)
        tl.store(short_out + problem * short + column, x * sign + poison, mask=column < short)
    if part == 0:
        tl.store(sigma + problem, (times_power_of_two(length, exponent) + poison).to(REAL))


@triton.jit
def short_block(place, at, n, answered, moving, v_v, v_r, v_p):
    """A block of the vector of the short side: the answer or, where there is none, the last combination."""
    v = tl.load(place + at, mask=at < answered, other=0.0)
    r = tl.load(place + n + at, mask=at < moving, other=0.0)
    p = tl.load(place + 2 * n + at, mask=at < moving, other=0.0)
    return v_v * v + v_r * r + v_p * p


# --- the gradient -------------------------------------------------------------------------------------------------


@triton.jit
def spectral_norm_gradient(
    grad, u, v, out, rows, columns, sizes, strides, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    # Memory bound: one write an entry.
    blocks = tl.cdiv(columns, BLOCK_N)
    problem, part = problem_and_part(blocks * tl.cdiv(rows, BLOCK_M))
    row = (part // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (part % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    left = tl.load(u + problem * rows + row, mask=row < rows, other=0.0)
    right = tl.load(v + problem * columns + column, mask=column < columns, other=0.0)
    factor = tl.load(grad + offset_of(problem, sizes, strides)).to(left.dtype)
    at = problem * rows * columns + row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + at, (factor * left)[:, None] * right[None, :], mask=inside)


# --- launches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Where the results of all problems go: sigma [...], u [..., M], v [..., N], contiguous."""

    sigma: Tensor
    u: Tensor
    v: Tensor

    @classmethod
    def empty(cls, matrix: Tensor, sigma_dtype: torch.dtype) -> Pair:
        *leading, rows, columns = matrix.shape
        accumulate = accumulation_dtype(matrix.dtype)
        return cls(
            matrix.new_empty(leading, dtype=sigma_dtype),
            matrix.new_empty((*leading, rows), dtype=accumulate),
            matrix.new_empty((*leading, columns), dtype=accumulate),
        )


def fits_registers(matrix: Tensor) -> bool:
    """Whether one program holds the matrix as a tile, sides rounded up to powers of two."""
    rows, columns = matrix.shape[-2:]
    if rows < columns and TURNED_ALONG_ROWS and (rows > 16 or columns > 64):
        return False
    return power_of_2(rows, 16) * power_of_2(columns, 16) <= MOST_ON_CHIP


def fits_cache(matrix: Tensor) -> bool:
    """Whether one program reads the matrix again and again faster than launches follow each other."""
    long, short = max(matrix.shape[-2:]), power_of_2(min(matrix.shape[-2:]), 16)
    return short <= 128 and long * short * real_type(matrix.dtype).primitive_bitwidth // 8 <= MOST_IN_CACHE


MOST_ON_CHIP = 4096
"""Entries of a tile: with more a turned one, or one with a hint, spills."""

TURNED_ALONG_ROWS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
"""Whether this Triton lays threads along the long side of a turned tile although it does not know its rows to be
neighbours: larger ones spill."""

MOST_IN_CACHE = 128 << 10
"""Bytes of a matrix, in the dtype that it is computed in."""


def pair_of_one_program(
    matrix: Tensor, start: Tensor | None, steering: tuple[int, float, float, bool], pair: Pair
) -> None:
    """One launch."""
    iters, tol, noise, locg = steering
    turned = matrix.shape[-2] < matrix.shape[-1]
    upright = matrix.mT if turned else matrix
    sizes, strides = problems(matrix, 2)
    hint_sizes, hint_strides = problems(start, 1)
    block_n = power_of_2(upright.shape[-1], 16)
    blocks: dict[str, Any] = {"BLOCK_N": block_n}
    num_warps = 8
    if fits_registers(matrix):
        kernel = spectral_norm_on_chip
        blocks["BLOCK_M"] = power_of_2(upright.shape[-2], 16)
        entry = real_type(matrix.dtype).primitive_bitwidth // 8
        num_warps = min(max(blocks["BLOCK_M"] * block_n * entry // 2048, 4), 8)
    else:
        kernel = spectral_norm_in_cache
    launch(
        kernel,
        (matrix.shape[:-2].numel(),),
        matrix, start, pair.sigma, *((pair.v, pair.u) if turned else (pair.u, pair.v)),
        *upright.shape[-2:], *upright.stride()[-2:], 0 if start is None else start.stride(-1),
        sizes, strides, hint_sizes, hint_strides,
        iters, tol, noise,
        **AS_WRITTEN, num_warps=num_warps, LOCG=locg, TURNED=turned, REAL=real_type(matrix.dtype), **blocks,
    )  # fmt: skip


class Steps:
    """The iteration on the Gram matrix of the shorter side of each problem, and its memory."""

    STRETCH = 1024  # of the long side, whose products are added in the dtype of the matrix
    BLOCK = 256  # of vectors

    def __init__(self, matrix: Tensor, steering: tuple[int, float, float, bool], nonnegative: bool) -> None:
        self.matrix = matrix
        self.iters, tol, noise, self.locg = steering
        self.limit = max(tol, noise)
        self.nonnegative = nonnegative
        self.accumulate = accumulation_dtype(matrix.dtype)
        self.real = real_type(matrix.dtype)

        rows, columns = matrix.shape[-2:]
        self.short_is_v = rows > columns
        self.short, self.long = min(rows, columns), max(rows, columns)
        strides = matrix.stride()[-2:]
        self.strides = (strides[1], strides[0]) if self.short_is_v else strides
        self.layout = problems(matrix, 2)
        self.problems = matrix.shape[:-2].numel()

        self.rows = 8 if self.short <= 1056 else 16 if self.short <= 2112 else 32  # of one program
        self.block = self.BLOCK // 2 if self.rows == 32 else self.BLOCK
        double = self.accumulate == torch.float64
        self.num_warps = 8 if double else 4
        self.locg_warps = 8 if double or self.rows > 8 else 4
        self.programs = cdiv(self.short, self.rows)
        self.width = cdiv(self.short + 1, 16) * 16
        self.largest = torch.linalg.vector_norm(matrix, float("inf"), dim=(-2, -1))
        self.state = self.empty(2, 6, self.short)
        self.sums = self.empty(2, SUMS.value, self.programs)
        self.answer = self.empty(self.short + 1)
        self.done = matrix.new_empty((self.problems, 2), dtype=torch.int32)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.matrix.new_empty((self.problems, *shape), dtype=dtype)

    def gram(self) -> Tensor:
        """Split along the long side where the tiles alone would not keep the device busy, by the matrix' shape only."""
        block = 64 if self.accumulate == torch.float32 else 32
        tiles = cdiv(self.short, block)
        parts = cdiv(tiles, 2) * (tiles + 1)
        chunk, warps = (32, 8) if self.accumulate == torch.float64 else (16, 16)
        wanted = cdiv(256, parts)
        long_each = cdiv(cdiv(self.long, wanted), self.STRETCH) * self.STRETCH
        splits = cdiv(self.long, long_each)
        gram = self.empty(splits, self.short, self.width, dtype=self.accumulate)
        launch(
            gram_matrix,
            (self.problems * parts, splits),
            self.matrix, self.largest, gram,
            self.short, self.long, self.width, tiles, parts, splits, long_each, *self.strides, *self.layout,
            num_warps=warps,
            REAL=self.real, BLOCK=block, CHUNK=chunk, CHUNKS=self.STRETCH // chunk,
        )  # fmt: skip
        return gram.sum(1) if splits > 1 else gram

    def image(self, start: Tensor) -> Tensor:
        image = self.empty(self.short)
        launch(
            start_image,
            (self.problems * self.programs,),
            self.matrix, self.largest, start, image,
            self.short, self.long, self.programs, *self.strides, start.stride(-1), *self.layout, *problems(start, 1),
            num_warps=self.num_warps,
            REAL=self.real, NONNEGATIVE=self.nonnegative, ROWS=self.rows, BLOCK=self.block,
        )  # fmt: skip
        return image

    def run(self, start: Tensor | None, pair: Pair) -> None:
        gram = self.gram()
        image = start is not None and not self.short_is_v
        start = self.image(start) if start is not None and image else start
        grid = (self.problems * self.programs,)
        block: dict[str, Any] = {"REAL": self.real, "ROWS": self.rows, "BLOCK": self.block, "num_warps": self.num_warps}
        step = block | {"num_warps": self.locg_warps} if self.locg else block
        all_sums: dict[str, Any] = {"PROGRAMS": power_of_2(self.programs)}
        launch(
            begin_steps,
            grid,
            gram, self.largest, start, self.state, self.sums, self.done,
            self.short, self.width, self.programs, 0 if start is None else start.stride(-1), *problems(start, 1),
            LOCG=self.locg, IMAGE=image, NONNEGATIVE=self.nonnegative, **block,
        )  # fmt: skip
        for turn in range(self.iters):
            launch(
                locg_step if self.locg else power_step,
                grid,
                gram, self.state, self.sums, self.done, self.answer,
                turn, self.short, self.width, self.programs, self.limit,
                **AS_WRITTEN, **step, **all_sums,
            )  # fmt: skip
        parts = cdiv(self.long, 16)
        launch(
            end_steps,
            (self.problems * parts,),
            self.matrix, self.largest, gram, self.state, self.sums, self.done, self.answer,
            pair.sigma, *((pair.v, pair.u) if self.short_is_v else (pair.u, pair.v)),
            self.iters, self.short, self.long, self.width, self.programs, parts, *self.strides, *self.layout,
            **AS_WRITTEN, num_warps=4,
            LOCG=self.locg, SHORT_IS_V=self.short_is_v, REAL=self.real, LONG=16, BLOCK=self.BLOCK, **all_sums,
        )  # fmt: skip


def pair_into(matrix, start, method, iters, tol, nonnegative, pair: Pair) -> None:
    accumulate = accumulation_dtype(matrix.dtype)
    steering = default_steering(method, iters, tol, accumulate)
    if 0 in matrix.shape:
        for result in (pair.sigma, pair.u, pair.v):
            result.zero_()
        return
    if fits_registers(matrix) or fits_cache(matrix):
        pair_of_one_program(matrix, start, steering, pair)
    else:
        Steps(matrix, steering, nonnegative).run(start, pair)


def leading_pair(
    matrix: Tensor, start: Tensor | None, method: str, iters: int | None, tol: float | None, nonnegative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``sigma [...]``, ``u [..., M]``, ``v [..., N]`` of matrices of any size, in the accumulation dtype.

    ``nonnegative`` says that no entry is negative. Launches as of ``spectral_norm``.
    """
    pair = Pair.empty(matrix, accumulation_dtype(matrix.dtype))
    pair_into(matrix, start, method, iters, tol, nonnegative, pair)
    return pair.sigma, pair.u, pair.v


def spectral_norm(
    matrix: Tensor, start: Tensor | None, method: str, iters: int | None, tol: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Up to a shorter side of 128 and 128 KiB one launch.

    A matrix of at most 64 x 64 entries, 128 x 32 or 256 x 16, sides rounded up to powers of two, stays in registers and
    is read once: 4 bytes an entry (float64 8, half 2); with Triton before 3.7 wide ones of at most 16 x 64. Others are
    read once from memory and, three times and once a step, from the cache; a start for the other side and a first
    direction that the matrix maps to 0 cost one read more each.

    Beyond, ``iters`` + 3 launches and one by PyTorch: the largest entry (PyTorch), the Gram matrix of the shorter side,
    the begin, ``iters`` steps, of which those after the end do nothing, and the end. The matrix is read three times,
    12 bytes an entry (float64 24, half 6), for the Gram matrix ceil(S / 64) + 1 times (float64: 32) out of the cache; a
    step reads the Gram matrix once, 4 * S * S bytes (float64 8). A start costs, unless the matrix is tall, one launch
    and one read of the matrix more, a Gram matrix of S <= 1024 (float64: 512), which is added up from stretches of the
    long side, perhaps one addition by PyTorch.
    """
    pair = Pair.empty(matrix, matrix.dtype)
    pair_into(matrix, start, method, iters, tol, False, pair)
    return pair.sigma, pair.u, pair.v


def spectral_norm_backward(
    grad: Tensor,
    matrix: Tensor,
    start: Tensor | None,
    method: str,
    iters: int | None,
    tol: float | None,
    u: Tensor,
    v: Tensor,
) -> Tensor:
    """``grad * u vᵀ``: one launch, one write, 4 bytes an entry (float64 8, half 2)."""
    rows, columns = matrix.shape[-2:]
    out = matrix.new_empty(matrix.shape)
    sizes, strides = problems(grad, 0)
    block_n = min(power_of_2(columns, 16), 256)
    block_m = min(power_of_2(rows), 8192 // block_n)
    parts = cdiv(rows, block_m) * cdiv(columns, block_n)
    launch(
        spectral_norm_gradient,
        (grad.numel() * parts,),
        grad, u.contiguous(), v.contiguous(), out, rows, columns, sizes, strides,
        num_warps=8, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return out
