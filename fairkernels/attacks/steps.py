"""Steps and what they are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from fairkernels import functional as FK
from fairkernels.ops import dispatch
from fairkernels.ops.schema import OPERATORS

from .base import Problem
from .loop import Step
from .objective import Found


def fused_step(problem: Problem, norm: FK.Norm, bounds: tuple[float, float]) -> Step:
    """Along the gradient, back into ball and bounds: one pass over memory.

    The first step is checked like any call of the operator; the others, of the same shapes, go to its kernel at once.
    """
    x, alpha, eps, mask = problem.x, problem.alpha, problem.eps, problem.mask
    operator = OPERATORS["pgd_step"]
    backend = dispatch.choose_for(operator, x, dispatch.forced_backend(None))
    numbers, tensors = zip(*map(number_and_tensor, (alpha, eps)), strict=True)
    padded = None if mask is None else mask.reshape(*[1] * (x.dim() - mask.dim()), *mask.shape)
    same = (x, *tensors, None, None, padded, *numbers, *bounds, norm, False)
    checked = False

    def step(point: Tensor, found: Found, out: Tensor) -> Tensor:
        nonlocal checked
        if checked:
            return dispatch.compute_into(operator, (point, found.grad, *same), out, backend)
        checked = backend != "reference" and dispatch.have_addresses((point, found.grad, *same, out))
        return FK.pgd_step(point, found.grad, x, alpha=alpha, eps=eps, norm=norm, bounds=bounds, mask=mask, out=out)

    return step


def number_and_tensor(size: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, size) if isinstance(size, Tensor) else (size, None)


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
