"""Symmetry gap of a confusion matrix and of a batch of logits, Sy-FAR (arXiv 2509.12939)."""

import torch
from torch import Tensor

from .soft_confusion import soft_confusion


def active_pairs(confusion: Tensor, counts: Tensor | None, absent: str) -> Tensor:
    """``[..., K, K]`` bool, strictly upper triangle: the pairs of classes that are compared."""
    pairs = torch.ones(confusion.shape[-2:], dtype=torch.bool, device=confusion.device).triu(1)
    if absent == "zero":
        return pairs.expand(confusion.shape)
    present = (confusion.sum(-1) if counts is None else counts) != 0
    return pairs & present.unsqueeze(-1) & present.unsqueeze(-2)


def damping(mass: Tensor, eps: float) -> Tensor | float:
    """``s / (s + ε)`` without 0/0 and without underflow; 1 for ε = 0, whose derivatives would divide by tiny masses."""
    return mass / torch.where(mass > 0, mass + eps, 1) if eps > torch.finfo(mass.dtype).tiny else 1.0


def symmetry_gap(confusion: Tensor, counts: Tensor | None, eps: float, absent: str, reduction: str) -> Tensor:
    gap, mass = (confusion - confusion.mT).abs(), confusion + confusion.mT
    penalty = gap * damping(mass, eps)
    pairs = active_pairs(confusion, counts, absent)
    total = torch.where(pairs, penalty, 0).sum((-2, -1))
    return total / pairs.sum((-2, -1)).clamp(min=1) if reduction == "mean" else total


def symmetry_loss(
    logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    eps: float,
    absent: str,
    reduction: str,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    confusion, counts = soft_confusion(logits, labels, sample_weight, "true", temperature, ignore_index)
    loss = symmetry_gap(confusion, counts, eps, absent, reduction)
    return loss + 0 * confusion.sum((-2, -1))  # a NaN logit is never lost, also where its class has no partner
