"""soft_confusion, symmetry_loss, spectral_loss and fair_cross_entropy: four choices among the terms of one computation.

From logits and labels come sums by class (of probabilities, of a surrogate's rows, of losses), from these the terms.
Where a matrix of all pairs of classes fits one program, ``class_terms_small`` makes them: up to 1,024 samples one
launch each way. Beyond, programs own a class each and samples are ordered by class, ``class_terms_large``: forward the
order, the sums and, where they are wanted, pairs, spectrum and terms; backward the gradient and, before it, what it has
to know of the classes. Logits are read once each way, their gradient written once: of a logit 4 bytes forward and 8
backward (float64 8 and 16, half 2 and 4); very long rows are read again, from the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import fakes


@dataclass(frozen=True)
class Terms:
    """What is wanted of the sums, and how. A term that is not wanted is not computed."""

    ignore_index: int
    temperature: float = 1.0
    normalize: str = "true"  # of the confusion matrix that is handed out
    confusion: bool = False
    entropy: bool = False
    symmetry: bool = False
    spectral: bool = False
    ce_weight: float = 0.0  # of the terms in the total; one of weight 0 is left out of it
    sym_weight: float = 0.0
    spec_weight: float = 0.0
    entropy_mean: bool = True
    label_smoothing: float = 0.0
    eps: float = 0.1
    absent: str = "ignore"
    symmetry_mean: bool = False
    surrogate: str = "soft"
    margin: float = 0.0
    locg: bool = True
    iters: int | None = None
    tol: float | None = None
    fold: bool = False  # whether u is kept as the backward wants it: times spec_weight / n


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call; what is optional may be None. B samples, K classes, any leading dimensions."""

    logits: Tensor  # [..., B, K]
    labels: Tensor  # [..., B], int64
    sample_weight: Tensor | None = None  # [..., B], of soft_confusion and symmetry_loss
    weight: Tensor | None = None  # [..., K], class weights of the cross-entropy
    class_weight: Tensor | None = None  # [..., K], of the rows of the surrogate's matrix
    start: Tensor | None = None  # [..., K], where the spectral iteration starts


@dataclass(frozen=True)
class Results:
    """Where results go, all contiguous; zeros where a term is not wanted. What nobody asks for may be None."""

    total: Tensor | None = None  # [...], in the dtype of the logits
    entropy: Tensor | None = None  # [...], as all below in the accumulation dtype
    symmetry: Tensor | None = None
    spectral: Tensor | None = None
    confusion: Tensor | None = None  # [..., K, K], in any floating dtype
    counts: Tensor | None = None  # [..., K]
    coefficients: Tensor | None = None  # [..., min(B, K), min(B, K) or K]
    u: Tensor | None = None  # [..., K]
    v: Tensor | None = None  # [..., K]


@dataclass(frozen=True)
class Upstream:
    """What the backward is made of: the upstream gradient and what the forward has kept."""

    grad: Tensor  # [...]; of soft_confusion [..., K, K]
    coefficients: Tensor | None = None
    counts: Tensor | None = None
    u: Tensor | None = None
    v: Tensor | None = None

    @property
    def of_confusion(self) -> bool:
        """Whether it is that of the confusion matrix, not of a total."""
        return self.counts is not None


# --- the regimes --------------------------------------------------------------------------------------------------


