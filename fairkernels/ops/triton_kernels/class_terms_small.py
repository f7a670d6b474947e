"""Class terms where a matrix of all pairs of classes fits one program, see ``class_terms.fits_one_program``.

Forward, few samples: one launch, a program for each problem, which reads the logits once and keeps all else on chip.
Many samples: one launch whose programs add up a stretch each, one that adds the stretches, one that makes the terms.
Backward: one launch, one read of the logits and one write of their gradient. Where samples are many and their number by
class is needed, one more that reads the labels.

Of a logit these are 4 bytes forward and 8 backward (float64 8 and 16, half 2 and 4), of a sample 16 each way, its label
twice; backward also, from the cache, a row of derivatives of its class and all labels for every tile of rows that needs
the number of samples by class.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schema import accumulation_dtype
from .class_rows import (
    cross_entropy_gradient,
    cross_entropy_rows,
    load_samples,
    softmax_rows,
    surrogate_gradient,
    surrogate_rows,
    through_softmax,
)
from .class_terms import Inputs, Results, Terms, Upstream
from .common import divided, number, offset_of
from .launch import AS_WRITTEN, cdiv, last_stride, launch, power_of_2, problems, real_type
from .pair_penalty import pair_penalty
from .spectral_tile import default_steering, leading_pair_tile, start_tile

FEW = 1024  # samples that one program reads by itself, and whose labels every program of the backward reads
MOST_STRETCHES = 128

# --- classes and their places ----------------------------------------------------------------------------------------


@triton.jit
def count_classes(labels, begin, end, K, label_stride, ignore_index, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    """How many of samples [begin, end) each class has; a label that is no class counts for none."""
    columns = tl.arange(0, BLOCK_K)
    counts = tl.zeros((BLOCK_K,), tl.int32)
    for first in range(begin, end, BLOCK_B):
        row = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
        inside = row < end
        label = tl.load(labels + row * label_stride, mask=inside, other=0)
        kept = inside & (label != ignore_index)
        counts += tl.sum(((label[:, None] == columns[None, :]) & kept[:, None]).to(tl.int32), 0)
    return tl.where(columns < K, counts, 0)


@triton.jit
def slots_of(seen, COMPACT: tl.constexpr, BLOCK_K: tl.constexpr):
    """The row of each class in the coefficients, and how many there are: those that a sample has, whatever its weight,
    in a row where all would not fit, else every class its own."""
    if COMPACT:
        return tl.cumsum(seen.to(tl.int32), 0) - 1, tl.sum(seen.to(tl.int32), 0)
    return tl.arange(0, BLOCK_K), BLOCK_K


# --- forward ------------------------------------------------------------------------------------------------------


@triton.jit
def add_classes(
    logits, labels, sample_weight, weight, begin, end, K, row_stride, column_stride, label_stride, sample_weight_stride,
    weight_stride, ignore_index, temperature, label_smoothing, margin,
    ENTROPY: tl.constexpr, SMOOTHED: tl.constexpr, CHARGES: tl.constexpr, SURROGATE: tl.constexpr,
    ZERO_MARGIN: tl.constexpr, HEATED: tl.constexpr, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums by class over samples [begin, end): of weighted rates, of the surrogate's rows, of weights; NaN for classes
    with a row that is not finite (a product with zeros would spread it); losses, their divisor, number of samples."""
    columns = tl.arange(0, BLOCK_K)
    mass = tl.zeros((BLOCK_K, BLOCK_K), ACC)
    charges = tl.zeros((BLOCK_K, BLOCK_K), ACC)
    counts = tl.zeros((BLOCK_K,), ACC)
    spoiled = tl.zeros((BLOCK_K,), ACC)
    losses = tl.zeros((BLOCK_B,), ACC)
    divisor = tl.zeros((BLOCK_B,), ACC)
    samples = tl.zeros((BLOCK_B,), ACC)
    class_weight = tl.full((BLOCK_K,), 1.0, ACC)
    if weight is not None:
        class_weight = tl.load(weight + columns.to(tl.int64) * weight_stride, mask=columns < K, other=0).to(ACC)

    for first in range(begin, end, BLOCK_B):
        row = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
        _, kept, row_weight, own, z = load_samples(
            logits, labels, sample_weight, row, row < end, columns, K, row_stride, column_stride, label_stride,
            sample_weight_stride, ignore_index, temperature, HEATED, ACC,
        )  # fmt: skip
        exps, total, lse = softmax_rows(z)

        factor = row_weight / tl.where(total > 0, total, float("nan"))  # 0 where all logits are -inf
        finite = factor == factor
        rates = tl.where(finite[:, None], exps * factor[:, None], 0.0)
        by_class = tl.trans(own.to(ACC))
        mass = tl.dot(by_class, rates, mass, input_precision="ieee", out_dtype=ACC)
        counts += tl.sum(tl.where(own, row_weight[:, None], 0.0), 0)
        spoiled += tl.sum(tl.where(own & ~finite[:, None], factor[:, None], 0.0), 0)
        samples += kept.to(ACC)

        if ENTROPY:
            loss, own_weight = cross_entropy_rows(z, lse, own, class_weight, columns, K, label_smoothing, SMOOTHED)
            losses += tl.where(kept, loss * tl.where(finite, 1.0, factor), 0.0)
            divisor += tl.where(kept, own_weight, 0.0)
        if CHARGES:
            charge = surrogate_rows(z, exps, total, lse, own, columns, K, margin, SURROGATE, ZERO_MARGIN)
            usable = tl.where(kept & finite, 1.0, 0.0) > 0
            charge = tl.where(usable[:, None], charge, 0.0)
            charges = tl.dot(by_class, charge, charges, input_precision="ieee", out_dtype=ACC)
    return mass, charges, counts, spoiled, tl.sum(losses, 0), tl.sum(divisor, 0), tl.sum(samples, 0)


