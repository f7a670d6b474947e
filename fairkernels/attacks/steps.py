"""Steps and what they are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from fairkernels import functional as FK

from .base import Problem
from .loop import Step
from .objective import Found


def fused_step(problem: Problem, norm: FK.Norm, bounds: tuple[float, float]) -> Step:
    """Along the gradient, back into ball and bounds: one pass over memory."""
    x, alpha, eps, mask = problem.x, problem.alpha, problem.eps, problem.mask

    def step(point: Tensor, found: Found, out: Tensor) -> Tensor:
        return FK.pgd_step(point, found.grad, x, alpha=alpha, eps=eps, norm=norm, bounds=bounds, mask=mask, out=out)

    return step


def along_momentum(step: Step, decay: float) -> Step:
    """The step, but along ``decay`` times what it went along before, plus the gradient in units of its mean size."""
    velocity: Tensor | None = None

    def moved(point: Tensor, found: Found, out: Tensor) -> Tensor:
        nonlocal velocity
        push = in_units_of_its_mean(found.grad)
        velocity = push if velocity is None else push.add_(velocity, alpha=decay)
        return step(point, found._replace(grad=velocity), out)

    return moved


def in_units_of_its_mean(grad: Tensor) -> Tensor:
    """Per sample; zeros where all of it is zero, or some of it not finite, which a momentum would never forget."""
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    mean = grad.abs().mean(tuple(range(1, grad.dim())), keepdim=True, dtype=accumulate)
    return torch.where((mean > 0) & (mean < torch.inf), grad / mean, 0).to(grad.dtype)
