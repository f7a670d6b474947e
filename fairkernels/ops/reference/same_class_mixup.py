"""Mixing within a class, Domain Mixup (arXiv 2411.14424)."""

import torch
from torch import Tensor

from ._philox import uniforms

STREAM = 2
"""Of the generator: the random starts of attacks use 0 and 1."""


def same_class_mixup(x: Tensor, labels: Tensor, lams: Tensor | None, lam: float, seed: int) -> tuple[Tensor, Tensor]:
    partner = same_class_partner(labels, seed)
    share = torch.tensor(lam, dtype=x.dtype, device=x.device) if lams is None else lams
    share = share.reshape(-1, *[1] * (x.dim() - 1))
    return share * x + (1 - share) * x[partner], partner


def same_class_partner(labels: Tensor, seed: int) -> Tensor:
    """``[B]``: uniform among the other samples of the class, the sample itself where it is alone."""
    labels = labels.contiguous()
    ordered, order = labels.sort(stable=True)
    first, last = torch.searchsorted(ordered, labels), torch.searchsorted(ordered, labels, right=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))

    others = last - first - 1
    noise = uniforms(len(labels), seed, stream=STREAM, device=labels.device, dtype=torch.float64)
    step = torch.where(others > 0, 1 + (noise * others).long(), 0)  # 1 ... others, round the members of the class
    return order[first + (place - first + step) % (others + 1)]
