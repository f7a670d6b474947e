"""Soft confusion matrix, Sy-FAR (arXiv 2509.12939)."""

import torch
from torch import Tensor

from ._segments import count_by_class, divide_or_zero, row_weights, sum_by_class, without_ignored


def soft_confusion(
    logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    normalize: str,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    num_classes = logits.shape[-1]
    weight = row_weights(logits, labels, sample_weight, ignore_index)
    probabilities = torch.softmax(without_ignored(logits, labels, ignore_index) / temperature, -1)

    mass = sum_by_class(weight.unsqueeze(-1) * probabilities, labels, num_classes)
    counts = count_by_class(weight, labels, num_classes)

    if normalize == "true":
        mass = divide_or_zero(mass, counts.unsqueeze(-1))
    elif normalize == "all":
        mass = divide_or_zero(mass, counts.sum(-1)[..., None, None])
    return mass, counts
