"""What an attack climbs: from a point to logits, to one loss a sample, to the gradient at the point alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairkernels.ops import check

from .losses import Loss

Forward = Callable[[Tensor], Tensor]
"""From images to logits ``[N, K]``, or from points to images."""


class Goal(NamedTuple):
    """Classes to be left or, ``targeted``, to be reached; ``labels`` int64 ``[N]``."""

    labels: Tensor
    targeted: bool

    def reached(self, logits: Tensor) -> Tensor:
        """Whether the model is fooled as intended, bool ``[N]``."""
        hit = logits.argmax(-1) == self.labels
        return hit if self.targeted else ~hit


class Found(NamedTuple):
    """What is known of a point: one loss a sample, whether its goal is reached, the gradient."""

    losses: Tensor
    reached: Callable[[], Tensor]
    grad: Tensor


class Objective:
    """Loss and gradient at a point.

    Args:
        forward: images to logits.
        loss: logits to one value a sample.
        goal: for whom.
        render: points to images, differentiable; None: points are images.
        passes: of the model, averaged: expectation over its randomness (Athalye et al., arXiv 1707.07397).
    """

    def __init__(self, forward: Forward, loss: Loss, goal: Goal, render: Forward | None = None, passes: int = 1):
        self.forward, self.loss, self.goal = forward, loss, goal
        self.render, self.passes = render, passes
        self.weights: Tensor | None = None  # of the samples in the sum that is differentiated, see admit

    def __call__(self, point: Tensor) -> Found:
        total = self.once(point)
        for _ in range(self.passes - 1):
            total = [one + other for one, other in zip(total, self.once(point), strict=True)]
        losses, logits, grad = total if self.passes == 1 else [one / self.passes for one in total]
        return Found(losses, lambda: self.goal.reached(logits), grad)

    def once(self, point: Tensor) -> list[Tensor]:
        leaf = point.detach().requires_grad_()
        losses, logits = self.losses(leaf)
        assert self.weights is not None
        if not losses.requires_grad:
            raise RuntimeError("the model gives no gradient: its logits do not depend on the images, or are detached")
        (grad,) = torch.autograd.grad(losses, leaf, self.weights.to(losses.dtype), allow_unused=True)
        if grad is None:
            raise RuntimeError("the model gives no gradient: its logits do not depend on the images")
        return [losses.detach(), logits.detach(), grad]

    @torch.no_grad()
    def judge(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of a point and whether it has reached its goal, ``[N]`` each, without a gradient."""
        found = [self.losses(point) for _ in range(self.passes)]
        losses, logits = (torch.stack(values).mean(0) for values in zip(*found, strict=True))
        return losses, self.goal.reached(logits)

    def losses(self, point: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.forward(self.render(point) if self.render else point)
        if self.weights is None:
            check_logits(logits, len(point))
            self.admit(logits)
        return self.loss(logits, *self.goal), logits

    def admit(self, logits: Tensor) -> None:
        """The first logits say which labels there are.

        On a GPU nobody waits to look: a sample whose label is none of them has weight 0 and does not move.
        """
        labels, valid = known(self.goal.labels, logits.shape[-1])
        self.goal = Goal(labels, self.goal.targeted)
        self.weights = valid.to(logits.dtype)


def known(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Labels that are classes and which were; on a GPU, where nobody waits to look, 0 stands for those that are none.

    Raises:
        IndexError: on the CPU, naming the first that is none.
    """
    valid = (labels >= 0) & (labels < classes)
    if labels.is_cpu and not valid.all():
        row = int(valid.to(torch.uint8).argmin())
        raise IndexError(f"labels[{row}] must be in [0, {classes}), got {int(labels[row])}")
    return torch.where(valid, labels, 0), valid


def check_logits(logits: Any, samples: int) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return logits [N, K], got {type(logits).__name__}; wrap it to return them alone"
        )
    check.floating(logits, "the model's logits")
    if logits.dim() != 2 or logits.shape[0] != samples:
        raise ValueError(f"the model must return logits [{samples}, K], got {check.shape(logits)}")
