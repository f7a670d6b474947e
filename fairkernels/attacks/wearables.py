"""Attacks that could be worn: eyeglasses and face masks, unbounded inside their shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairkernels.ops import check

from .base import Attack, Options, Problem, Size
from .gradient import within
from .inputs import broadcasting
from .loop import Step, Worst
from .objective import Forward, Found
from .shapes import eyeglasses, face_mask
from .steps import along_momentum, fused_step

if TYPE_CHECKING:
    from typing_extensions import Unpack

FRAMES = ((128, 128, 128), (220, 130, 0), (160, 105, 55), (200, 175, 30), (220, 210, 50))
"""Colours of the frames tried as a start, of 255, after Sharif et al."""

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: the grey of a colour
LEVELS = 255


Shape = Tensor | Callable[[int, int], Tensor]
"""What broadcasts to the images, not 0 inside, or a function of their height and width that draws it."""


class Wearable(Attack):
    """A shape of the size of the images, drawn or given; what is inside is the attacker's."""

    def __init__(
        self, model: Callable[..., Any], *, steps: int, alpha: Size, mask: Shape, **options: Unpack[Options]
    ) -> None:
        super().__init__(model, alpha=alpha, eps=0.0, steps=steps, **options)
        if not callable(mask):
            check.mask(mask, "mask")
        self.shape = mask

    def problem(self, x: Tensor, labels: Tensor | None) -> Problem:
        mask = self.shape(*x.shape[-2:]) if callable(self.shape) else self.shape
        check.mask(mask, "mask")
        mask = broadcasting(mask, "mask", x) != 0
        return super().problem(x, labels)._replace(mask=mask, eps=self.bounds[1] - self.bounds[0])


class EyeglassAttack(Wearable):
    """Painted frames of eyeglasses, in 8 bits a channel (Sharif et al., CCS 2016).

    The start is the frame colour that is worst for each sample. A step adds ``alpha`` times the gradient, in units of
    its largest entry, to ``decay`` times the last step; an entry that would leave the bounds stays and forgets. The
    model sees, and the caller gets, pixels rounded to 255 levels; the step starts from those that are not rounded
    (straight-through), so that steps shorter than half a level add up instead of being rounded away.

    Args:
        steps: how many.
        alpha: longest step of a pixel.
        mask: the frames, see :data:`Shape`; drawn, or :func:`load_shape` of a file.
        decay: of the last step.
        model, options: see :class:`Attack`. Each further restart begins at random colours.
    """

    operator = None  # its step is along the gradient itself, not its sign: plain PyTorch

    def __init__(
        self,
        model: Callable[..., Any],
        steps: int = 300,
        alpha: Size = 20 / 255,
        mask: Shape = eyeglasses,
        *,
        decay: float = 0.4,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, steps=steps, alpha=alpha, mask=mask, **options)
        check.non_negative(decay, "decay")
        self.decay = decay

    def start(self, problem: Problem, restart: int) -> Tensor:
        x, low, high = problem.x, *self.bounds
        if restart:
            generator = torch.Generator(x.device).manual_seed(self.draw())
            colours = torch.empty(*x.shape[:2], 1, 1, dtype=x.dtype, device=x.device)
            return within(problem.mask, colours.uniform_(low, high, generator=generator), x)

        objective, worst = self.objective(problem), Worst()
        for colour in frame_colours(x) * (high - low) + low:
            painted = within(problem.mask, colour, x)
            worst.see(painted, *objective.judge(painted))
        assert worst.point is not None
        return worst.point

    def render(self, problem: Problem) -> Forward:
        low, high = self.bounds

        def rounded(point: Tensor) -> Tensor:
            pixels = ((point - low) / (high - low) * LEVELS).round() / LEVELS * (high - low) + low
            seen = within(problem.mask, pixels, point).detach()
            return seen + (point - point.detach())  # exactly what is seen, with the gradient of the point

        return rounded

    def step(self, problem: Problem) -> Step:
        low, high = self.bounds
        last = torch.zeros_like(problem.x)
        assert problem.mask is not None
        inside = problem.mask.to(problem.x.dtype)

        def step(point: Tensor, found: Found, out: Tensor) -> Tensor:
            grad = found.grad * inside
            largest = grad.abs().amax(tuple(range(1, grad.dim())), keepdim=True)
            known = (largest > 0) & (largest < torch.inf)
            push = torch.where(known, grad * (problem.alpha / largest), 0)
            last.mul_(self.decay).add_(push)
            beyond = (point + last < low) | (point + last > high)
            return torch.add(point, last.masked_fill_(beyond, 0), out=out)

        return step


class FaceMaskAttack(Wearable):
    """A pattern on a face mask: a coarse grid of colours, bilinear between them (Tong et al., FACESEC, CVPR 2021).

    Momentum of normalised gradients and sign steps on the grid, which is added to the images inside the mask and
    clipped to the bounds.

    Args:
        steps: how many.
        alpha: step of a grid point.
        mask: the cloth, likewise.
        grid: rows and columns of the grid.
        decay: what is left of the momentum after a step.
        model, options: see :class:`Attack`. Each further restart begins at a random grid.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        steps: int = 50,
        alpha: Size = 20 / 255,
        mask: Shape = face_mask,
        *,
        grid: tuple[int, int] = (8, 16),
        decay: float = 0.4,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, steps=steps, alpha=alpha, mask=mask, **options)
        for size in grid:
            check.integer(size, "grid")
            if size < 1:
                raise ValueError(f"grid must be (rows, columns), got {grid}")
        check.non_negative(decay, "decay")
        self.grid, self.decay = grid, decay

    def start(self, problem: Problem, restart: int) -> Tensor:
        grid = problem.x.new_zeros(*problem.x.shape[:2], *self.grid)
        if not restart:
            return grid
        generator = torch.Generator(grid.device).manual_seed(self.draw())
        reach = self.bounds[1] - self.bounds[0]
        return grid.uniform_(-reach, reach, generator=generator)

    def render(self, problem: Problem) -> Forward:
        def worn(grid: Tensor) -> Tensor:
            pattern = F.interpolate(grid, problem.x.shape[-2:], mode="bilinear", align_corners=False)
            return within(problem.mask, (problem.x + pattern).clamp(*self.bounds), problem.x)

        return worn

    def step(self, problem: Problem) -> Step:
        still = problem.x.new_zeros(()).expand(*problem.x.shape[:2], *self.grid)
        reach = self.bounds[1] - self.bounds[0]
        on_grid = problem._replace(x=still, eps=reach, mask=None)
        return along_momentum(fused_step(on_grid, "linf", (-reach, reach)), self.decay)


def frame_colours(images: Tensor) -> Tensor:
    """:data:`FRAMES` for these images, ``[5, C, 1, 1]``: colours for three channels, else their grey."""
    colours = images.new_tensor(FRAMES) / 255
    if images.shape[1] != 3:
        colours = (colours @ images.new_tensor(LUMA))[:, None].expand(-1, images.shape[1])
    return colours[..., None, None]
