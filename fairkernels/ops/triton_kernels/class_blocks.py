"""Columns of some rows of logits: the mathematics that whole rows and pieces of long rows share. Device functions."""

import triton
import triton.language as tl


@triton.jit
def load_weights(labels, sample_weight, row, inside, label_stride, weight_stride, K, REAL: tl.constexpr):
    """Weights of samples that are not ignored, 0 outside, NaN where the label is no class."""
    weight = tl.full(row.shape, 1.0, REAL)
    if sample_weight is not None:
        weight = tl.load(sample_weight + row * weight_stride, mask=inside, other=0).to(REAL)
    label = tl.load(labels + row * label_stride, mask=inside, other=0)
    weight = tl.where((label >= 0) & (label < K), weight, float("nan"))
    return tl.where(inside, weight, 0.0)


@triton.jit
def load_class_weights(weight, columns, K, stride, REAL: tl.constexpr):
    by_class = tl.full(columns.shape, 1.0, REAL)
    if weight is not None:
        by_class = tl.load(weight + columns.to(tl.int64) * stride, mask=columns < K, other=0).to(REAL)
    return by_class


@triton.jit
def load_block(
    logits, row, inside, columns, K, row_stride, column_stride, temperature, HEATED: tl.constexpr, REAL: tl.constexpr
):
    """Logits divided by the temperature: zeros in rows that are not there, -inf beyond the classes."""
    at = row[:, None] * row_stride + columns[None, :].to(tl.int64) * column_stride
    z = tl.load(logits + at, mask=inside[:, None] & (columns < K)[None, :], other=0).to(REAL)
    if HEATED:
        z = z / temperature
    return tl.where((columns < K)[None, :], z, float("-inf"))


@triton.jit
def finite_top(top):
    """What exponents are shifted by: 0 in a row of -inf, whose exponentials then are zeros, not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def exps_of(z, top):
    return tl.exp(z - finite_top(top)[:, None])


@triton.jit
def log_sum(top, total):
    return finite_top(top) + tl.log(total)


@triton.jit
def extended(top, total, z):
    """The largest logit and the sum of exponentials relative to it, of a row of which one more piece was read."""
    raised = tl.maximum(top, tl.max(z, 1))
    shift = finite_top(raised)
    return raised, total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)


@triton.jit
def add_exactly(total, lost, term):
    """A running sum and what rounding has taken from it (Kahan): as good for many terms as for two."""
    term = term - lost
    raised = total + term
    return raised, (raised - total) - term


# --- the classes that a surrogate charges -------------------------------------------------------------------------


@triton.jit
def gates_of(z, own_logit, margin):
    return 1 / (1 + tl.exp(own_logit[:, None] - z - margin))


@triton.jit
def is_ahead(own, other):
    """Of a class: then nothing is charged. Not with an infinite logit, whose softmax is none: the charge is NaN."""
    return (own > other) & (own < float("inf"))


@triton.jit
def hits_of(z, rates, own_logit, own_rate, own, columns, K, margin, ZERO_MARGIN: tl.constexpr):
    """ "kl-all": the wrong classes within the margin, or NaN; at margin 0 logits decide, not rounded rates."""
    misses = is_ahead(own_logit[:, None], z) if ZERO_MARGIN else own_rate[:, None] > margin + rates
    return (misses == 0) & (own == 0) & (columns < K)[None, :]


@triton.jit
def rivals_of(z, own):
    """The logits of the wrong classes; NaN counts as the largest number, its exponential is NaN all the same."""
    return tl.where(own, float("-inf"), z)


@triton.jit
def strongest(rivals):
    return tl.max(tl.where(rivals == rivals, rivals, float("inf")), 1)


@triton.jit
def first_place(rivals, highest, columns):
    """Where the strongest rival is, the first of equals; 2^30 if it is not among these columns."""
    there = (rivals == highest[:, None]) | (rivals != rivals)
    return tl.min(tl.where(there, columns[None, :], 1 << 30), 1)


@triton.jit
def charge_of(own_logit, highest, others, place, margin):
    """ "kl": the place and ``-log softmax(z + margin (1 - e_y))_y``, or -1 and 0 if the class is ahead by the margin.

    ``others`` are the exponentials of the wrong classes relative to the strongest, added up. Also returned: the same of
    all classes, the true one included.
    """
    ahead = highest - own_logit + margin
    total = others + tl.exp(-ahead)
    hit = is_ahead(own_logit, margin + highest) == 0
    return tl.where(hit, place, -1), tl.where(hit, ahead + tl.log(total), 0.0), total
