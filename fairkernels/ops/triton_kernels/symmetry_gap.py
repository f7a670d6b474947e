"""symmetry_gap: the penalty of pairs of classes summed over a confusion matrix, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schema import accumulation_dtype
from .common import number, offset_of
from .launch import cdiv, launch, power_of_2, problems, real_type
from .pair_penalty import pair_penalty

PRESENT = tl.constexpr(1024)  # a block of what says which classes are there
LARGEST_WHOLE = 64
"""Classes of the largest matrix that is one tile; one of 128 and its mirror image spill."""

# --- which pairs --------------------------------------------------------------------------------------------------
# `counts`, perhaps None, is 0 for a class that is absent; without them every class is there.


@triton.jit
def tile_of(part, tiles):
    """Row and column, row <= column, of a tile of the upper triangle; row -1 where there is none.

    A row of tiles and the one as far from the other end have tiles + 1 of them together.
    """
    pair = part // (tiles + 1)
    place = part % (tiles + 1)
    other = tiles - 1 - pair
    in_first = place < tiles - pair
    row = tl.where(in_first, pair, tl.where(other > pair, other, -1))
    return row, tl.where(in_first, pair + place, other + place - (tiles - pair))


@triton.jit
def is_present(counts, at, classes, stride):
    if counts is None:
        return at < classes
    else:
        return tl.load(counts + at.to(tl.int64) * stride, mask=at < classes, other=0) != 0  # NaN is not 0


@triton.jit
def pairs_among(present):
    return present * (present - 1) / 2


@triton.jit
def count_pairs(counts, classes, stride):
    """Active pairs, at least 1, in float64: what a mean is divided by."""
    present = tl.zeros((PRESENT,), tl.float64)
    for first in range(0, classes, PRESENT):
        present += is_present(counts, first + tl.arange(0, PRESENT), classes, stride).to(tl.float64)
    return tl.maximum(pairs_among(tl.sum(present)), 1.0)


@triton.jit
def rates(confusion, i, j, classes, row_stride, column_stride, REAL: tl.constexpr):
    inside = (i < classes)[:, None] & (j < classes)[None, :]
    at = i[:, None].to(tl.int64) * row_stride + j[None, :].to(tl.int64) * column_stride
    return tl.load(confusion + at, mask=inside, other=0.0).to(REAL)


@triton.jit
def row_sums(
    confusion, sums, classes, parts, row_stride, column_stride, sizes, strides,
    REAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Memory bound: one read of the matrix. A class whose rates are all 0 is absent.
    problem = (tl.program_id(0) // parts).to(tl.int64)
    i = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    confusion += offset_of(problem, sizes, strides)
    total = tl.zeros((ROWS, BLOCK), REAL)
    for first in range(0, classes, BLOCK):
        total += rates(confusion, i, first + tl.arange(0, BLOCK), classes, row_stride, column_stride, REAL)
    tl.store(sums + problem * classes + i, tl.sum(total, 1), mask=i < classes)


# --- a matrix that is one tile ------------------------------------------------------------------------------------


@triton.jit
def whole_matrix(
    confusion, counts, classes, row_stride, column_stride, count_stride, PRESENT_BY_ROW: tl.constexpr,
    REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Its rates, the active pairs, each in both orders, and their number."""
    at = tl.arange(0, BLOCK)
    forward = rates(confusion, at, at, classes, row_stride, column_stride, REAL)
    backward = tl.trans(forward)
    if PRESENT_BY_ROW:
        in_row = (tl.sum(forward, 1) != 0).to(tl.int32)
        in_column = (tl.sum(backward, 0) != 0).to(tl.int32)
    else:
        in_row = is_present(counts, at, classes, count_stride).to(tl.int32)
        in_column = in_row
    active = (in_row[:, None] * in_column[None, :] != 0) & (at[:, None] != at[None, :])
    return forward, backward, active, tl.maximum(pairs_among(tl.sum(in_row).to(tl.float64)), 1.0)


