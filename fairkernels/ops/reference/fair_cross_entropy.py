"""Cross-entropy, symmetry gap and spectral norm of one batch of logits."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ._segments import without_ignored
from .soft_confusion import soft_confusion
from .spectral_loss import spectral_loss
from .symmetry import symmetry_loss


def fair_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = without_ignored(logits, labels, ignore_index)
    entropy = batched_cross_entropy(logits, labels, weight, reduction, label_smoothing, ignore_index)
    symmetry, spectral = torch.zeros_like(entropy), torch.zeros_like(entropy)  # results must not share memory
    total = ce_weight * entropy if ce_weight else torch.zeros_like(entropy)

    if sym_weight or return_parts:
        symmetry = symmetry_loss(logits, labels, None, eps, absent, sym_reduction, 1.0, ignore_index)
    if spec_weight or return_parts:
        spectral = spectral_loss(logits, labels, None, None, surrogate, margin, ignore_index, "locg", None, None)[0]
    if sym_weight:  # a weight of 0 skips its term: 0 · inf would not be 0
        total = total + sym_weight * symmetry
    if spec_weight:
        total = total + spec_weight * spectral

    confusion = logits.new_zeros((*logits.shape[:-2], 0, 0))
    if return_parts:
        confusion = soft_confusion(logits, labels, None, "true", 1.0, ignore_index)[0]
    return total, entropy, symmetry, spectral, confusion


def batched_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """``F.cross_entropy`` of each problem of ``[..., B, K]``."""
    if logits.dim() == 2:
        return cross_entropy(
            logits,
            labels,
            weight,
            reduction=reduction,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
    problems = logits.shape[:-2].numel()
    weights = [None] * problems if weight is None else weight.reshape(problems, logits.shape[-1])
    flat_logits, flat_labels = (
        logits.reshape(problems, *logits.shape[-2:]),
        labels.reshape(problems, labels.shape[-1]),
    )
    losses = [
        batched_cross_entropy(z, y, w, reduction, label_smoothing, ignore_index)
        for z, y, w in zip(flat_logits, flat_labels, weights, strict=True)
    ]
    return torch.stack(losses).reshape(logits.shape[:-2]) if losses else logits.sum((-2, -1))
