"""soft_confusion, symmetry_loss, spectral_loss and fair_cross_entropy: four choices among the terms of one computation.

From logits and labels come sums by class (of probabilities, of a surrogate's rows, of losses), from these the terms. Up
to ``SMALL`` classes a matrix of all pairs fits one program (``class_terms_small``); beyond, programs own a class each and
samples are sorted (``class_terms_large``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schema import OPERATORS

SMALL = 128


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
    """Where results go, all contiguous; those that are not wanted may be None."""

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
