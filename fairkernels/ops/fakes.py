"""Shape, dtype and layout of every operator's results: what kernels and references promise."""

from typing import Any

import torch
from torch import Tensor


def accumulator(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def soft_confusion(logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    *problems, _batch, classes = logits.shape
    return logits.new_empty((*problems, classes, classes)), accumulator(logits, *problems, classes)


def per_matrix(matrix: Tensor, *_: Any) -> Tensor:
    return matrix.new_empty(matrix.shape[:-2])


def symmetry_loss(
    logits: Tensor, labels: Tensor, sample_weight: Tensor | None, eps: float, absent: str, *_: Any
) -> tuple[Tensor, Tensor]:
    *problems, batch, classes = logits.shape
    rows = torch.sym_min(batch, classes)
    columns = rows if absent == "ignore" else classes
    return logits.new_empty(problems), accumulator(logits, *problems, rows, columns)


def spectral_norm(matrix: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    *problems, rows, columns = matrix.shape
    return (
        matrix.new_empty(problems),
        accumulator(matrix, *problems, rows),
        accumulator(matrix, *problems, columns),
    )


def spectral_loss(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    *problems, _batch, classes = logits.shape
    vector = accumulator(logits, *problems, classes)
    return logits.new_empty(problems), vector, torch.empty_like(vector)


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
    *rest: Any,
) -> tuple[Tensor, ...]:
    *problems, batch, classes = logits.shape
    return_parts = rest[-1]
    size = classes if return_parts else 0
    rows = columns = 0
    if sym_weight or return_parts:
        rows = torch.sym_min(batch, classes)
        columns = rows if absent == "ignore" else classes
    parts = [accumulator(logits, *problems) for _ in range(3)]
    confusion = accumulator(logits, *problems, size, size)
    coefficients = accumulator(logits, *problems, rows, columns)
    vectors = [accumulator(logits, *problems, classes) for _ in range(2)]
    return logits.new_empty(problems), *parts, confusion, coefficients, *vectors


def trades_kl(natural_logits: Tensor, adversarial_logits: Tensor, reduction: str) -> Tensor:
    return natural_logits.new_empty(natural_logits.shape[: -1 if reduction == "none" else -2])


def same_class_mixup(x: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(labels, memory_format=torch.contiguous_format)


def like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def like_first_contiguous(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def confusion_counts(predictions: Tensor, labels: Tensor, num_classes: int, *_: Any) -> Tensor:
    return predictions.new_empty((*predictions.shape[:-1], num_classes, num_classes))
