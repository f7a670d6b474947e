"""The gradient of class terms by the logits: programs hold a few rows each, whole or piece by piece."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schema import accumulation_dtype
from .class_blocks import (
    charge_of,
    exps_of,
    extended,
    finite_top,
    first_place,
    gates_of,
    hits_of,
    load_block,
    load_class_weights,
    load_weights,
    rivals_of,
    strongest,
)
from .class_order import class_starts
from .class_rates import is_direct, slot_count, tile_of
from .class_terms import Inputs, Terms, Upstream
from .common import divided, number, offset_of
from .launch import cdiv, last_stride, launch, problems, real_type


@triton.jit
def slopes_by_rate(
    z, columns, label, own, own_logit, slot, spec_slope, grad, coefficients, starts, v,
    K, width, grad_row_stride, grad_column_stride, margin,
    CONFUSION: tl.constexpr, SYMMETRY: tl.constexpr, SPECTRAL: tl.constexpr, SURROGATE: tl.constexpr,
    DIRECT: tl.constexpr, IGNORE_ABSENT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """The derivatives by the rates of each sample's class, at some columns."""
    is_class = columns < K
    slope = tl.zeros(z.shape, REAL)
    if CONFUSION:
        at = label[:, None] * grad_row_stride + columns[None, :].to(tl.int64) * grad_column_stride
        slope += tl.load(grad + at, mask=is_class[None, :], other=0).to(REAL)
    if SYMMETRY:
        if IGNORE_ABSENT and not DIRECT:
            column = tl.load(starts + columns, mask=is_class, other=0)
            there = is_class & (tl.load(starts + columns + 1, mask=is_class, other=0) > column)
        else:
            column, there = columns, is_class
        at = slot[:, None].to(tl.int64) * width + column[None, :]
        slope += tl.load(coefficients + at, mask=there[None, :], other=0)
    if SPECTRAL and (SURROGATE == "soft" or SURROGATE == "gated"):
        right = tl.load(v + columns, mask=is_class, other=0)
        by_charge = spec_slope[:, None] * right[None, :]
        if SURROGATE == "gated":
            by_charge = by_charge * gates_of(z, own_logit, margin)
        slope += tl.where(own | (is_class == 0)[None, :], 0.0, by_charge)
    return slope


@triton.jit(do_not_specialize=["B", "tiles", "slots", "width", "row_stride", "sizes", "strides", "label_sizes",
                               "label_strides", "sample_sizes", "sample_strides", "weight_sizes", "weight_strides",
                               "class_weight_sizes", "class_weight_strides", "grad_sizes", "grad_strides",
                               "ignore_index"])  # fmt: skip
