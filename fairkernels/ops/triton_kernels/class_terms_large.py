"""Class terms where a matrix of all pairs of classes does not fit one program, see ``class_terms.fits_one_program``.

Forward: samples are ordered by class (``class_order``), classes are added up (``class_rates``), then comes what is
wanted of the pairs (``class_pairs``) and of the spectrum (``spectral_norm``), at last one small launch that makes the
terms. Up to ``MOST_COUNTED`` samples and ``LONGEST_ROW`` classes (half of it with a surrogate but "soft") that is one
launch each, of the spectrum its own, and one read of the logits; longer rows take one launch and one read more, classes
of many samples one launch more. More samples take one launch for their classes, and PyTorch sorts these and finds where
each begins.

Backward: one launch, one read of the logits and one write of their gradient (longer rows are read three times, the
second and third time from the cache). Before it comes, if that is needed, one for where classes begin, with two by
PyTorch beyond ``MOST_COUNTED`` samples, and one for the divisor of a mean with class weights.

For ``normalize="all"`` PyTorch adds up all weights: four small launches forward (two without weights), two backward.

Of a logit these are 4 bytes forward and 8 backward (float64 8 and 16, half 2 and 4), that of a sample's own class once
more. Besides, forward: min(B, K) x K rates are written, and where pairs count read and as many coefficients written;
labels are read, from the cache, once for each 16 samples and classes to be ordered. Backward: a row of derivatives for
each sample, from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .class_gradient import gradient
from .class_order import class_order
from .class_pairs import pairs_behind, penalties
from .class_rates import Sums, is_direct, slot_count, sums_by_class
from .class_terms import Inputs, Results, Terms, Upstream
from .common import number
from .launch import launch, real_type
from .spectral_norm import leading_pair


@triton.jit
def sum_of(numbers, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(numbers + at, mask=at < n, other=0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["slots", "squares"])
def terms_of_sums(
    losses, divisors, penalties, counts, sigmas, left, right, starts,
    total_out, entropy_out, symmetry_out, spectral_out, u_out, v_out, K, slots, squares,
    ce_weight: tl.float64, sym_weight: tl.float64, spec_weight: tl.float64,
    ENTROPY: tl.constexpr, ENTROPY_MEAN: tl.constexpr, CE_COUNTS: tl.constexpr,
    SYMMETRY: tl.constexpr, SYMMETRY_MEAN: tl.constexpr, IGNORE_ABSENT: tl.constexpr, SYM_COUNTS: tl.constexpr,
    SPECTRAL: tl.constexpr, SPEC_COUNTS: tl.constexpr, FOLD: tl.constexpr, CHARGES_ALL: tl.constexpr,
    DIRECT: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Bound by latency: one program adds up a few numbers a class.
    problem = tl.program_id(0).to(tl.int64)
    total = tl.zeros((), tl.float64)
    entropy, gap = total, total  # zero where they are not wanted
    sigma = tl.zeros((), REAL)
    if ENTROPY:
        entropy = sum_of(losses + problem * slots, slots, BLOCK)
        if ENTROPY_MEAN:
            entropy = entropy / sum_of(divisors + problem * slots, slots, BLOCK)
        if CE_COUNTS:
            total += number(ce_weight, tl.float64) * entropy
    if SYMMETRY:
        pairs = pairs_behind(counts + problem * slots, slots, K, SYMMETRY_MEAN, IGNORE_ABSENT)
        gap = sum_of(penalties + problem * squares, squares, BLOCK) / pairs
        if SYM_COUNTS:
            total += number(sym_weight, tl.float64) * gap
    if SPECTRAL:
        sigma = tl.load(sigmas + problem)
        if SPEC_COUNTS:
            total += number(spec_weight, tl.float64) * sigma
        starts += problem * (K + 1)
        for first in range(0, K, BLOCK):
            label = first + tl.arange(0, BLOCK)
            is_class = label < K
            begin = tl.load(starts + label, mask=is_class, other=0)
            samples = tl.load(starts + label + 1, mask=is_class, other=0) - begin
            slot = label if DIRECT else begin
            u = tl.load(left + problem * slots + slot, mask=samples > 0, other=0)
            if FOLD:
                by = tl.load(starts + K) if CHARGES_ALL else samples
                u = u * (number(spec_weight, tl.float64) / tl.maximum(by, 1)).to(REAL)
            if u_out is not None:
                tl.store(u_out + problem * K + label, u, mask=is_class)
            if v_out is not None:
                v = tl.load(right + problem * K + label, mask=is_class, other=0)
                tl.store(v_out + problem * K + label, v, mask=is_class)
    elif u_out is not None:
        for first in range(0, K, BLOCK):
            label = first + tl.arange(0, BLOCK)
            tl.store(u_out + problem * K + label, tl.zeros((BLOCK,), REAL), mask=label < K)
            tl.store(v_out + problem * K + label, tl.zeros((BLOCK,), REAL), mask=label < K)
    if entropy_out is not None:
        tl.store(entropy_out + problem, entropy.to(REAL))
        tl.store(symmetry_out + problem, gap.to(REAL))
        tl.store(spectral_out + problem, sigma)
    if total_out is not None:
        tl.store(total_out + problem, total.to(REAL))  # from there to half precision


def forward_large(inputs: Inputs, terms: Terms, results: Results) -> None:
    """Fills the results that are wanted: launches of the order and the sums; of pairs, spectrum and terms if wanted."""
    batch, num_classes = inputs.logits.shape[-2:]
    by_class = class_order(inputs.labels, num_classes, terms.ignore_index)
    sums = sums_by_class(inputs, terms, results, by_class)
    if results.total is None:
        return
    partial = penalties(inputs, terms, by_class, sums, results.coefficients) if terms.symmetry else None
    sigma, u, v = spectrum(inputs, terms, sums) if terms.spectral else (None, None, None)
    launch(
        terms_of_sums,
        (inputs.logits.shape[:-2].numel(),),
        sums.losses, sums.divisors, partial, sums.counts, sigma, u, v, by_class.starts,
        results.total, results.entropy, results.symmetry, results.spectral, results.u, results.v,
        num_classes, slot_count(batch, num_classes), 0 if partial is None else partial.shape[-1],
        terms.ce_weight, terms.sym_weight, terms.spec_weight,
        num_warps=4, ENTROPY=terms.entropy, ENTROPY_MEAN=terms.entropy_mean, CE_COUNTS=terms.ce_weight != 0,
        SYMMETRY=terms.symmetry, SYMMETRY_MEAN=terms.symmetry_mean, IGNORE_ABSENT=terms.absent == "ignore",
        SYM_COUNTS=terms.sym_weight != 0, SPECTRAL=terms.spectral, SPEC_COUNTS=terms.spec_weight != 0, FOLD=terms.fold,
        CHARGES_ALL=terms.surrogate == "kl-all", DIRECT=is_direct(batch, num_classes),
        REAL=real_type(inputs.logits.dtype),
        BLOCK=1024,
    )  # fmt: skip


def spectrum(inputs: Inputs, terms: Terms, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular pair of the surrogate's matrix, its rows in slots."""
    *leading, batch, num_classes = inputs.logits.shape
    rows = sums.rates if sums.charges is None else sums.charges
    assert rows is not None
    matrix = rows.view(*leading, slot_count(batch, num_classes), num_classes)
    if matrix.numel() == 0:
        return tuple(matrix.new_zeros((*leading, *shape)) for shape in ((), (0,), (num_classes,)))  # type: ignore[return-value]
    method = "locg" if terms.locg else "power"
    sigma, u, v = leading_pair(
        matrix, inputs.start, method, terms.iters, terms.tol, nonnegative=inputs.class_weight is None
    )
    return sigma.contiguous(), u.contiguous(), v.contiguous()


def backward_large(inputs: Inputs, terms: Terms, upstream: Upstream) -> Tensor:
    """The gradient by the logits, contiguous. One launch, before it those of ``class_starts`` and of the divisor."""
    return gradient(inputs, terms, upstream)
