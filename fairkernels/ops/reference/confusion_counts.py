"""Hard confusion matrix."""

import torch
from torch import Tensor


def confusion_counts(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    a_class = (predictions >= 0) & (predictions < num_classes) & (labels >= 0) & (labels < num_classes)
    kept = a_class & (labels != ignore_index)
    cell = torch.where(kept, labels * num_classes + predictions, num_classes * num_classes)
    counts = cell.new_zeros((*cell.shape[:-1], num_classes * num_classes + 1))  # the last cell takes what is not kept
    counts = counts.scatter_add(-1, cell, torch.ones_like(cell))[..., :-1]
    return counts.reshape(*cell.shape[:-1], num_classes, num_classes).contiguous()
