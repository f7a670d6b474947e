"""What the operators on logits and labels share: which rows count, for how much, and sums over the rows of a class."""

import torch
from torch import Tensor


def row_weights(logits: Tensor, labels: Tensor, sample_weight: Tensor | None, ignore_index: int) -> Tensor:
    """``[..., B]`` weight of each row: 0 where ignored, NaN where the label is no class at all.

    On the CPU a label out of range has raised before; on a GPU nobody waits to look, so the result says it.
    """
    weight = logits.new_ones(labels.shape) if sample_weight is None else sample_weight
    a_class = (labels >= 0) & (labels < logits.shape[-1])
    return torch.where(labels == ignore_index, 0, torch.where(a_class, weight, torch.nan))


def without_ignored(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """The logits with zeros in the rows that are ignored, whatever those rows held."""
    return torch.where((labels == ignore_index).unsqueeze(-1), 0, logits)


def safe_index(labels: Tensor, num_classes: int) -> Tensor:
    """Labels that can be used as an index: what is no class becomes class 0 (its weight is 0 or NaN)."""
    return torch.where((labels >= 0) & (labels < num_classes), labels, 0)


def sum_by_class(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """``S_i = sum of rows[b] with labels[b] = i``: ``[..., B, D] -> [..., K, D]``; a NaN stays in its class."""
    index = safe_index(labels, num_classes).unsqueeze(-1).expand(rows.shape)
    sums = rows.new_zeros((*rows.shape[:-2], num_classes, rows.shape[-1]))
    return sums.scatter_add(-2, index, rows)


def count_by_class(weight: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """``n_i = sum of weight[b] with labels[b] = i``: ``[..., B] -> [..., K]``."""
    return sum_by_class(weight.unsqueeze(-1), labels, num_classes).squeeze(-1)


def divide_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is 0; a NaN denominator is let through."""
    empty = denominator == 0
    return torch.where(empty, 0, numerator / torch.where(empty, 1, denominator))
