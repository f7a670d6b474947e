"""The symmetry gap of rates that lie in slots, and its derivatives: a program holds a square of pairs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schema import accumulation_dtype
from .class_order import ClassOrder
from .class_rates import Sums, class_of_slot, is_direct, slot_count
from .class_terms import Inputs, Terms
from .common import number, offset_of
from .launch import cdiv, launch, problems, real_type
from .pair_penalty import pair_penalty


@triton.jit
def count_present(counts, slots, BLOCK: tl.constexpr):
    present = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, slots, BLOCK):
        at = first + tl.arange(0, BLOCK)
        present += (tl.load(counts + at, mask=at < slots, other=0) != 0).to(tl.int32)
    return tl.sum(present, 0).to(tl.float64)


@triton.jit
def pairs_behind(counts, slots, K, MEAN: tl.constexpr, IGNORE_ABSENT: tl.constexpr):
    """What the sum over pairs is divided by."""
    pairs = tl.full((), 1.0, tl.float64)
    if MEAN:
        classes = tl.cast(K, tl.float64)
        if IGNORE_ABSENT:
            classes = count_present(counts, slots, 1024)
        pairs = tl.maximum(classes * (classes - 1) / 2, pairs)
    return pairs


@triton.jit(do_not_specialize=["B", "slots", "width", "sizes", "strides", "ignore_index"])
def penalties_of_pairs(
    rates, counts, labels, order, starts, coefficients, penalties,
    B, K, slots, width, label_stride, sizes, strides, ignore_index, eps: tl.float64, sym_weight: tl.float64,
    MEAN: tl.constexpr, IGNORE_ABSENT: tl.constexpr, WEIGHTED: tl.constexpr, DAMPED: tl.constexpr, DIRECT: tl.constexpr,
    REAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Bound by two reads of the rates, once as they lie and once across, and one write of the coefficients.
    across, down = tl.cdiv(width, TILE), tl.cdiv(slots, TILE)
    problem = (tl.program_id(0) // (across * down)).to(tl.int64)
    tile = tl.program_id(0) % (across * down)
    rates += problem * slots * K
    counts += problem * slots
    labels += offset_of(problem, sizes, strides)
    order += problem * B
    starts += problem * (K + 1)

    row = tile // across * TILE + tl.arange(0, TILE)
    column = tile % across * TILE + tl.arange(0, TILE)
    row_class = class_of_slot(
        labels, order, starts, tl.minimum(row, slots - 1), B, K, label_stride, ignore_index, DIRECT
    )
    row_count = tl.load(counts + row, mask=row < slots, other=0)
    row_there = (row_count != 0) & (row_class < K)
    if IGNORE_ABSENT:
        column_slot = column
        column_class = class_of_slot(
            labels, order, starts, tl.minimum(column, slots - 1), B, K, label_stride, ignore_index, DIRECT
        )
        inside = column < slots
    else:
        column_class = column
        inside = column < K
        column_slot = tl.load(starts + column, mask=inside, other=0)
        occurs = tl.load(starts + column + 1, mask=inside, other=0) > column_slot
        if DIRECT:
            column_slot = column
        inside = inside & occurs
    column_there = inside & (column_class < K)
    column_there = column_there & (tl.load(counts + column_slot, mask=column_there, other=0) != 0)

    row_at, column_at = row.to(tl.int64), column_slot.to(tl.int64)
    charged = row_there[:, None] & (column_class < K)[None, :]
    forward = tl.load(rates + row_at[:, None] * K + column_class[None, :], mask=charged, other=0)
    read = column_there[:, None] & row_there[None, :]
    backward = tl.trans(tl.load(rates + column_at[:, None] * K + row_class[None, :], mask=read, other=0))
    value, by_forward = pair_penalty(forward, backward, number(eps, REAL), DAMPED)

    same = row_class[:, None] == column_class[None, :]
    if IGNORE_ABSENT:
        charged = charged & column_there[None, :]
    once = charged & ((row_class[:, None] < column_class[None, :]) | (column_there == 0)[None, :])
    value = tl.where(same & charged, forward, tl.where(once, value, 0.0))  # there forward is 0, or NaN to be kept
    tl.store(penalties + tl.program_id(0).to(tl.int64), tl.sum(tl.sum(value.to(tl.float64), 1), 0))

    coefficient = tl.zeros((TILE, TILE), REAL)
    if WEIGHTED:
        scale = (number(sym_weight, tl.float64) / pairs_behind(counts, slots, K, MEAN, IGNORE_ABSENT)).to(REAL)
        by_sum = scale / tl.where(row_there, row_count, 1.0)
        coefficient = tl.where(charged & (same == 0), by_forward * by_sum[:, None], 0.0)
    at = (problem * slots + row_at[:, None]) * width + column[None, :]
    tl.store(coefficients + at, coefficient, mask=(row < slots)[:, None] & (column < width)[None, :])


def penalties(inputs: Inputs, terms: Terms, by_class: ClassOrder, sums: Sums, coefficients: Tensor | None) -> Tensor:
    """Partial sums ``[problems, squares]`` of the penalties in float64; writes the coefficients. One launch."""
    *_, batch, num_classes = inputs.logits.shape
    leading, slots = inputs.logits.shape[:-2].numel(), slot_count(batch, num_classes)
    real = accumulation_dtype(inputs.logits.dtype)
    ignore = terms.absent == "ignore"
    width = slots if ignore else num_classes
    tile = 32
    squares = cdiv(slots, tile) * cdiv(width, tile)
    if coefficients is None:
        coefficients = inputs.logits.new_empty((leading, slots, width), dtype=real)
    partial = inputs.logits.new_empty((leading, squares), dtype=torch.float64)
    sizes, strides = problems(inputs.labels, 1)
    launch(
        penalties_of_pairs,
        (leading * squares,),
        sums.rates, sums.counts, inputs.labels, by_class.order, by_class.starts, coefficients, partial,
        batch, num_classes, slots, width, inputs.labels.stride(-1), sizes, strides, terms.ignore_index,
        terms.eps, terms.sym_weight,
        num_warps=4, MEAN=terms.symmetry_mean, IGNORE_ABSENT=ignore,
        WEIGHTED=terms.sym_weight != 0,
        DAMPED=terms.eps > torch.finfo(real).tiny, DIRECT=is_direct(batch, num_classes),
        REAL=real_type(inputs.logits.dtype),
        TILE=tile,
    )  # fmt: skip
    return partial