def fits_one_program(logits: Tensor, terms: Terms) -> bool:
    """Whether a matrix of all pairs of classes stays in registers, beside the vectors of the iteration on it.

    Of 64 classes and logits of 16 bits Triton 3.7 makes a product in TF32 for sm_100, whatever precision is asked for.
    """
    most = 32 if terms.spectral or logits.itemsize == 2 else 64
    return logits.shape[-1] <= (most // 2 if logits.dtype == torch.float64 else most)


def forward(inputs: Inputs, terms: Terms, results: Results) -> None:
    if fits_one_program(inputs.logits, terms):
        from .class_terms_small import forward_small

        forward_small(inputs, terms, results)
    else:
        from .class_terms_large import forward_large

        forward_large(inputs, terms, results)


def backward(inputs: Inputs, terms: Terms, upstream: Upstream) -> Tensor:
    if fits_one_program(inputs.logits, terms):
        from .class_terms_small import backward_small

        return backward_small(inputs, terms, upstream)
    from .class_terms_large import backward_large

    return backward_large(inputs, terms, upstream)


# --- the operators ------------------------------------------------------------------------------------------------


def soft_confusion(
    logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    normalize: str,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    confusion, counts = fakes.soft_confusion(logits, labels)
    terms = Terms(ignore_index, temperature, normalize, confusion=True)
    forward(Inputs(logits, labels, sample_weight), terms, Results(confusion=confusion, counts=counts))
    return confusion, counts


def soft_confusion_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    normalize: str,
    temperature: float,
    ignore_index: int,
    counts: Tensor,
) -> Tensor:
    terms = Terms(ignore_index, temperature, normalize, confusion=True)
    return backward(Inputs(logits, labels, sample_weight), terms, Upstream(grad, counts=counts))


def symmetry_terms(eps: float, absent: str, reduction: str, temperature: float, ignore_index: int) -> Terms:
    return Terms(
        ignore_index,
        temperature,
        symmetry=True,
        sym_weight=1.0,
        eps=eps,
        absent=absent,
        symmetry_mean=reduction == "mean",
    )


def symmetry_loss(
    logits: Tensor, labels: Tensor, sample_weight: Tensor | None, eps: float, absent: str, *rest: Any
) -> tuple[Tensor, Tensor]:
    loss, coefficients = fakes.symmetry_loss(logits, labels, sample_weight, eps, absent)
    terms = symmetry_terms(eps, absent, *rest)
    forward(Inputs(logits, labels, sample_weight), terms, Results(total=loss, coefficients=coefficients))
    return loss, coefficients


def symmetry_loss_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, sample_weight: Tensor | None, *options: Any
) -> Tensor:
    *steering, coefficients = options
    terms = symmetry_terms(*steering)
    return backward(Inputs(logits, labels, sample_weight), terms, Upstream(grad, coefficients))


def spectral_terms(
    surrogate: str, margin: float, ignore_index: int, method: str, iters: int | None, tol: float | None
) -> Terms:
    return Terms(
        ignore_index,
        spectral=True,
        spec_weight=1.0,
        surrogate=surrogate,
        margin=margin,
        locg=method == "locg",
        iters=iters,
        tol=tol,
    )


def spectral_loss(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, start: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss, u, v = fakes.spectral_loss(logits)
    inputs = Inputs(logits, labels, class_weight=class_weight, start=start)
    forward(inputs, spectral_terms(*options), Results(total=loss, u=u, v=v))
    return loss, u, v


def spectral_loss_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, class_weight: Tensor | None, start: Tensor | None, *options: Any
) -> Tensor:
    *steering, u, v = options
    inputs = Inputs(logits, labels, class_weight=class_weight)
    return backward(inputs, spectral_terms(*steering), Upstream(grad, u=u, v=v))


def fair_terms(
    sym_weight: float,
    spec_weight: float,
    ce_weight: float,
    reduction: str,
    label_smoothing: float,
    ignore_index: int,
    eps: float,
    absent: str,
    sym_reduction: str,
    surrogate: str,
    margin: float,
    return_parts: bool,
) -> Terms:
    return Terms(
        ignore_index,
        confusion=return_parts,
        entropy=return_parts or ce_weight != 0,
        symmetry=return_parts or sym_weight != 0,
        spectral=return_parts or spec_weight != 0,
        ce_weight=ce_weight,
        sym_weight=sym_weight,
        spec_weight=spec_weight,
        entropy_mean=reduction == "mean",
        label_smoothing=label_smoothing,
        eps=eps,
        absent=absent,
        symmetry_mean=sym_reduction == "mean",
        surrogate=surrogate,
        margin=margin,
        fold=True,
    )


def fair_cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    results = fakes.fair_cross_entropy(logits, labels, weight, *options)
    total, entropy, symmetry, spectral, confusion, coefficients, u, v = results
    terms = fair_terms(*options)
    places = Results(
        total,
        entropy,
        symmetry,
        spectral,
        confusion if terms.confusion else None,
        coefficients=coefficients if terms.symmetry else None,
        u=u,
        v=v,
    )
    forward(Inputs(logits, labels, weight=weight), terms, places)
    return results


def fair_cross_entropy_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None, *options: Any
) -> Tensor:
    *steering, coefficients, u, v = options
    return backward(
        Inputs(logits, labels, weight=weight), fair_terms(*steering), Upstream(grad, coefficients, None, u, v)
    )
