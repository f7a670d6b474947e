"""Class weights of FAAL (arXiv 2402.17729) from a one-dimensional root instead of a conic solver."""

import torch
from torch import Tensor

HALVINGS = 80


def kl_dro_weights(class_losses: Tensor, counts: Tensor | None, radius: float) -> Tensor:
    r"""``max_p Σ a p`` subject to ``KL(u ‖ p) <= r`` has ``p_c ∝ u_c / (μ - a_c)``; bisection in ``ln(μ - max a)``."""
    present = torch.ones_like(class_losses, dtype=torch.bool) if counts is None else counts != 0
    share = present.double() / present.sum(-1, keepdim=True).clamp(min=1)  # u: the present classes alike
    losses = class_losses.double()
    highest = torch.where(present, losses, -torch.inf).amax(-1, keepdim=True)
    depth = torch.where(present, highest - losses, 0)  # d: how far below the worst class

    log_depth = torch.log(depth)
    below = depth > 0
    at_the_top = torch.where(below, 0, share).sum(-1, keepdim=True)
    total_log_depth = torch.where(below, share * log_depth, 0).sum(-1, keepdim=True)
    low = (at_the_top.log() + total_log_depth - radius) / (1 - at_the_top)
    wide = torch.tensor(radius, dtype=losses.dtype, device=losses.device)
    high = depth.amax(-1, keepdim=True).log() - (wide + torch.log(-torch.expm1(-wide)))  # ln(expm1 r), r may be large

    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_far = divergence(share, present, torch.logaddexp(middle, log_depth)) > radius
        low, high = torch.where(too_far, middle, low), torch.where(too_far, high, middle)

    scores = torch.where(present, -torch.logaddexp((low + high) / 2, log_depth), -torch.inf)
    weights = torch.softmax(scores, -1)
    alike = ~(depth.amax(-1, keepdim=True) > 0) | (radius == 0)  # nothing to choose, or no choice
    weights = torch.where(alike, share, weights)
    nan = torch.where(present, losses, 0).sum(-1, keepdim=True).isnan()
    return torch.where(nan & present, torch.nan, torch.where(present, weights, 0))


def divergence(share: Tensor, present: Tensor, log_distance: Tensor) -> Tensor:
    """``KL(u || p)`` of the weights ``p_c ∝ u_c / (mu - a_c)``, given ``ln(mu - a_c)``."""
    mean = torch.where(present, share * log_distance, 0).sum(-1, keepdim=True)
    inverse = torch.where(present, share.log() - log_distance, -torch.inf)
    return mean + torch.logsumexp(inverse, -1, keepdim=True)
