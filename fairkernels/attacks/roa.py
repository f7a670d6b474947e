"""Rectangular occlusion: a sticker at the worst place (Wu et al., arXiv 1909.09552)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairkernels.ops import check

from .base import Options, Problem, Size
from .gradient import PGD, within
from .objective import Goal

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ROA(PGD):
    """Search the place where a grey rectangle hurts each sample most, then PGD inside it, from the grey.

    All rectangles are tried, ``stride`` apart, the last place that fits included; many go through the model at once.

    Args:
        size: rows and columns of the rectangle, or one number for both.
        stride: rows and columns from one place to the next, likewise.
        alpha, steps: of the PGD.
        grey: the rectangle while it is searched, and where PGD starts; a share of the bounds.
        search_batch: images that go through the model at once while searching.
        model, options: see :class:`Attack`. Each further restart begins at uniform noise inside the same rectangle.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        size: int | tuple[int, int] = (70, 70),
        stride: int | tuple[int, int] = (10, 10),
        alpha: Size = 0.02,
        steps: int = 40,
        *,
        grey: float = 0.5,
        search_batch: int = 256,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, eps=1.0, alpha=alpha, steps=steps, random_start=False, **options)
        self.size, self.stride = pair(size, "size"), pair(stride, "stride")
        check.integer(search_batch, "search_batch")
        check.non_negative(grey, "grey")
        if search_batch < 1 or grey > 1:
            raise ValueError(f"search_batch must be >= 1 and grey <= 1, got {search_batch} and {grey}")
        self.grey, self.search_batch = self.bounds[0] + grey * (self.bounds[1] - self.bounds[0]), search_batch

    def problem(self, x: Tensor, labels: Tensor | None) -> Problem:
        problem = super().problem(x, labels)._replace(eps=self.bounds[1] - self.bounds[0])
        return problem._replace(mask=self.search(problem))

    def start(self, problem: Problem, restart: int) -> Tensor:
        paint = torch.full_like(problem.x, self.grey)
        if restart:
            generator = torch.Generator(paint.device).manual_seed(self.draw())
            paint.uniform_(*self.bounds, generator=generator)
        return within(problem.mask, paint, problem.x)

    @torch.no_grad()
    def search(self, problem: Problem) -> Tensor:
        """The rectangle with the largest loss for each sample, bool ``[N, 1, H, W]``."""
        x, labels = problem.x, problem.goal.labels
        height, width = x.shape[-2:]
        places = rectangles(height, width, self.size, self.stride, x.device)
        best = x.new_full((len(x),), -torch.inf, dtype=torch.promote_types(x.dtype, torch.float32))
        where = torch.zeros_like(labels)

        first = 0
        for some in places.split(max(1, self.search_batch // len(x))):
            painted = torch.where(some[:, None, None], self.grey, x)  # [P, N, C, H, W]
            goal = Goal(labels.repeat(len(some)), problem.goal.targeted)
            losses, _ = self.objective(problem._replace(goal=goal)).judge(painted.flatten(0, 1))
            largest, index = losses.reshape(len(some), len(x)).to(best.dtype).max(0)
            where = torch.where(largest > best, first + index, where)
            best = torch.maximum(best, largest)
            first += len(some)
        return places[where].unsqueeze(1)


def rectangles(height: int, width: int, size: tuple[int, int], stride: tuple[int, int], device: torch.device) -> Tensor:
    """All places of a rectangle, bool ``[P, height, width]``: ``stride`` apart, and the last that fits.

    Raises:
        ValueError: if the rectangle does not fit.
    """
    if size[0] > height or size[1] > width:
        raise ValueError(f"size must fit into images of {height}x{width}, got {size[0]}x{size[1]}")
    tops, lefts = (
        torch.tensor(sorted({*range(0, room, step), room}), device=device)
        for room, step in ((height - size[0], stride[0]), (width - size[1], stride[1]))
    )
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    down = (rows >= tops[:, None]) & (rows < tops[:, None] + size[0])
    across = (columns >= lefts[:, None]) & (columns < lefts[:, None] + size[1])
    return (down[:, None, :, None] & across[None, :, None, :]).flatten(0, 1)


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    for one in both:
        check.integer(one, name)
    if len(both) != 2 or min(both) < 1:
        raise ValueError(f"{name} must be a positive int or (rows, columns), got {value!r}")
    return both[0], both[1]
