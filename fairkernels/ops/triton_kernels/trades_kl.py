"""trades_kl: KL(p || q) of two softmaxes, row by row, and its gradients by both logits.

Forward: one launch; for a sum over the batch one more, over a number a tile of rows. Backward: one launch for both
gradients. Each reads both logits once (backward writes both gradients once), 8 (16) bytes an element in float32. Rows
longer than ``LONGEST_ROW`` are read twice, backward three times, after the first time from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schema import accumulation_dtype
from .class_blocks import extended, finite_top
from .common import offset_of
from .launch import cdiv, launch, power_of_2, problems, real_type

LONGEST_ROW = {torch.float32: 4096, torch.float64: 2048}
"""Classes whose two logits one program holds in registers, by accumulation dtype."""


@triton.jit
def exp_remainder(r, REAL: tl.constexpr):
    """``exp(r) - 1 - r`` for -1 <= r <= 1, to rounding: a Taylor polynomial, r^2/2 (1 + r/3 (1 + r/4 (...)))."""
    LAST: tl.constexpr = 18 if tl.float64 == REAL else 10
    series = tl.full(r.shape, 1.0, REAL)
    for down in tl.static_range(LAST - 2):
        series = 1 + series * (r * (1.0 / (LAST - down)))
    return 0.5 * r * r * series


@triton.jit
def load_pair(
    natural, adversarial, row, inside, columns, K, row_stride, column_stride, other_row_stride, other_column_stride,
    REAL: tl.constexpr,
):  # fmt: skip
    """Both logits of some rows at some columns, -inf beyond the classes, zeros beyond the rows."""
    there = inside[:, None] & (columns < K)[None, :]
    column = columns[None, :].to(tl.int64)
    z = tl.load(natural + row[:, None] * row_stride + column * column_stride, mask=there, other=0).to(REAL)
    other_at = row[:, None] * other_row_stride + column * other_column_stride
    other = tl.load(adversarial + other_at, mask=there, other=0).to(REAL)
    is_class = (columns < K)[None, :]
    return tl.where(is_class, z, float("-inf")), tl.where(is_class, other, float("-inf"))


@triton.jit
def gap_at(z, other, top):
    """z' - z at a row's largest z."""
    return tl.max(tl.where(z == top[:, None], other - z, float("-inf")), 1)


@triton.jit
def usable(gap):
    """0 where one of the two is impossible: any shift will do."""
    return tl.where(tl.abs(gap) < float("inf"), gap, 0.0)


@triton.jit
def log_ratio_at_top(gap, top, other_top, total, other_total):
    """log(q / p) at the class of the row's largest z."""
    return gap - (finite_top(other_top) - finite_top(top)) - tl.log(other_total / total)


@triton.jit
def rates_and_ratio(z, other, top, other_top, total, other_total, gap):
    """p, q and log(q / p) less its value at the top class. Logits are subtracted first: close ones lose nothing."""
    p = tl.exp(z - finite_top(top)[:, None]) * (1 / total)[:, None]
    q = tl.exp(other - finite_top(other_top)[:, None]) * (1 / other_total)[:, None]
    return p, q, tl.where(p == 0, 0.0, (other - z) - gap[:, None])


@triton.jit
def terms_of(p, q, relative, at_top, REAL: tl.constexpr):
    """What classes add to a row's divergence. The terms are q - p - p r with r = log(q / p): they add up to the same as
    -p r, because p and q have the same sum, but none is negative, and for small r p (exp(r) - 1 - r) loses nothing."""
    r = relative + at_top[:, None]
    near = tl.abs(r) <= 1
    close = p * exp_remainder(tl.where(near, r, 0.0), REAL)
    return tl.where(p == 0, q, tl.where(near, close, q - p - p * r))


@triton.jit
def change_of(p, q, relative, at_top, REAL: tl.constexpr):
    """q - p, where both are close without cancellation."""
    r = relative + at_top[:, None]
    near = (tl.abs(r) <= 1) & (p != 0)
    inside = tl.where(near, r, 0.0)
    return tl.where(near, p * (inside + exp_remainder(inside, REAL)), q - p)


