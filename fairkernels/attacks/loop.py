"""The one loop of all attacks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .objective import Found, Objective

Step = Callable[[Tensor, Found, Tensor], Tensor]
"""``(point, what was found there, memory for the result) -> the next point``, back in ball and bounds."""


class Worst:
    """The point that is worst for each sample: one that reaches the goal before one that does not, then by loss."""

    def __init__(self) -> None:
        self.point: Tensor | None = None

    def see(self, point: Tensor, losses: Tensor, reached: Tensor) -> None:
        if self.point is None:
            self.point, self.losses, self.reached = point.clone(), losses, reached
            return
        better = torch.where(reached == self.reached, losses > self.losses, reached)
        self.point = torch.where(per_sample(better, point), point, self.point)
        self.losses = torch.where(better, losses, self.losses)
        self.reached = reached | self.reached


def iterate(
    objective: Objective, step: Step, start: Tensor, steps: int, *, worst: Worst | None = None, freeze: bool = False
) -> Tensor:
    """``steps`` steps from ``start``, which is not written to; nothing waits for the device.

    Args:
        worst: sees every point at which a gradient was taken.
        freeze: a sample that has reached its goal moves no further.
    """
    if steps == 0:
        return start.clone()
    buffers = [torch.empty_like(start) for _ in range(2 if freeze else 1)]  # a step may write where it reads
    point = start
    for index in range(steps):
        found = objective(point)
        if worst is not None:
            worst.see(point, found.losses, found.reached())
        out = buffers[index % len(buffers)]
        moved = step(point, found, out)
        point = torch.where(per_sample(found.reached(), point), point, moved, out=out) if freeze else moved
    return point


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``[N]`` to ``[N, 1, ...]``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
