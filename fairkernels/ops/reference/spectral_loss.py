"""Confusional spectral regularisation (arXiv 2501.13273), its Sy-FAR baseline ("kl-all"), CAR ("gated", 2603.16732)."""

import torch
from torch import Tensor

from ._segments import count_by_class, divide_or_zero, row_weights, safe_index, sum_by_class, without_ignored
from .spectral_norm import spectral_norm


def surrogate_rows(logits: Tensor, true: Tensor, surrogate: str, margin: float) -> Tensor:
    """``[..., B, K]``: what sample b adds to row ``y_b`` of the matrix; ``true`` is its label, one-hot."""
    scores = torch.log_softmax(logits, -1)
    own = torch.where(true, logits, 0).sum(-1, keepdim=True)
    no_charge = 0 * own  # NaN with an infinite logit, whose softmax is none

    if surrogate == "soft":
        return ~true * scores.exp()

    if surrogate == "gated":  # the gate weighs errors, it is not what is trained
        gate = torch.where(true, 0, torch.sigmoid(margin + logits - own)).detach()
        return gate * scores.exp()

    if surrogate == "kl-all":  # every class within the margin is charged; at margin 0 logits decide, not rounded rates
        if margin == 0:
            hit = ~(own > logits)
        else:
            rates = scores.exp()
            hit = ~(torch.where(true, rates, 0).sum(-1, keepdim=True) > margin + rates)
        loss = -torch.where(true, scores, 0).sum(-1, keepdim=True)
        return torch.where(hit & ~true, loss, no_charge)

    rival = torch.where(true, -torch.inf, logits)  # "kl": only the strongest wrong class is charged
    strongest = rival.argmax(-1, keepdim=True)
    charged = torch.zeros_like(true).scatter(-1, strongest, torch.ones_like(strongest, dtype=torch.bool))
    hit = ~(own > margin + rival.amax(-1, keepdim=True))
    shifted = torch.log_softmax(logits + margin * (~true).to(logits.dtype), -1)
    loss = -torch.where(true, shifted, 0).sum(-1, keepdim=True)
    return torch.where(hit & charged & ~true, loss, no_charge)


def spectral_loss(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    start: Tensor | None,
    surrogate: str,
    margin: float,
    ignore_index: int,
    method: str,
    iters: int | None,
    tol: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_classes = logits.shape[-1]
    weight = row_weights(logits, labels, None, ignore_index)
    logits = without_ignored(logits, labels, ignore_index)
    true = safe_index(labels, num_classes).unsqueeze(-1) == torch.arange(num_classes, device=labels.device)

    rows = weight.unsqueeze(-1) * surrogate_rows(logits, true, surrogate, margin)
    matrix = sum_by_class(rows, labels, num_classes)
    counts = count_by_class(weight, labels, num_classes).unsqueeze(-1)
    matrix = divide_or_zero(matrix, weight.sum(-1)[..., None, None] if surrogate == "kl-all" else counts)
    if class_weight is not None:
        matrix = matrix * torch.where(counts > 0, class_weight.unsqueeze(-1), 0)  # 1 / counts is infinite there
    sigma, u, v = spectral_norm(matrix, start, method, iters, tol)
    return sigma + 0 * rows.sum((-2, -1)), u, v
