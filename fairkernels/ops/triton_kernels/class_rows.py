"""Tiles of whole rows of logits: their sums by class, and the gradient by them. Device functions."""

import triton
import triton.language as tl

from .class_blocks import (
    charge_of,
    exps_of,
    first_place,
    gates_of,
    hits_of,
    load_block,
    load_weights,
    log_sum,
    rivals_of,
    strongest,
)


@triton.jit
def load_samples(
    logits, labels, sample_weight, row, inside, columns, K, row_stride, column_stride, label_stride, weight_stride,
    ignore_index, temperature, HEATED: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Of some samples: which count, their weights (NaN where the label is no class), classes one-hot, scaled logits."""
    label = tl.load(labels + row * label_stride, mask=inside, other=0)
    kept = inside & (label != ignore_index)
    weight = load_weights(labels, sample_weight, row, kept, label_stride, weight_stride, K, REAL)
    label = tl.where(kept & (label >= 0) & (label < K), label, 0).to(tl.int32)
    own = (label[:, None] == columns[None, :]) & kept[:, None]
    z = load_block(logits, row, kept, columns, K, row_stride, column_stride, temperature, HEATED, REAL)
    return label, kept, weight, own, z


@triton.jit
def softmax_rows(z):
    """Exponentials of each row, their sum and the row's logarithm of the sum; NaN where a logit is NaN or +inf."""
    top = tl.max(z, 1)
    exps = exps_of(z, top)
    total = tl.sum(exps, 1)
    return exps, total, log_sum(top, total)


@triton.jit
def cross_entropy_rows(z, lse, own, class_weight, columns, K, label_smoothing, SMOOTHED: tl.constexpr):
    """Loss of each row as in ``F.cross_entropy``, and the weight of its class."""
    own_weight = own_of(class_weight[None, :], own)
    own_loss = lse - own_of(z, own)
    if SMOOTHED:
        spread = tl.where((columns < K)[None, :], class_weight[None, :] * (lse[:, None] - z), 0.0)
        return (1 - label_smoothing) * own_weight * own_loss + label_smoothing / K * tl.sum(spread, 1), own_weight
    return own_weight * own_loss, own_weight


@triton.jit
def own_of(values, own):
    return tl.sum(tl.where(own, values, 0.0), 1)


@triton.jit
def rival_of(z, own, columns, margin):
    """ "kl": where the charge of each row goes (-1: nowhere), the charge, and what its gradient is made of."""
    rivals = rivals_of(z, own)
    highest = strongest(rivals)
    others = tl.sum(exps_of(rivals, highest), 1)
    place, charge, total = charge_of(own_of(z, own), highest, others, first_place(rivals, highest, columns), margin)
    return place, charge, highest, others, total


@triton.jit
def surrogate_rows(z, exps, total, lse, own, columns, K, margin, SURROGATE: tl.constexpr, ZERO_MARGIN: tl.constexpr):
    """What each sample adds to the row of its class in the surrogate's matrix, zero at its own class."""
    rates = exps / total[:, None]
    own_logit = own_of(z, own)
    if SURROGATE == "gated":
        return tl.where(own, 0.0, gates_of(z, own_logit, margin) * rates)
    if SURROGATE == "kl-all":
        hits = hits_of(z, rates, own_logit, own_of(rates, own), own, columns, K, margin, ZERO_MARGIN)
        return tl.where(hits, (lse - own_logit)[:, None], 0.0)
    place, charge, _, _, _ = rival_of(z, own, columns, margin)
    return tl.where((columns[None, :] == place[:, None]) & (own == 0), charge[:, None], 0.0)


@triton.jit
def through_softmax(h, exps, total, columns):
    """``p (h - <h, p>)``, h relative to the row's top class: else a sure row loses its gradient to rounding."""
    top = tl.argmax(exps, 1)
    at_top = columns[None, :] == top[:, None]
    relative = h - tl.sum(tl.where(at_top, h, 0.0), 1)[:, None]
    rates = exps / total[:, None]
    return rates * (relative - tl.sum(relative * rates, 1)[:, None])


@triton.jit
def rates_minus_own(exps, total, own):
    """``p - e_y``; at the own class minus the sum of the others, which does not cancel in a sure row."""
    rates = exps / total[:, None]
    others = tl.sum(tl.where(own, 0.0, exps), 1) / total
    return tl.where(own, -others[:, None], rates)


@triton.jit
def cross_entropy_gradient(exps, total, own, class_weight, columns, K, label_smoothing, SMOOTHED: tl.constexpr):
    """Of each row's loss by its logits, as in ``F.cross_entropy``."""
    own_weight = own_of(class_weight[None, :], own)
    towards = (1 - label_smoothing) * own_weight[:, None] * rates_minus_own(exps, total, own)
    if SMOOTHED:
        weight = tl.where(columns < K, class_weight, 0.0)
        spread = tl.sum(weight, 0) * exps / total[:, None] - weight[None, :]
        towards += label_smoothing / K * spread
    return towards


@triton.jit
def surrogate_gradient(z, exps, total, own, v, columns, K, margin, SURROGATE: tl.constexpr, ZERO_MARGIN: tl.constexpr):
    """Of ``<surrogate row, v>`` by each row's logits."""
    own_logit = own_of(z, own)
    if SURROGATE == "soft":
        return through_softmax(tl.where(own, 0.0, v[None, :]), exps, total, columns)
    if SURROGATE == "gated":
        towards = tl.where(own | (columns >= K)[None, :], 0.0, gates_of(z, own_logit, margin) * v[None, :])
        return through_softmax(towards, exps, total, columns)
    if SURROGATE == "kl-all":
        rates = exps / total[:, None]
        hits = hits_of(z, rates, own_logit, own_of(rates, own), own, columns, K, margin, ZERO_MARGIN)
        return tl.sum(tl.where(hits, v[None, :], 0.0), 1)[:, None] * rates_minus_own(exps, total, own)
    place, _, highest, others, all_others = rival_of(z, own, columns, margin)
    charge = tl.sum(tl.where((columns[None, :] == place[:, None]) & (own == 0), v[None, :], 0.0), 1)
    moved = tl.where(own, -(others / all_others)[:, None], exps_of(z, highest) / all_others[:, None])
    return tl.where((charge == 0)[:, None], 0 * exps / total[:, None], charge[:, None] * moved)