def gradient_by_logits(
    logits, labels, sample_weight, weight, class_weight, starts, divisors, grad, coefficients, counts, u, v, out,
    B, K, tiles, slots, width, row_stride, column_stride, label_stride, sample_stride, weight_stride,
    class_weight_stride, grad_row_stride, grad_column_stride,
    sizes, strides, label_sizes, label_strides, sample_sizes, sample_strides, weight_sizes, weight_strides,
    class_weight_sizes, class_weight_strides, grad_sizes, grad_strides, ignore_index,
    temperature: tl.float64, label_smoothing: tl.float64, margin: tl.float64,
    ce_weight: tl.float64, spec_weight: tl.float64,
    CONFUSION: tl.constexpr, ENTROPY: tl.constexpr, SMOOTHING: tl.constexpr, MEAN: tl.constexpr,
    SYMMETRY: tl.constexpr, IGNORE_ABSENT: tl.constexpr, DIRECT: tl.constexpr, SPECTRAL: tl.constexpr,
    SURROGATE: tl.constexpr, ZERO_MARGIN: tl.constexpr, FOLD: tl.constexpr, HEATED: tl.constexpr,
    WIDE: tl.constexpr, REAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Bound by one read of the logits and one write of their gradient; an exponential an element, with some surrogates
    # two. A wide row's second and third reads, and those of the coefficients, find them in the cache.
    RATES: tl.constexpr = CONFUSION or SYMMETRY or (SPECTRAL and (SURROGATE == "soft" or SURROGATE == "gated"))
    TOWARDS: tl.constexpr = ENTROPY or (SPECTRAL and SURROGATE == "kl-all")
    RIVAL: tl.constexpr = SPECTRAL and SURROGATE == "kl"
    HITS: tl.constexpr = SPECTRAL and SURROGATE == "kl-all"

    problem = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    logits += offset_of(problem, sizes, strides)
    labels += offset_of(problem, label_sizes, label_strides)
    grad += offset_of(problem, grad_sizes, grad_strides)
    if sample_weight is not None:
        sample_weight += offset_of(problem, sample_sizes, sample_strides)
    if weight is not None:
        weight += offset_of(problem, weight_sizes, weight_strides)
    if starts is not None:
        starts += problem * (K + 1)
    if SYMMETRY:
        coefficients += problem * slots * width
    if SPECTRAL:
        u += problem * K
        v += problem * K

    given = tl.load(labels + row * label_stride, mask=row < B, other=ignore_index)
    kept = given != ignore_index
    label = tl.where(kept & (given >= 0) & (given < K), given, 0)
    unit = load_weights(labels, sample_weight, row, kept, label_stride, sample_stride, K, REAL)
    if CONFUSION:
        if counts is not None:
            unit = divided(unit, tl.load(counts + problem * K + label))
    else:
        unit = unit * tl.load(grad).to(REAL)
    heat = number(temperature, REAL)
    shift = number(margin, REAL)
    smoothing = number(label_smoothing, REAL)
    own_logit = tl.load(logits + row * row_stride + label * column_stride, mask=kept, other=0).to(REAL)
    if HEATED:
        own_logit = own_logit / heat

    slot = label
    if SYMMETRY and not DIRECT:
        slot = tl.load(starts + label)
    spec_slope = tl.zeros((ROWS,), REAL)
    if SPECTRAL:
        spec_slope = tl.load(u + label, mask=kept, other=0)
        if not FOLD:
            if SURROGATE == "kl-all":
                samples = tl.load(starts + K) + label * 0
            else:
                samples = tl.load(starts + label + 1) - tl.load(starts + label)
            spec_slope = spec_slope * (number(spec_weight, REAL) / tl.maximum(samples, 1).to(REAL))
            if class_weight is not None:
                class_weight += offset_of(problem, class_weight_sizes, class_weight_strides)
                spec_slope = spec_slope * tl.load(class_weight + label * class_weight_stride).to(REAL)
    towards, by_class = tl.zeros((ROWS,), REAL), tl.zeros((), REAL)
    if ENTROPY:
        by_class = number(ce_weight, REAL)
        if MEAN:
            if weight is None:
                by_class = by_class / tl.load(starts + K).to(REAL)
            else:
                by_class = by_class / tl.load(divisors + problem).to(REAL)
        towards += by_class
        if weight is not None:
            towards = towards * tl.load(weight + label * weight_stride).to(REAL)
        if SMOOTHING:
            towards = towards * (1 - smoothing)
            by_class = by_class * (smoothing / K)

    slope_at_top, mean = tl.zeros((ROWS,), REAL), tl.zeros((ROWS,), REAL)
    not_own, others, all_others = tl.zeros((ROWS,), REAL), tl.zeros((ROWS,), REAL), tl.zeros((ROWS,), REAL)
    highest, place = tl.zeros((ROWS,), REAL), tl.zeros((ROWS,), tl.int32)
    hit, all_weights = tl.zeros((ROWS,), REAL), tl.zeros((), REAL)
    if WIDE:
        top, total = tl.full((ROWS,), float("-inf"), REAL), tl.zeros((ROWS,), REAL)
        highest = tl.full((ROWS,), float("-inf"), REAL)
        for first in range(0, K, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            own = label[:, None] == columns[None, :]
            z = load_block(logits, row, kept, columns, K, row_stride, column_stride, heat, HEATED, REAL)
            if RATES:
                slope = slopes_by_rate(
                    z, columns, label, own, own_logit, slot, spec_slope, grad, coefficients, starts, v, K, width,
                    grad_row_stride,
                    grad_column_stride, shift, CONFUSION, SYMMETRY, SPECTRAL, SURROGATE, DIRECT, IGNORE_ABSENT, REAL,
                )  # fmt: skip
                here = tl.max(tl.where(z == tl.max(z, 1)[:, None], slope, float("-inf")), 1)
                slope_at_top = tl.where(tl.max(z, 1) > top, here, slope_at_top)
            top, total = extended(top, total, z)
            if RIVAL:
                rivals = rivals_of(z, own)
                place = tl.where(strongest(rivals) > highest, first_place(rivals, strongest(rivals), columns), place)
                highest, others = extended(highest, others, tl.where(rivals == rivals, rivals, float("inf")))
            if SMOOTHING:
                all_weights += tl.sum(load_class_weights(weight, columns, K, weight_stride, REAL) * (columns < K), 0)
        inverse = 1 / total
        own_rate = tl.exp(own_logit - finite_top(top)) * inverse
        for first in range(0, K, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            own = label[:, None] == columns[None, :]
            z = load_block(logits, row, kept, columns, K, row_stride, column_stride, heat, HEATED, REAL)
            rates = exps_of(z, top) * inverse[:, None]
            if RATES:
                slope = slopes_by_rate(
                    z, columns, label, own, own_logit, slot, spec_slope, grad, coefficients, starts, v, K, width,
                    grad_row_stride,
                    grad_column_stride, shift, CONFUSION, SYMMETRY, SPECTRAL, SURROGATE, DIRECT, IGNORE_ABSENT, REAL,
                )  # fmt: skip
                mean += tl.sum(rates * (slope - slope_at_top[:, None]), 1)
            if TOWARDS:
                not_own += tl.sum(tl.where(own, 0.0, rates), 1)
            if HITS:
                hits = hits_of(z, rates, own_logit, own_rate, own, columns, K, shift, ZERO_MARGIN)
                hit += tl.sum(tl.where(hits, tl.load(v + columns, mask=columns < K, other=0)[None, :], 0.0), 1)
    else:
        columns = tl.arange(0, BLOCK_K)
        own = label[:, None] == columns[None, :]
        z = load_block(logits, row, kept, columns, K, row_stride, column_stride, heat, HEATED, REAL)
        top = tl.max(z, 1)
        rates = exps_of(z, top)
        inverse = 1 / tl.sum(rates, 1)
        rates = rates * inverse[:, None]
        own_rate = tl.exp(own_logit - finite_top(top)) * inverse
        if RATES:
            slope = slopes_by_rate(
                z, columns, label, own, own_logit, slot, spec_slope, grad, coefficients, starts, v, K, width,
                grad_row_stride,
                grad_column_stride, shift, CONFUSION, SYMMETRY, SPECTRAL, SURROGATE, DIRECT, IGNORE_ABSENT, REAL,
            )  # fmt: skip
            slope_at_top = tl.max(tl.where(z == top[:, None], slope, float("-inf")), 1)
            mean = tl.sum(rates * (slope - slope_at_top[:, None]), 1)
        if TOWARDS:
            not_own = tl.sum(tl.where(own, 0.0, rates), 1)
        if HITS:
            hits = hits_of(z, rates, own_logit, own_rate, own, columns, K, shift, ZERO_MARGIN)
            hit = tl.sum(tl.where(hits, tl.load(v + columns, mask=columns < K, other=0)[None, :], 0.0), 1)
        if RIVAL:
            rivals = rivals_of(z, own)
            highest = strongest(rivals)
            place = first_place(rivals, highest, columns)
            others = tl.sum(exps_of(rivals, highest), 1)
        if SMOOTHING:
            all_weights = tl.sum(load_class_weights(weight, columns, K, weight_stride, REAL) * (columns < K), 0)

    # What a row's columns have in common.
    rate_scale = unit / heat
    common = unit * all_weights * by_class if SMOOTHING else unit * 0
    if HITS:
        towards += spec_slope * hit
    towards = towards * unit
    rival_slope = unit * 0
    if RIVAL:
        place, _, all_others = charge_of(own_logit, highest, others, place, shift)
        found = place >= 0
        rival_slope = unit * spec_slope * tl.load(v + place, mask=found & (place < K), other=0)
        others = tl.where(found, others / all_others, 0.0)
        all_others = tl.where(found, all_others, float("inf"))

    if WIDE:
        for first in range(0, K, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            own = label[:, None] == columns[None, :]
            z = load_block(logits, row, kept, columns, K, row_stride, column_stride, heat, HEATED, REAL)
            rates = exps_of(z, top) * inverse[:, None]
            slope = rates
            if RATES:
                slope = slopes_by_rate(
                    z, columns, label, own, own_logit, slot, spec_slope, grad, coefficients, starts, v, K, width,
                    grad_row_stride,
                    grad_column_stride, shift, CONFUSION, SYMMETRY, SPECTRAL, SURROGATE, DIRECT, IGNORE_ABSENT, REAL,
                )  # fmt: skip
            store_gradient(
                out + problem * B * K, z, rates, slope, own, row, kept, columns, label, B, K, rate_scale,
                slope_at_top, mean,
                towards, not_own, common, by_class, unit, weight, weight_stride, rival_slope, highest, others,
                all_others,
                RATES, TOWARDS, SMOOTHING, RIVAL, REAL,
            )  # fmt: skip
    else:
        if not RATES:
            slope = rates
        store_gradient(
            out + problem * B * K, z, rates, slope, own, row, kept, columns, label, B, K, rate_scale, slope_at_top,
            mean,
            towards, not_own, common, by_class, unit, weight, weight_stride, rival_slope, highest, others, all_others,
            RATES, TOWARDS, SMOOTHING, RIVAL, REAL,
        )  # fmt: skip


@triton.jit
def store_gradient(
    out, z, rates, slope, own, row, kept, columns, label, B, K, rate_scale, slope_at_top, mean,
    towards, not_own, common, by_class, unit, weight, weight_stride, rival_slope, highest, others, all_others,
    RATES: tl.constexpr, TOWARDS: tl.constexpr, SMOOTHING: tl.constexpr, RIVAL: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """``p (scale (g - <p, g>) + common) + towards (p - e_y) - by_class w + rival (p' - e_y)``.

    Slopes are taken relative to the row's top class and 1 - p_y as the sum of the others: a sure row would lose both to
    rounding.
    """
    factor = tl.zeros(rates.shape, REAL)
    if RATES:
        factor += rate_scale[:, None] * ((slope - slope_at_top[:, None]) - mean[:, None])
    if SMOOTHING:
        factor += common[:, None]
    gradient = rates * factor
    if TOWARDS:
        gradient += towards[:, None] * tl.where(own, -not_own[:, None], rates)
    if SMOOTHING:
        gradient -= (unit * by_class)[:, None] * load_class_weights(weight, columns, K, weight_stride, REAL)[None, :]
    if RIVAL:
        shifted = exps_of(z, highest) / all_others[:, None]
        moved = tl.where(own, -others[:, None], shifted)
        gradient += tl.where((rival_slope == 0)[:, None], 0 * rates, rival_slope[:, None] * moved)
    at = row[:, None] * K + columns[None, :]
    gradient = tl.where(kept[:, None], gradient, 0.0)
    tl.store(out + at, gradient, mask=(row < B)[:, None] & (columns < K)[None, :])


@triton.jit
def mean_divisor(
    starts, weight, divisors, K, weight_stride, weight_sizes, weight_strides, REAL: tl.constexpr, BLOCK: tl.constexpr
):
    # Bound by latency: 12 bytes a class.
    problem = tl.program_id(0).to(tl.int64)
    starts += problem * (K + 1)
    weight += offset_of(problem, weight_sizes, weight_strides)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, K, BLOCK):
        label = first + tl.arange(0, BLOCK)
        samples = tl.load(starts + label + 1, mask=label < K, other=0) - tl.load(
            starts + label, mask=label < K, other=0
        )
        by_class = tl.load(weight + label.to(tl.int64) * weight_stride, mask=samples > 0, other=0).to(tl.float64)
        total += samples * by_class
    tl.store(divisors + problem, tl.sum(total, 0))


def divisors_of_rows(upstream: Upstream, terms: Terms) -> Tensor | None:
    """What the rows of a confusion matrix were divided by, ``[..., K]``, contiguous."""
    if upstream.counts is None or terms.normalize == "none":
        return None
    counts = upstream.counts
    return counts if terms.normalize == "true" else counts.sum(-1, keepdim=True).expand(counts.shape).contiguous()


def gradient(inputs: Inputs, terms: Terms, upstream: Upstream) -> Tensor:
    logits, labels = inputs.logits, inputs.labels
    *_, batch, num_classes = logits.shape
    leading = logits.shape[:-2].numel()
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if out.numel() == 0:
        return out
    confusion = upstream.counts is not None
    entropy = terms.ce_weight != 0 and not confusion
    symmetry = terms.sym_weight != 0 and upstream.coefficients is not None
    spectral = terms.spec_weight != 0 and upstream.u is not None
    direct = is_direct(batch, num_classes)
    mean = entropy and terms.entropy_mean

    starts = divisors = None
    if mean or (symmetry and not direct) or (spectral and not terms.fold):
        starts = class_starts(labels, num_classes, terms.ignore_index).starts
    weight_sizes, weight_strides = problems(inputs.weight, 1)
    if mean and inputs.weight is not None:
        divisors = logits.new_empty(leading, dtype=torch.float64)
        launch(
            mean_divisor, (leading,),
            starts, inputs.weight, divisors, num_classes, inputs.weight.stride(-1), weight_sizes, weight_strides,
            num_warps=4, REAL=real_type(logits.dtype), BLOCK=1024,
        )  # fmt: skip

    tile = tile_of(num_classes, accumulation_dtype(logits.dtype))
    tiles = cdiv(batch, tile.rows)
    slots = slot_count(batch, num_classes)
    sizes, strides = problems(logits, 2)
    label_sizes, label_strides = problems(labels, 1)
    sample_sizes, sample_strides = problems(inputs.sample_weight, 1)
    class_weight_sizes, class_weight_strides = problems(inputs.class_weight, 1)
    grad_sizes, grad_strides = problems(upstream.grad, 2 if confusion else 0)
    launch(
        gradient_by_logits,
        (leading * tiles,),
        logits, labels, inputs.sample_weight, inputs.weight, inputs.class_weight, starts, divisors, upstream.grad,
        upstream.coefficients if symmetry else None, divisors_of_rows(upstream, terms),
        upstream.u if spectral else None, upstream.v if spectral else None, out,
        batch, num_classes, tiles, slots, slots if terms.absent == "ignore" else num_classes,
        *logits.stride()[-2:], labels.stride(-1), last_stride(inputs.sample_weight), last_stride(inputs.weight),
        last_stride(inputs.class_weight), *(upstream.grad.stride()[-2:] if confusion else (0, 0)),
        sizes, strides, label_sizes, label_strides, sample_sizes, sample_strides, weight_sizes, weight_strides,
        class_weight_sizes, class_weight_strides, grad_sizes, grad_strides, terms.ignore_index,
        terms.temperature, terms.label_smoothing, terms.margin, terms.ce_weight, terms.spec_weight,
        **tile.options, CONFUSION=confusion, ENTROPY=entropy, SMOOTHING=entropy and terms.label_smoothing != 0,
        MEAN=mean, SYMMETRY=symmetry, IGNORE_ABSENT=terms.absent == "ignore", DIRECT=direct, SPECTRAL=spectral,
        SURROGATE=terms.surrogate, ZERO_MARGIN=terms.margin == 0, FOLD=terms.fold, HEATED=terms.temperature != 1,
        WIDE=tile.wide, REAL=real_type(logits.dtype), ROWS=tile.rows, BLOCK_K=tile.columns,
    )  # fmt: skip
    return out