@triton.jit
def symmetry_gap_whole(
    confusion, counts, gap, classes, row_stride, column_stride, sizes, strides,
    count_stride, count_sizes, count_strides, eps: tl.float64,
    DAMPED: tl.constexpr, MEAN: tl.constexpr, PRESENT_BY_ROW: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Memory bound: one read of the matrix.
    problem = tl.program_id(0).to(tl.int64)
    confusion += offset_of(problem, sizes, strides)
    if counts is not None:
        counts += offset_of(problem, count_sizes, count_strides)
    forward, backward, active, pairs = whole_matrix(
        confusion, counts, classes, row_stride, column_stride, count_stride, PRESENT_BY_ROW, REAL, BLOCK
    )
    penalty, _slope = pair_penalty(forward, backward, number(eps, REAL), DAMPED)
    upper = tl.arange(0, BLOCK)[:, None] < tl.arange(0, BLOCK)[None, :]
    total = tl.sum(tl.sum(tl.where(active & upper, penalty, 0.0), 1).to(tl.float64))
    total = total / pairs if MEAN else total
    tl.store(gap + problem, total.to(REAL))


@triton.jit
def symmetry_gap_whole_gradient(
    confusion, counts, grad, out, classes, row_stride, column_stride, sizes, strides,
    count_stride, count_sizes, count_strides, grad_sizes, grad_strides, eps: tl.float64,
    DAMPED: tl.constexpr, MEAN: tl.constexpr, PRESENT_BY_ROW: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Memory bound: one read and one write of the matrix.
    problem = tl.program_id(0).to(tl.int64)
    confusion += offset_of(problem, sizes, strides)
    if counts is not None:
        counts += offset_of(problem, count_sizes, count_strides)
    forward, backward, active, pairs = whole_matrix(
        confusion, counts, classes, row_stride, column_stride, count_stride, PRESENT_BY_ROW, REAL, BLOCK
    )
    _penalty, slope = pair_penalty(forward, backward, number(eps, REAL), DAMPED)
    upstream = tl.load(grad + offset_of(problem, grad_sizes, grad_strides)).to(tl.float64)
    upstream = upstream / pairs if MEAN else upstream
    at = tl.arange(0, BLOCK)
    inside = (at < classes)[:, None] & (at < classes)[None, :]
    place = out + problem * classes * classes + at[:, None] * classes + at[None, :]
    tl.store(place, tl.where(active, upstream.to(REAL) * slope, 0.0), mask=inside)


# --- a matrix of many tiles ---------------------------------------------------------------------------------------


@triton.jit
def symmetry_gap_tiles(
    confusion, counts, sums, classes, tiles, parts, row_stride, column_stride, sizes, strides,
    count_stride, count_sizes, count_strides, eps: tl.float64,
    DAMPED: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Memory bound: one read of the matrix. C_ij and C_ji lie far apart, so a tile and its mirror image are read along
    # their rows, and one is turned in registers.
    problem = (tl.program_id(0) // parts).to(tl.int64)
    row, column = tile_of(tl.program_id(0) % parts, tiles)
    total = tl.full((), 0.0, tl.float64)
    if row >= 0:
        i = row * BLOCK + tl.arange(0, BLOCK)
        j = column * BLOCK + tl.arange(0, BLOCK)
        confusion += offset_of(problem, sizes, strides)
        forward = rates(confusion, i, j, classes, row_stride, column_stride, REAL)
        backward = tl.trans(rates(confusion, j, i, classes, row_stride, column_stride, REAL))
        if counts is not None:
            counts += offset_of(problem, count_sizes, count_strides)
        in_row = is_present(counts, i, classes, count_stride)
        in_column = is_present(counts, j, classes, count_stride)
        active = in_row[:, None] & in_column[None, :] & (i[:, None] < j[None, :])
        penalty, _slope = pair_penalty(forward, backward, number(eps, REAL), DAMPED)
        total = tl.sum(tl.sum(tl.where(active, penalty, 0.0), 1).to(tl.float64))
    tl.store(sums + tl.program_id(0), total)


@triton.jit
def symmetry_gap_total(
    sums, counts, gap, classes, parts, count_stride, count_sizes, count_strides,
    MEAN: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Bound by latency: what the tiles have left is added, always in the same order.
    problem = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        total += tl.load(sums + problem * parts + part, mask=part < parts, other=0.0)
    result = tl.sum(total)
    if MEAN:
        if counts is not None:
            counts += offset_of(problem, count_sizes, count_strides)
        result = result / count_pairs(counts, classes, count_stride)
    tl.store(gap + problem, result.to(REAL))


@triton.jit
def symmetry_gap_tiles_gradient(
    confusion, counts, grad, out, classes, tiles, parts, row_stride, column_stride, sizes, strides,
    count_stride, count_sizes, count_strides, grad_sizes, grad_strides, eps: tl.float64,
    DAMPED: tl.constexpr, MEAN: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Memory bound: one read and one write of the matrix. A tile and its mirror image are written along their rows.
    problem = (tl.program_id(0) // parts).to(tl.int64)
    row, column = tile_of(tl.program_id(0) % parts, tiles)
    if row >= 0:
        i = row * BLOCK + tl.arange(0, BLOCK)
        j = column * BLOCK + tl.arange(0, BLOCK)
        confusion += offset_of(problem, sizes, strides)
        forward = rates(confusion, i, j, classes, row_stride, column_stride, REAL)
        backward = tl.trans(rates(confusion, j, i, classes, row_stride, column_stride, REAL))
        if counts is not None:
            counts += offset_of(problem, count_sizes, count_strides)
        in_row = is_present(counts, i, classes, count_stride)
        in_column = is_present(counts, j, classes, count_stride)
        active = in_row[:, None] & in_column[None, :] & (i[:, None] != j[None, :])

        upstream = tl.load(grad + offset_of(problem, grad_sizes, grad_strides)).to(tl.float64)
        if MEAN:
            upstream = upstream / count_pairs(counts, classes, count_stride)
        scale = upstream.to(REAL)
        small = number(eps, REAL)
        _penalty, by_forward = pair_penalty(forward, backward, small, DAMPED)
        _penalty, by_backward = pair_penalty(backward, forward, small, DAMPED)

        out += problem * classes * classes
        inside = (i < classes)[:, None] & (j < classes)[None, :]
        place = i[:, None].to(tl.int64) * classes + j[None, :]
        tl.store(out + place, tl.where(active, scale * by_forward, 0.0), mask=inside)
        if row < column:
            mirror = tl.trans(tl.where(active, scale * by_backward, 0.0))
            inside = (j < classes)[:, None] & (i < classes)[None, :]
            place = j[:, None].to(tl.int64) * classes + i[None, :]
            tl.store(out + place, mirror, mask=inside)


# --- launches -----------------------------------------------------------------------------------------------------


class Call:
    """What the value and the gradient have in common."""

    def __init__(self, confusion: Tensor, counts: Tensor | None, eps: float, absent: str, reduction: str) -> None:
        self.confusion = confusion
        accumulate = accumulation_dtype(confusion.dtype)
        double = accumulate == torch.float64
        self.real = real_type(confusion.dtype)
        self.classes = confusion.shape[-1]
        self.sizes, self.strides = problems(confusion, 2)
        self.problems = confusion.shape[:-2].numel()
        self.whole = self.classes <= LARGEST_WHOLE
        self.block = power_of_2(self.classes, 16) if self.whole else (32 if double else 64)
        self.tiles = cdiv(self.classes, self.block)
        self.parts = cdiv(self.tiles, 2) * (self.tiles + 1)
        num_warps = self.block * self.block * (2 if double else 1) // 512

        by_row = absent == "ignore" and counts is None
        self.options: dict[str, Any] = {
            "DAMPED": eps > torch.finfo(accumulate).tiny,
            "REAL": self.real,
            "BLOCK": self.block,
            "num_warps": max(num_warps, 1),
        }
        if self.whole:
            self.options["PRESENT_BY_ROW"] = by_row
        self.mean = reduction == "mean"
        self.counts = None if absent == "zero" else self.row_sums(accumulate) if by_row and not self.whole else counts
        stride = 0 if self.counts is None else self.counts.stride(-1)
        self.present = (stride, *problems(self.counts, 1))
        self.layout = (*confusion.stride()[-2:], self.sizes, self.strides)
        self.eps = eps

    def row_sums(self, dtype: torch.dtype) -> Tensor:
        sums = self.confusion.new_empty(self.confusion.shape[:-1], dtype=dtype)
        parts = cdiv(self.classes, 16)
        launch(
            row_sums,
            (self.problems * parts,),
            self.confusion, sums, self.classes, parts, *self.confusion.stride()[-2:], self.sizes, self.strides,
            num_warps=4, REAL=self.real, ROWS=16, BLOCK=128,
        )  # fmt: skip
        return sums


def symmetry_gap(confusion: Tensor, counts: Tensor | None, eps: float, absent: str, reduction: str) -> Tensor:
    """One launch up to 64 classes, beyond two: one read, 4 bytes an entry (float64 8, half 2).

    Beyond, tiles on the diagonal are read twice, the second time from the cache, and where presence has to be found in
    the rows there is one launch and one read more.
    """
    gap = confusion.new_empty(confusion.shape[:-2])
    if 0 in confusion.shape:
        return gap.zero_()
    call = Call(confusion, counts, eps, absent, reduction)
    if call.whole:
        launch(
            symmetry_gap_whole,
            (call.problems,),
            confusion, call.counts, gap, call.classes, *call.layout, *call.present, eps,
            MEAN=call.mean, **call.options,
        )  # fmt: skip
        return gap
    sums = confusion.new_empty((call.problems, call.parts), dtype=torch.float64)
    launch(
        symmetry_gap_tiles,
        (call.problems * call.parts,),
        confusion, call.counts, sums, call.classes, call.tiles, call.parts, *call.layout, *call.present, eps,
        **call.options,
    )  # fmt: skip
    launch(
        symmetry_gap_total,
        (call.problems,),
        sums, call.counts, gap, call.classes, call.parts, *call.present,
        num_warps=4, MEAN=call.mean, REAL=call.real, BLOCK=1024,
    )  # fmt: skip
    return gap


def symmetry_gap_backward(
    grad: Tensor, confusion: Tensor, counts: Tensor | None, eps: float, absent: str, reduction: str
) -> Tensor:
    """One launch, one read and one write, 8 bytes an entry (float64 16, half 4).

    Beyond 64 classes tiles on the diagonal are read twice, the second time from the cache, and where presence has to be
    found in the rows there is one launch and one read more.
    """
    out = confusion.new_empty(confusion.shape)
    if out.numel() == 0:
        return out
    call = Call(confusion, counts, eps, absent, reduction)
    upstream = problems(grad, 0)
    if call.whole:
        launch(
            symmetry_gap_whole_gradient,
            (call.problems,),
            confusion, call.counts, grad, out, call.classes, *call.layout, *call.present, *upstream, eps,
            MEAN=call.mean, **call.options,
        )  # fmt: skip
    else:
        launch(
            symmetry_gap_tiles_gradient,
            (call.problems * call.parts,),
            confusion, call.counts, grad, out,
            call.classes, call.tiles, call.parts, *call.layout, *call.present, *upstream, eps,
            MEAN=call.mean, **call.options | {"num_warps": 2 * call.options["num_warps"]},
        )  # fmt: skip
    return out