@triton.jit
def symmetry_terms(rates, present, K, eps, IGNORE_ABSENT: tl.constexpr, MEAN: tl.constexpr, DAMPED: tl.constexpr):
    """The symmetry gap of the rates and its derivative by each of them."""
    columns = tl.arange(0, rates.shape[0])
    value, by_rate = pair_penalty(rates, tl.trans(rates), eps, DAMPED)
    compared = columns < K
    if IGNORE_ABSENT:
        compared = present
    active = compared[:, None] & compared[None, :]
    upper = active & (columns[:, None] < columns[None, :])
    gap = tl.sum(tl.sum(tl.where(upper, value, 0.0), 1), 0)
    by_rate = tl.where(active & (columns[:, None] != columns[None, :]), by_rate, 0.0)
    if MEAN:
        pairs = tl.maximum(tl.sum(tl.sum(upper.to(rates.dtype), 1), 0), 1.0)
        return gap / pairs, by_rate / pairs
    return gap, by_rate


@triton.jit
def store_coefficients(
    coefficients, by_rate, counts, seen, rows, width, COMPACT: tl.constexpr, IGNORE_ABSENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Derivatives by the sums of each class, at the places that the backward looks up; zeros where it does not."""
    columns = tl.arange(0, BLOCK_K)
    slot, used = slots_of(seen, COMPACT, BLOCK_K)
    row = slot
    column = columns
    column_used = width
    if COMPACT and IGNORE_ABSENT:
        column = slot
        column_used = used
    by_sum = divided(by_rate, counts[:, None])
    holds = (row < rows)[:, None] & (column < width)[None, :]
    if COMPACT:
        holds = holds & seen[:, None]
        if IGNORE_ABSENT:
            holds = holds & seen[None, :]
        rest = (columns < rows)[:, None] & (columns < width)[None, :]
        rest = rest & ((columns >= used)[:, None] | (columns >= column_used)[None, :])
        tl.store(coefficients + columns[:, None] * width + columns[None, :], by_sum * 0, mask=rest)
    tl.store(coefficients + row[:, None] * width + column[None, :], by_sum, mask=holds)


@triton.jit
def store_terms(
    mass, charges, counts, seen, spoiled, losses, divisor, samples, problem, class_weight, start,
    total_out, entropy_out, symmetry_out, spectral_out, confusion_out, counts_out, coefficients_out, u_out, v_out,
    K, rows, width, class_weight_stride, start_stride,
    ce_weight, sym_weight, spec_weight, eps, tol, noise, iters,
    NORMALIZE: tl.constexpr, ENTROPY: tl.constexpr, ENTROPY_MEAN: tl.constexpr, SYMMETRY: tl.constexpr,
    SYMMETRY_MEAN: tl.constexpr, IGNORE_ABSENT: tl.constexpr, DAMPED: tl.constexpr, SPECTRAL: tl.constexpr,
    SURROGATE: tl.constexpr, LOCG: tl.constexpr, FOLD: tl.constexpr, COMPACT: tl.constexpr,
    CE_COUNTS: tl.constexpr, SYM_COUNTS: tl.constexpr, SPEC_COUNTS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The terms of one problem from its sums by class. A term counts in the total unless its weight is 0."""
    columns = tl.arange(0, BLOCK_K)
    is_class = columns < K
    square = is_class[:, None] & is_class[None, :]
    present = (counts != 0) & is_class
    mass = tl.where(square, mass + spoiled[:, None], 0.0)
    rates = divided(mass, counts[:, None])
    total = number(0.0, ACC)
    entropy, gap, sigma = total, total, total  # zero where they are not wanted

    if counts_out is not None:
        tl.store(counts_out + problem * K + columns, counts, mask=is_class)
    if confusion_out is not None:
        handed = rates
        if NORMALIZE == "none":
            handed = mass
        if NORMALIZE == "all":
            handed = divided(mass, tl.sum(counts, 0))
        at = problem * K * K + columns[:, None] * K + columns[None, :]
        tl.store(confusion_out + at, handed, mask=square)

    if ENTROPY:
        entropy = losses
        if ENTROPY_MEAN:
            entropy = losses / divisor
        if CE_COUNTS:
            total += ce_weight * entropy
    if SYMMETRY:
        gap, by_rate = symmetry_terms(rates, present, K, eps, IGNORE_ABSENT, SYMMETRY_MEAN, DAMPED)
        gap += 0 * tl.sum(tl.sum(rates, 1), 0)  # also a NaN whose class has no partner
        if SYM_COUNTS:
            total += sym_weight * gap
            by_rate = by_rate * sym_weight
        if coefficients_out is not None:
            store_coefficients(
                coefficients_out + problem * rows * width, by_rate, counts, seen, rows, width,
                COMPACT, IGNORE_ABSENT, BLOCK_K,
            )  # fmt: skip
    if SPECTRAL:
        factor = divided(1.0, counts)
        if SURROGATE == "kl-all":
            factor = tl.where(is_class, divided(1.0, samples), 0.0)
        matrix = rates
        if SURROGATE != "soft":
            matrix = tl.where(square, charges * factor[:, None] + spoiled[:, None], 0.0)
        matrix = tl.where(columns[:, None] == columns[None, :], matrix * 0, matrix)
        if class_weight is not None:
            at = class_weight + columns.to(tl.int64) * class_weight_stride
            matrix = matrix * tl.load(at, mask=is_class & (counts > 0), other=0).to(ACC)[:, None]
        hint = tl.zeros((BLOCK_K,), tl.float64)
        if start is not None:
            hint = tl.load(start + columns.to(tl.int64) * start_stride, mask=is_class, other=0).to(tl.float64)
        sigma, u, v = leading_pair_tile(matrix, start_tile(matrix, hint, K), iters, tol, noise, LOCG)
        sigma = sigma.to(ACC) + 0 * tl.sum(spoiled, 0)
        u = u.to(ACC)
        if SPEC_COUNTS:
            total += spec_weight * sigma
        if FOLD:
            u = u * factor * spec_weight
        tl.store(u_out + problem * K + columns, u, mask=is_class)
        tl.store(v_out + problem * K + columns, v.to(ACC), mask=is_class)
    elif u_out is not None:
        nothing = tl.zeros((BLOCK_K,), ACC)
        tl.store(u_out + problem * K + columns, nothing, mask=is_class)
        tl.store(v_out + problem * K + columns, nothing, mask=is_class)
    if entropy_out is not None:
        tl.store(entropy_out + problem, entropy)
        tl.store(symmetry_out + problem, gap)
        tl.store(spectral_out + problem, sigma)
    if total_out is not None:
        tl.store(total_out + problem, total)


# Sums of one problem in a row of a workspace: matrices, vectors, scalars.


@triton.jit
def store_sums(
    sums, mass, charges, counts, spoiled, losses, divisor, samples, CHARGES: tl.constexpr, BLOCK_K: tl.constexpr
):
    columns = tl.arange(0, BLOCK_K)
    square = columns[:, None] * BLOCK_K + columns[None, :]
    tl.store(sums, losses)
    tl.store(sums + 1, divisor)
    tl.store(sums + 2, samples)
    tl.store(sums + 3 + columns, counts)
    tl.store(sums + 3 + BLOCK_K + columns, spoiled)
    tl.store(sums + 3 + 2 * BLOCK_K + square, mass)
    if CHARGES:
        tl.store(sums + 3 + 2 * BLOCK_K + BLOCK_K * BLOCK_K + square, charges)


@triton.jit
def load_sums(sums, CHARGES: tl.constexpr, BLOCK_K: tl.constexpr):
    columns = tl.arange(0, BLOCK_K)
    square = columns[:, None] * BLOCK_K + columns[None, :]
    mass = tl.load(sums + 3 + 2 * BLOCK_K + square)
    charges = mass
    if CHARGES:
        charges = tl.load(sums + 3 + 2 * BLOCK_K + BLOCK_K * BLOCK_K + square)
    counts, spoiled = tl.load(sums + 3 + columns), tl.load(sums + 3 + BLOCK_K + columns)
    return mass, charges, counts, spoiled, tl.load(sums), tl.load(sums + 1), tl.load(sums + 2)


@triton.jit(do_not_specialize=["B", "stretch", "ignore_index", "iters", "rows", "width", "leading"])
def class_terms(
    logits, labels, sample_weight, weight, class_weight, start, sums_out, sums_in,
    total_out, entropy_out, symmetry_out, spectral_out, confusion_out, counts_out, coefficients_out, u_out, v_out,
    leading, B, stretch, K, row_stride, column_stride, label_stride, sample_weight_stride, weight_stride,
    class_weight_stride, start_stride, ignore_index, iters, rows, width,
    temperature: tl.float64, label_smoothing: tl.float64, margin: tl.float64, eps: tl.float64,
    ce_weight: tl.float64, sym_weight: tl.float64, spec_weight: tl.float64, tol: tl.float64, noise: tl.float64,
    NORMALIZE: tl.constexpr, ENTROPY: tl.constexpr, ENTROPY_MEAN: tl.constexpr, SMOOTHED: tl.constexpr,
    SYMMETRY: tl.constexpr, SYMMETRY_MEAN: tl.constexpr, IGNORE_ABSENT: tl.constexpr, DAMPED: tl.constexpr,
    SPECTRAL: tl.constexpr, SURROGATE: tl.constexpr, LOCG: tl.constexpr, FOLD: tl.constexpr, COMPACT: tl.constexpr,
    CE_COUNTS: tl.constexpr, SYM_COUNTS: tl.constexpr, SPEC_COUNTS: tl.constexpr, ZERO_MARGIN: tl.constexpr,
    HEATED: tl.constexpr, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Grid (problems, stretches of samples). Memory bound where samples are many: each logit is read once, 4 bytes, and
    # takes an exp and BLOCK_K multiply-adds of the product with the one-hot labels. All else stays on chip.
    # Without `sums_out` the program goes on to the terms; with `sums_in` it begins with them.
    problem = tl.program_id(0).to(tl.int64)
    CHARGES: tl.constexpr = SPECTRAL and SURROGATE != "soft"
    WIDTH: tl.constexpr = 3 + 2 * BLOCK_K + (2 if CHARGES else 1) * BLOCK_K * BLOCK_K
    (sizes, strides, label_sizes, label_strides, sample_sizes, sample_strides, weight_sizes, weight_strides,
     class_sizes, class_strides, start_sizes, start_strides) = leading  # fmt: skip
    if sample_weight is not None:
        sample_weight += offset_of(problem, sample_sizes, sample_strides)
    if weight is not None:
        weight += offset_of(problem, weight_sizes, weight_strides)
    if class_weight is not None:
        class_weight += offset_of(problem, class_sizes, class_strides)
    if start is not None:
        start += offset_of(problem, start_sizes, start_strides)
    if sums_in is None:
        begin = tl.program_id(1).to(tl.int64) * stretch
        labels += offset_of(problem, label_sizes, label_strides)
        mass, charges, counts, spoiled, losses, divisor, samples = add_classes(
            logits + offset_of(problem, sizes, strides), labels,
            sample_weight, weight, begin, tl.minimum(begin + stretch, B), K, row_stride, column_stride, label_stride,
            sample_weight_stride, weight_stride, ignore_index, number(temperature, ACC), number(label_smoothing, ACC),
            number(margin, ACC), ENTROPY, SMOOTHED, CHARGES, SURROGATE, ZERO_MARGIN, HEATED, ACC, BLOCK_B, BLOCK_K,
        )  # fmt: skip
    else:
        mass, charges, counts, spoiled, losses, divisor, samples = load_sums(
            sums_in + problem * WIDTH, CHARGES, BLOCK_K
        )
    if sums_out is not None:
        at = sums_out + (problem * tl.num_programs(1) + tl.program_id(1)) * WIDTH
        store_sums(at, mass, charges, counts, spoiled, losses, divisor, samples, CHARGES, BLOCK_K)
    else:
        seen = counts > 0
        if COMPACT:
            seen = count_classes(labels, 0, B, K, label_stride, ignore_index, BLOCK_B, BLOCK_K) > 0
        store_terms(
            mass, charges, counts, seen, spoiled, losses, divisor, samples, problem, class_weight, start,
            total_out, entropy_out, symmetry_out, spectral_out, confusion_out, counts_out, coefficients_out,
            u_out, v_out, K, rows, width, class_weight_stride, start_stride, number(ce_weight, ACC),
            number(sym_weight, ACC), number(spec_weight, ACC), number(eps, ACC), tol, noise, iters,
            NORMALIZE, ENTROPY, ENTROPY_MEAN, SYMMETRY, SYMMETRY_MEAN, IGNORE_ABSENT, DAMPED, SPECTRAL, SURROGATE, LOCG,
            FOLD, COMPACT, CE_COUNTS, SYM_COUNTS, SPEC_COUNTS, ACC, BLOCK_K,
        )  # fmt: skip


def forward_small(inputs: Inputs, terms: Terms, results: Results) -> None:
    """Fills the results.

    Up to 1,024 samples: 1 launch. More: 3 (stretches, their sum, terms). The logits are read once; all else is as large
    as the labels or as the result, or the sums of up to 128 stretches, K² numbers each.
    """
    logits = inputs.logits
    batch = logits.shape[-2]
    charges = terms.spectral and terms.surrogate != "soft"
    shape = blocks(logits, charges or (terms.spectral and logits.itemsize == 2))
    width = 3 + 2 * shape["BLOCK_K"] + (2 if charges else 1) * shape["BLOCK_K"] ** 2
    problem_count = logits.shape[:-2].numel()
    arguments = forward_arguments(inputs, terms, results)
    ending = shape | (AS_WRITTEN if terms.spectral else {})  # it iterates

    stretch = batch if batch <= FEW else max(cdiv(batch, MOST_STRETCHES), FEW // 4)
    stretches = max(cdiv(batch, max(stretch, 1)), 1)
    if stretches == 1:
        launch(class_terms, (problem_count, 1), *arguments(None, None, stretch), **ending)
        return
    sums = logits.new_empty((problem_count, stretches, width), dtype=accumulation_dtype(logits.dtype))
    launch(class_terms, (problem_count, stretches), *arguments(sums, None, stretch), **shape)
    launch(class_terms, (problem_count, 1), *arguments(None, sums.sum(1), stretch), **ending)


def blocks(logits: Tensor, crowded: bool) -> dict[str, Any]:
    """Sizes of the tiles, and with how many warps they are worked on.

    Two sums, rows of 16 bits beside an iteration, and float64 leave less room.
    """
    numbers = 1024 >> (crowded + (logits.dtype == torch.float64))
    columns = power_of_2(logits.shape[-1], 16)
    return {
        "ACC": real_type(logits.dtype),
        "BLOCK_B": max(numbers // columns, 16),
        "BLOCK_K": columns,
        "num_warps": 8,
    }


def forward_arguments(inputs: Inputs, terms: Terms, results: Results) -> Any:
    """The positional arguments of ``class_terms`` but for the sums and the length of a stretch."""
    logits, labels = inputs.logits, inputs.labels
    batch, classes = logits.shape[-2:]
    rows = min(batch, classes)
    iters, tol, noise, locg = default_steering("locg" if terms.locg else "power", terms.iters, terms.tol, logits.dtype)
    tensors = (logits, labels, inputs.sample_weight, inputs.weight, inputs.class_weight, inputs.start)
    outputs = (
        results.total,
        results.entropy,
        results.symmetry,
        results.spectral,
        results.confusion,
        results.counts,
        results.coefficients,
        results.u,
        results.v,
    )
    leading = tuple(part for place, t in enumerate(tensors) for part in problems(t, 2 if place == 0 else 1))
    flags = (
        terms.normalize,
        terms.entropy,
        terms.entropy_mean,
        terms.label_smoothing > 0,
        terms.symmetry,
        terms.symmetry_mean,
        terms.absent == "ignore",
        terms.eps > torch.finfo(accumulation_dtype(logits.dtype)).tiny,
        terms.spectral,
        terms.surrogate,
        locg,
        terms.fold,
        batch < classes,
        terms.ce_weight != 0,
        terms.sym_weight != 0,
        terms.spec_weight != 0,
        terms.margin == 0,
        terms.temperature != 1,
    )

    def arguments(sums_out: Tensor | None, sums_in: Tensor | None, stretch: int) -> tuple[Any, ...]:
        return (
            *tensors, sums_out, sums_in, *outputs,
            leading, batch, stretch, classes, *logits.stride()[-2:], *map(last_stride, tensors[1:]),
            terms.ignore_index, iters, rows, rows if terms.absent == "ignore" else classes,
            terms.temperature, terms.label_smoothing, terms.margin, terms.eps,
            terms.ce_weight, terms.sym_weight, terms.spec_weight, tol, noise,
            *flags,
        )  # fmt: skip

    return arguments


# --- backward -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "stretch", "ignore_index", "label_sizes", "label_strides"])
def class_counts(
    labels, counts_out, label_sizes, label_strides, B, stretch, K, label_stride, ignore_index,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Grid (problems, stretches). Memory bound: 8 bytes a sample.
    problem = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * stretch
    labels += offset_of(problem, label_sizes, label_strides)
    counts = count_classes(
        labels, begin, tl.minimum(begin + stretch, B), K, label_stride, ignore_index, BLOCK_B, BLOCK_K
    )
    at = counts_out + (problem * tl.num_programs(1) + tl.program_id(1)) * BLOCK_K
    tl.store(at + tl.arange(0, BLOCK_K), counts)


@triton.jit(do_not_specialize=["B", "stretches", "ignore_index", "rows", "width", "leading"])
def class_terms_gradient(
    logits, labels, sample_weight, weight, class_weight, grad, coefficients, mass_counts, stretch_counts, u, v, out,
    leading, B, stretches, K, row_stride, column_stride, label_stride, sample_weight_stride, weight_stride,
    class_weight_stride, grad_row_stride, grad_column_stride, ignore_index, rows, width,
    temperature: tl.float64, label_smoothing: tl.float64, margin: tl.float64, ce_weight: tl.float64,
    NORMALIZE: tl.constexpr, CONFUSION: tl.constexpr, ENTROPY: tl.constexpr, ENTROPY_MEAN: tl.constexpr,
    SMOOTHED: tl.constexpr, SYMMETRY: tl.constexpr, IGNORE_ABSENT: tl.constexpr, SPECTRAL: tl.constexpr,
    SURROGATE: tl.constexpr, FOLD: tl.constexpr, COMPACT: tl.constexpr, COUNTS: tl.constexpr,
    ZERO_MARGIN: tl.constexpr, HEATED: tl.constexpr, ACC: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    # Memory bound: one read of the logits and one write of their gradient, an exp each. A program has a tile of rows.
    tiles = tl.cdiv(B, BLOCK_B)
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    is_class = columns < K
    (sizes, strides, label_sizes, label_strides, sample_sizes, sample_strides, weight_sizes, weight_strides,
     class_sizes, class_strides, grad_sizes, grad_strides) = leading  # fmt: skip
    logits += offset_of(problem, sizes, strides)
    labels += offset_of(problem, label_sizes, label_strides)
    grad += offset_of(problem, grad_sizes, grad_strides)

    counts = tl.zeros((BLOCK_K,), tl.int32)
    if COUNTS:
        if stretch_counts is None:
            counts = count_classes(labels, 0, B, K, label_stride, ignore_index, BLOCK_L, BLOCK_K)
        else:
            for stretch in range(stretches):
                counts += tl.load(stretch_counts + (problem * stretches + stretch) * BLOCK_K + columns)
    slot, _ = slots_of(counts > 0, COMPACT, BLOCK_K)
    class_weights = tl.where(is_class, 1.0, 0.0).to(ACC)
    if weight is not None:
        weight += offset_of(problem, weight_sizes, weight_strides)
        class_weights = tl.load(weight + columns.to(tl.int64) * weight_stride, mask=is_class, other=0).to(ACC)
    if sample_weight is not None:
        sample_weight += offset_of(problem, sample_sizes, sample_strides)

    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    label, kept, row_weight, own, z = load_samples(
        logits, labels, sample_weight, row, row < B, columns, K, row_stride, column_stride, label_stride,
        sample_weight_stride, ignore_index, number(temperature, ACC), HEATED, ACC,
    )  # fmt: skip
    exps, total, _ = softmax_rows(z)
    factor = row_weight / number(temperature, ACC)

    if CONFUSION:
        at = grad + label[:, None].to(tl.int64) * grad_row_stride + columns[None, :].to(tl.int64) * grad_column_stride
        towards = tl.load(at, mask=kept[:, None] & is_class[None, :], other=0).to(ACC)
        if NORMALIZE != "none":
            mass = tl.load(mass_counts + problem * K + columns, mask=is_class, other=0)
            whole = tl.sum(mass, 0)
            if NORMALIZE == "true":
                factor = divided(factor, tl.sum(tl.where(own, mass[None, :], 0.0), 1))
            else:
                factor = divided(factor, whole + 0 * factor)
        gradient = factor[:, None] * through_softmax(towards, exps, total, columns)
    else:
        upstream = tl.load(grad).to(ACC)
        gradient = tl.zeros((BLOCK_B, BLOCK_K), ACC)
        if SYMMETRY:
            own_slot = tl.sum(tl.where(own, slot[None, :], 0), 1)
            column = columns
            known = is_class
            if COMPACT and IGNORE_ABSENT:
                column = slot
                known = counts > 0
            coefficients += problem * rows * width
            at = own_slot[:, None].to(tl.int64) * width + column[None, :]
            towards = tl.load(coefficients + at, mask=(kept & (own_slot >= 0))[:, None] & known[None, :], other=0)
            gradient += (upstream * factor)[:, None] * through_softmax(towards, exps, total, columns)
        if SPECTRAL:
            row_factor = tl.load(u + problem * K + columns, mask=is_class, other=0)
            if not FOLD:
                if SURROGATE == "kl-all":
                    row_factor = divided(row_factor, tl.sum(counts, 0).to(ACC) + 0 * row_factor)
                else:
                    row_factor = divided(row_factor, counts.to(ACC))
                if class_weight is not None:
                    class_weight += offset_of(problem, class_sizes, class_strides)
                    at = class_weight + columns.to(tl.int64) * class_weight_stride
                    row_factor = row_factor * tl.load(at, mask=is_class, other=0).to(ACC)
            direction = tl.load(v + problem * K + columns, mask=is_class, other=0)
            by_row = surrogate_gradient(
                z, exps, total, own, direction, columns, K, number(margin, ACC), SURROGATE, ZERO_MARGIN
            )
            charged = tl.sum(tl.where(own, row_factor[None, :], 0.0), 1)
            gradient += (upstream * factor * charged)[:, None] * by_row
        if ENTROPY:
            share = upstream * number(ce_weight, ACC)
            if ENTROPY_MEAN:
                share = share / tl.sum(tl.where(counts > 0, counts.to(ACC) * class_weights, 0.0), 0)
            by_row = cross_entropy_gradient(
                exps, total, own, class_weights, columns, K, number(label_smoothing, ACC), SMOOTHED
            )
            gradient += (share * factor)[:, None] * by_row

    gradient = tl.where(kept[:, None], gradient, 0.0)
    at = (problem * B + row)[:, None] * K + columns[None, :]
    tl.store(out + at, gradient, mask=(row < B)[:, None] & is_class[None, :])


def backward_small(inputs: Inputs, terms: Terms, upstream: Upstream) -> Tensor:
    """The gradient by the logits: one read of them and one write.

    1 launch, 2 where more than 1,024 samples must be counted by class: for the mean of the cross-entropy, for
    spectral_loss, and for fewer samples than classes.
    """
    logits, labels = inputs.logits, inputs.labels
    batch, classes = logits.shape[-2:]
    shape = blocks(logits, False)
    problem_count = logits.shape[:-2].numel()
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows = min(batch, classes)
    entropy = terms.ce_weight != 0
    spectral = terms.spec_weight != 0
    symmetry = terms.sym_weight != 0
    compact = symmetry and batch < classes
    counts = compact or (entropy and terms.entropy_mean) or (spectral and not terms.fold)

    stretches, counted = 0, None
    if counts and batch > FEW:
        stretches = min(cdiv(batch, FEW), MOST_STRETCHES)
        counted = torch.empty((problem_count, stretches, shape["BLOCK_K"]), dtype=torch.int32, device=logits.device)
        launch(
            class_counts, (problem_count, stretches), labels, counted, *problems(labels, 1),
            batch, cdiv(batch, stretches), classes, labels.stride(-1), terms.ignore_index,
            BLOCK_B=64, BLOCK_K=shape["BLOCK_K"], num_warps=4,
        )  # fmt: skip

    grad = upstream.grad
    inner = 2 if upstream.of_confusion else 0
    tensors = (logits, labels, inputs.sample_weight, inputs.weight, inputs.class_weight)
    leading = tuple(part for place, t in enumerate(tensors) for part in problems(t, 2 if place == 0 else 1))
    launch(
        class_terms_gradient, (problem_count * cdiv(batch, shape["BLOCK_B"]),),
        *tensors, grad, upstream.coefficients, upstream.counts, counted, upstream.u, upstream.v, out,
        (*leading, *problems(grad, inner)), batch, stretches, classes, *logits.stride()[-2:],
        *map(last_stride, tensors[1:]), *(grad.stride()[-2:] if inner else (1, 1)),
        terms.ignore_index, rows, rows if terms.absent == "ignore" else classes,
        terms.temperature, terms.label_smoothing, terms.margin, terms.ce_weight,
        terms.normalize, upstream.of_confusion, entropy, terms.entropy_mean, terms.label_smoothing > 0,
        symmetry, terms.absent == "ignore", spectral, terms.surrogate, terms.fold, compact, counts,
        terms.margin == 0, terms.temperature != 1,
        **shape, BLOCK_L=64,
    )  # fmt: skip
    return out