@triton.jit
def scan_pair(
    natural, adversarial, row, inside, K, row_stride, column_stride, other_row_stride, other_column_stride,
    REAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Largest logits, sums of exponentials and the gap at the top class of rows that are read in pieces."""
    top, total = tl.full((ROWS,), float("-inf"), REAL), tl.zeros((ROWS,), REAL)
    other_top, other_total = tl.full((ROWS,), float("-inf"), REAL), tl.zeros((ROWS,), REAL)
    gap = tl.zeros((ROWS,), REAL)
    for first in range(0, K, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        z, other = load_pair(
            natural, adversarial, row, inside, columns, K, row_stride, column_stride, other_row_stride,
            other_column_stride, REAL,
        )  # fmt: skip
        here = tl.max(z, 1)
        gap = tl.where(here > top, gap_at(z, other, here), gap)
        top, total = extended(top, total, z)
        other_top, other_total = extended(other_top, other_total, other)
    return top, total, other_top, other_total, usable(gap)


@triton.jit(do_not_specialize=["B", "tiles", "row_stride", "other_row_stride", "sizes", "strides", "other_sizes",
                               "other_strides"])  # fmt: skip
def divergences(
    natural, adversarial, rows_out, sums_out, B, K, tiles, row_stride, column_stride, other_row_stride,
    other_column_stride, sizes, strides, other_sizes, other_strides,
    WIDE: tl.constexpr, REAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Bound by one read of both logits; two exponentials an element.
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < B
    natural += offset_of(problem, sizes, strides)
    adversarial += offset_of(problem, other_sizes, other_strides)
    if WIDE:
        top, total, other_top, other_total, gap = scan_pair(
            natural, adversarial, row, inside, K, row_stride, column_stride, other_row_stride, other_column_stride,
            REAL, ROWS, BLOCK_K,
        )  # fmt: skip
        at_top = log_ratio_at_top(gap, top, other_top, total, other_total)
        divergence = tl.zeros((ROWS,), REAL)
        for first in range(0, K, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            z, other = load_pair(
                natural, adversarial, row, inside, columns, K, row_stride, column_stride, other_row_stride,
                other_column_stride, REAL,
            )  # fmt: skip
            p, q, relative = rates_and_ratio(z, other, top, other_top, total, other_total, gap)
            divergence += tl.sum(terms_of(p, q, relative, at_top, REAL), 1)
    else:
        z, other = load_pair(
            natural, adversarial, row, inside, tl.arange(0, BLOCK_K), K, row_stride, column_stride, other_row_stride,
            other_column_stride, REAL,
        )  # fmt: skip
        top, other_top = tl.max(z, 1), tl.max(other, 1)
        gap = usable(gap_at(z, other, top))
        total = tl.sum(tl.exp(z - finite_top(top)[:, None]), 1)
        other_total = tl.sum(tl.exp(other - finite_top(other_top)[:, None]), 1)
        at_top = log_ratio_at_top(gap, top, other_top, total, other_total)
        p, q, relative = rates_and_ratio(z, other, top, other_top, total, other_total, gap)
        divergence = tl.sum(terms_of(p, q, relative, at_top, REAL), 1)
    if rows_out is not None:
        tl.store(rows_out + problem * B + row, divergence, mask=inside)
    else:
        divergence = tl.where(inside, divergence, 0.0).to(tl.float64)
        tl.store(sums_out + tl.program_id(0).to(tl.int64), tl.sum(divergence, 0))


@triton.jit(do_not_specialize=["tiles", "B"])
def sum_of_tiles(sums, out, tiles, B, MEAN: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr):
    # Bound by latency: 8 bytes a tile of rows.
    problem = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, tiles, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(sums + problem * tiles + at, mask=at < tiles, other=0)
    result = tl.sum(total, 0)
    if MEAN:
        result = result / tl.maximum(B, 1)
    tl.store(out + problem, result.to(REAL))


@triton.jit(do_not_specialize=["B", "tiles", "row_stride", "other_row_stride", "grad_stride", "sizes", "strides",
                               "other_sizes", "other_strides", "grad_sizes", "grad_strides"])  # fmt: skip
def gradients(
    natural, adversarial, grad, by_natural, by_adversarial, B, K, tiles, row_stride, column_stride, other_row_stride,
    other_column_stride, grad_stride, sizes, strides, other_sizes, other_strides, grad_sizes, grad_strides,
    MEAN: tl.constexpr, WIDE: tl.constexpr, REAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Bound by one read of both logits and one write of both gradients; two exponentials an element.
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < B
    natural += offset_of(problem, sizes, strides)
    adversarial += offset_of(problem, other_sizes, other_strides)
    by_natural += problem * B * K
    by_adversarial += problem * B * K
    slope = tl.load(grad + offset_of(problem, grad_sizes, grad_strides) + row * grad_stride, mask=inside, other=0)
    slope = slope.to(REAL)
    if MEAN:
        slope = slope / B
    if WIDE:
        top, total, other_top, other_total, gap = scan_pair(
            natural, adversarial, row, inside, K, row_stride, column_stride, other_row_stride, other_column_stride,
            REAL, ROWS, BLOCK_K,
        )  # fmt: skip
        at_top = log_ratio_at_top(gap, top, other_top, total, other_total)
        excess, mean = tl.zeros((ROWS,), REAL), tl.zeros((ROWS,), REAL)
        for first in range(0, K, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            z, other = load_pair(
                natural, adversarial, row, inside, columns, K, row_stride, column_stride, other_row_stride,
                other_column_stride, REAL,
            )  # fmt: skip
            p, q, relative = rates_and_ratio(z, other, top, other_top, total, other_total, gap)
            excess += tl.sum(change_of(p, q, relative, at_top, REAL), 1)
            mean += tl.sum(p * relative, 1)
        for first in range(0, K, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            z, other = load_pair(
                natural, adversarial, row, inside, columns, K, row_stride, column_stride, other_row_stride,
                other_column_stride, REAL,
            )  # fmt: skip
            p, q, relative = rates_and_ratio(z, other, top, other_top, total, other_total, gap)
            change = change_of(p, q, relative, at_top, REAL)
            store_gradients(
                by_natural, by_adversarial, p, q, relative, change, slope, excess, mean, row, inside, columns, K
            )
    else:
        columns = tl.arange(0, BLOCK_K)
        z, other = load_pair(
            natural, adversarial, row, inside, columns, K, row_stride, column_stride, other_row_stride,
            other_column_stride, REAL,
        )  # fmt: skip
        top, other_top = tl.max(z, 1), tl.max(other, 1)
        gap = usable(gap_at(z, other, top))
        total = tl.sum(tl.exp(z - finite_top(top)[:, None]), 1)
        other_total = tl.sum(tl.exp(other - finite_top(other_top)[:, None]), 1)
        at_top = log_ratio_at_top(gap, top, other_top, total, other_total)
        p, q, relative = rates_and_ratio(z, other, top, other_top, total, other_total, gap)
        change = change_of(p, q, relative, at_top, REAL)
        excess, mean = tl.sum(change, 1), tl.sum(p * relative, 1)
        store_gradients(
            by_natural, by_adversarial, p, q, relative, change, slope, excess, mean, row, inside, columns, K
        )


@triton.jit
def store_gradients(by_natural, by_adversarial, p, q, relative, change, slope, excess, mean, row, inside, columns, K):
    """p (<p, r> - r) and q - p. Neither difference is left to the rounding of the sums: ratios are taken from the top
    class's, and what the changes add up to, which is 0, is subtracted again."""
    at = row[:, None] * K + columns[None, :]
    there = inside[:, None] & (columns < K)[None, :]
    mean += excess - excess  # 0, or NaN if q is
    tl.store(by_natural + at, slope[:, None] * (p * (mean[:, None] - relative)), mask=there)
    tl.store(by_adversarial + at, slope[:, None] * (change - q * excess[:, None]), mask=there)


def tile_of(num_classes: int, real: torch.dtype) -> tuple[bool, int, int, int]:
    """Whether rows are read in pieces, rows and columns of a tile, warps."""
    longest = LONGEST_ROW[real]
    wide = num_classes > longest
    columns = longest // 4 if wide else power_of_2(num_classes)
    least = 1024 if real == torch.float32 else 512
    rows = 1 if wide else max(1, least // columns)
    return wide, rows, columns, max(4, 4 * rows * columns // least)


def trades_kl(natural: Tensor, adversarial: Tensor, reduction: str) -> Tensor:
    """The divergence of each row in one launch, their sum or mean in two."""
    *shape, batch, num_classes = natural.shape
    leading = natural.shape[:-2].numel()
    wide, rows, columns, warps = tile_of(num_classes, accumulation_dtype(natural.dtype))
    tiles = cdiv(batch, rows)
    each = reduction == "none"
    out = natural.new_empty((*shape, batch) if each else shape)
    sums = None if each else natural.new_empty(leading * tiles, dtype=torch.float64)
    sizes, strides = problems(natural, 2)
    other_sizes, other_strides = problems(adversarial, 2)
    launch(
        divergences,
        (leading * tiles,),
        natural, adversarial, out if each else None, sums, batch, num_classes, tiles,
        *natural.stride()[-2:], *adversarial.stride()[-2:], sizes, strides, other_sizes, other_strides,
        num_warps=warps, WIDE=wide, REAL=real_type(natural.dtype), ROWS=rows, BLOCK_K=columns,
    )  # fmt: skip
    if not each:
        launch(
            sum_of_tiles, (leading,), sums, out, tiles, batch,
            num_warps=4, MEAN=reduction == "batchmean", REAL=real_type(natural.dtype), BLOCK=1024,
        )  # fmt: skip
    return out


def trades_kl_backward(grad: Tensor, natural: Tensor, adversarial: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Both gradients in one launch."""
    batch, num_classes = natural.shape[-2:]
    leading = natural.shape[:-2].numel()
    by_natural = torch.empty(natural.shape, dtype=natural.dtype, device=natural.device)
    by_adversarial = torch.empty_like(by_natural)
    wide, rows, columns, warps = tile_of(num_classes, accumulation_dtype(natural.dtype))
    tiles = cdiv(batch, rows)
    each = reduction == "none"
    sizes, strides = problems(natural, 2)
    other_sizes, other_strides = problems(adversarial, 2)
    grad_sizes, grad_strides = problems(grad, 1 if each else 0)
    launch(
        gradients,
        (leading * tiles,),
        natural, adversarial, grad, by_natural, by_adversarial, batch, num_classes, tiles,
        *natural.stride()[-2:], *adversarial.stride()[-2:], grad.stride(-1) if each else 0,
        sizes, strides, other_sizes, other_strides, grad_sizes, grad_strides,
        num_warps=warps, MEAN=reduction == "batchmean", WIDE=wide, REAL=real_type(natural.dtype), ROWS=rows,
        BLOCK_K=columns,
    )  # fmt: skip
    return by_natural, by_adversarial
