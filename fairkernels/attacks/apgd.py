"""Auto-PGD: no step size to choose (Croce and Hein, arXiv 2003.01690, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fairkernels import functional as FK
from fairkernels.ops import check

from .base import Attack, CommonOptions, Problem, Size
from .loop import Step, per_sample
from .objective import Found

if TYPE_CHECKING:
    from typing_extensions import Unpack

MOMENTUM = 0.75  # α of the paper: how much of a step is new


class APGD(Attack):
    """PGD in the l∞ ball with momentum, whose step, ``2 eps`` at first, is halved where it no longer helps.

    At each of a few checkpoints a sample whose loss rose in too few steps, or whose best loss has not changed since
    the last one, goes on from its best point with half the step. The point returned is the worst seen (``keep`` is
    ``"best"``): one that is misclassified before one that is not, then by loss.

    Args:
        loss: ``"ce"`` or ``"dlr"``, which does not vanish for confident models.
        rho: share of the steps between two checkpoints in which the loss must have risen.
        model, eps, steps, options: see :class:`Attack`; the step size is not to be chosen.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        eps: Size = 8 / 255,
        steps: int = 100,
        loss: Literal["ce", "dlr", "margin"] | Callable[[Tensor, Tensor], Tensor] = "ce",
        *,
        rho: float = 0.75,
        **options: Unpack[CommonOptions],
    ) -> None:
        if "keep" in options:
            raise ValueError("APGD returns the worst point it has seen: it takes no keep")
        super().__init__(model, alpha=eps, eps=eps, steps=steps, loss=loss, **options)
        check.non_negative(rho, "rho")
        self.rho, self.keep = rho, "best"

    def start(self, problem: Problem, restart: int) -> Tensor:
        return FK.random_start(problem.x, eps=problem.eps, bounds=self.bounds, seed=self.draw())

    def step(self, problem: Problem) -> Step:
        return Adaptive(problem, self.bounds, set(checkpoints(self.steps)), self.rho)


class Adaptive:
    """The step of one run, with all that it remembers of each sample: best point and its gradient, progress, size."""

    best: Tensor
    best_grad: Tensor
    before: Tensor

    def __init__(self, problem: Problem, bounds: tuple[float, float], checkpoints: set[int], rho: float) -> None:
        self.x, self.eps, self.bounds, self.checkpoints, self.rho = problem.x, problem.eps, bounds, checkpoints, rho
        self.low = (problem.x - problem.eps).clamp_(min=bounds[0])
        self.high = (problem.x + problem.eps).clamp_(max=bounds[1])
        self.size = 2 * problem.eps * problem.x.new_ones(len(problem.x), *[1] * (problem.x.dim() - 1))
        self.taken = 0

    def __call__(self, point: Tensor, found: Found, out: Tensor) -> Tensor:
        grad = found.grad
        if self.taken == 0:
            self.begin(point, found)
        else:
            self.remember(point, found)
            if self.taken in self.checkpoints:
                stuck = self.no_progress()
                self.size = torch.where(per_sample(stuck, point), self.size / 2, self.size)
                point = torch.where(per_sample(stuck, point), self.best, point)
                grad = torch.where(per_sample(stuck, point), self.best_grad, grad)

        straight = FK.pgd_step(point, grad, self.x, alpha=self.size, eps=self.eps, bounds=self.bounds)
        share = MOMENTUM if self.taken else 1.0
        moved = torch.lerp(point, straight, share).add_(point - self.before, alpha=1 - share)
        self.before = point.clone()  # what is given as out may be where the point lies
        self.taken += 1
        return torch.minimum(torch.maximum(moved, self.low), self.high, out=out)

    def begin(self, point: Tensor, found: Found) -> None:
        self.before, self.best, self.best_grad = point, point.clone(), found.grad
        self.last_loss = self.best_loss = self.checked_loss = found.losses
        self.risen = torch.zeros_like(found.losses, dtype=torch.int32)
        self.halved = torch.ones_like(found.losses, dtype=torch.bool)  # the first checkpoint only counts
        self.since = 0

    def remember(self, point: Tensor, found: Found) -> None:
        better = found.losses > self.best_loss
        self.best = torch.where(per_sample(better, point), point, self.best)
        self.best_grad = torch.where(per_sample(better, point), found.grad, self.best_grad)
        self.best_loss = torch.where(better, found.losses, self.best_loss)
        self.risen = self.risen + (found.losses > self.last_loss)
        self.last_loss = found.losses
        self.since += 1

    def no_progress(self) -> Tensor:
        """Conditions 1 and 2 of the paper's Section 3.2, per sample."""
        rarely = self.risen <= self.rho * self.since
        same = ~self.halved & (self.best_loss <= self.checked_loss)
        self.halved = rarely | same
        self.checked_loss, self.risen, self.since = self.best_loss, torch.zeros_like(self.risen), 0
        return self.halved


def checkpoints(steps: int) -> Iterator[int]:
    """After how many steps progress is checked: the first 22 %, then 3 % less each time, at least 6 %."""
    length, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    at = length
    while at < steps:
        yield at
        length = max(length - less, least)
        at += length
