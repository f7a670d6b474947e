"""Tiles of whole rows of logits: their sums by class, and the gradient by them. Device functions."""

import triton
import triton.language as tl


@triton.jit
def load_samples(labels, sample_weight, row, inside, label_stride, weight_stride, ignore_index, K, ACC: tl.constexpr):
    """Class, whether it counts, and weight of samples; a label that is no class is class 0 with weight NaN."""
    label = tl.load(labels + row * label_stride, mask=inside, other=0)
    kept = inside & (label != ignore_index)
    is_class = (label >= 0) & (label < K)
    weight = tl.full(row.shape, 1.0, ACC)
    if sample_weight is not None:
        weight = tl.load(sample_weight + row * weight_stride, mask=kept, other=0).to(ACC)
    weight = tl.where(is_class, weight, float("nan"))
    return tl.where(kept & is_class, label, 0).to(tl.int32), kept, tl.where(kept, weight, 0.0)


@triton.jit
def load_rows(logits, row, kept, columns, K, row_stride, column_stride, temperature, ACC: tl.constexpr):
    """Rows of logits divided by the temperature: zeros for samples that do not count, -inf beyond the classes."""
    at = row[:, None] * row_stride + columns[None, :].to(tl.int64) * column_stride
    loaded = tl.load(logits + at, mask=kept[:, None] & (columns < K)[None, :], other=0).to(ACC)
    return tl.where((columns < K)[None, :], loaded / temperature, float("-inf"))


@triton.jit
def softmax_rows(z):
    """Exponentials of each row, their sum and the row's logarithm of the sum; NaN where a logit is NaN or +inf."""
    top = tl.max(z, 1)
    exps = tl.exp(z - top[:, None])
    total = tl.sum(exps, 1)
    return exps, total, top + tl.log(total)


@triton.jit
def cross_entropy_rows(z, lse, own, class_weight, columns, K, label_smoothing, SMOOTHED: tl.constexpr):
    """Loss of each row as in ``F.cross_entropy``, and the weight of its class."""
    own_weight = tl.sum(tl.where(own, class_weight[None, :], 0.0), 1)
    own_loss = lse - tl.sum(tl.where(own, z, 0.0), 1)
    if SMOOTHED:
        spread = tl.where((columns < K)[None, :], class_weight[None, :] * (lse[:, None] - z), 0.0)
        return (1 - label_smoothing) * own_weight * own_loss + label_smoothing / K * tl.sum(spread, 1), own_weight
    return own_weight * own_loss, own_weight


@triton.jit
def strongest_rival(z, own, columns, BLOCK_K: tl.constexpr):
    """Logit and place of the largest wrong class of each row, the first of equals; a NaN counts as the largest."""
    rivals = tl.where(own, float("-inf"), z)
    highest = tl.max(tl.where(rivals == rivals, rivals, float("inf")), 1)
    first = tl.where((rivals == highest[:, None]) | (rivals != rivals), columns[None, :], BLOCK_K)
    nan = tl.sum(tl.where(rivals == rivals, 0.0, rivals), 1)
    return highest + nan, tl.min(first, 1)


@triton.jit
def shifted_softmax_rows(z, own, margin):
    """Softmax of the logits with ``margin`` added to the wrong classes: exponentials, sum, logarithm of the sum."""
    return softmax_rows(tl.where(own, z, z + margin))


@triton.jit
def surrogate_rows(z, exps, total, lse, own, columns, K, margin, SURROGATE: tl.constexpr, BLOCK_K: tl.constexpr):
    """What each sample adds to the row of its class in the surrogate's matrix, zero at its own class."""
    own_logit = tl.sum(tl.where(own, z, 0.0), 1)
    if SURROGATE == "gated":
        gate = 1 / (1 + tl.exp(own_logit[:, None] - z - margin))
        return tl.where(own, 0.0, gate * exps / total[:, None])
    if SURROGATE == "kl-all":
        return tl.where(
            charged_by_all(z, exps, total, own_logit, own, columns, K, margin), (lse - own_logit)[:, None], 0.0
        )
    highest, place = strongest_rival(z, own, columns, BLOCK_K)
    _, _, shifted_lse = shifted_softmax_rows(z, own, margin)
    hit = charged_by_rival(own_logit, highest, margin)
    loss = tl.where(hit, shifted_lse - own_logit, 0.0)
    return tl.where((columns[None, :] == place[:, None]) & ~own, loss[:, None], 0.0)


@triton.jit
def charged_by_rival(own_logit, highest, margin):
    return (own_logit > margin + highest) == 0


@triton.jit
def charged_by_all(z, exps, total, own_logit, own, columns, K, margin):
    """The wrong classes within the margin; at margin 0 logits decide, not rounded rates."""
    own_rate = tl.sum(tl.where(own, exps, 0.0), 1) / total
    by_logits = (own_logit[:, None] > z) == 0
    by_rates = (own_rate[:, None] > margin + exps / total[:, None]) == 0
    return tl.where(margin == 0, by_logits, by_rates) & ~own & (columns < K)[None, :]


@triton.jit
def through_softmax(h, exps, total, columns, BLOCK_K: tl.constexpr):
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
    own_weight = tl.sum(tl.where(own, class_weight[None, :], 0.0), 1)
    towards = (1 - label_smoothing) * own_weight[:, None] * rates_minus_own(exps, total, own)
    if SMOOTHED:
        weight = tl.where(columns < K, class_weight, 0.0)
        spread = tl.sum(weight, 0) * exps / total[:, None] - weight[None, :]
        towards += label_smoothing / K * spread
    return towards


@triton.jit
def surrogate_gradient(z, exps, total, own, v, columns, K, margin, SURROGATE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of ``<surrogate row, v>`` by each row's logits."""
    own_logit = tl.sum(tl.where(own, z, 0.0), 1)
    if SURROGATE == "soft":
        return through_softmax(tl.where(own, 0.0, v[None, :]), exps, total, columns, BLOCK_K)
    if SURROGATE == "gated":
        gate = 1 / (1 + tl.exp(own_logit[:, None] - z - margin))
        gate = tl.where((columns < K)[None, :], gate, 0.0)
        return through_softmax(tl.where(own, 0.0, gate * v[None, :]), exps, total, columns, BLOCK_K)
    if SURROGATE == "kl-all":
        charged = charged_by_all(z, exps, total, own_logit, own, columns, K, margin)
        return tl.sum(tl.where(charged, v[None, :], 0.0), 1)[:, None] * rates_minus_own(exps, total, own)
    highest, place = strongest_rival(z, own, columns, BLOCK_K)
    charge = tl.sum(tl.where((columns[None, :] == place[:, None]) & ~own, v[None, :], 0.0), 1)
    charge = tl.where(charged_by_rival(own_logit, highest, margin), charge, 0.0)
    shifted_exps, shifted_total, _ = shifted_softmax_rows(z, own, margin)
    return charge[:, None] * rates_minus_own(shifted_exps, shifted_total, own)
