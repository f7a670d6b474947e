"""Attacks by one gradient, or by one after the other, in the ball around the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairkernels import functional as FK
from fairkernels.ops import check

from . import losses
from .base import Attack, CommonOptions, Options, Problem, Size
from .loop import Step
from .steps import along_momentum, fused_step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PGD(Attack):
    """Projected gradient descent in the l∞ ball (Madry et al., arXiv 1706.06083, Sec. 2.1).

    Args:
        random_start: begin at a uniform point of the ball instead of the images.
        model, alpha, eps, steps, options: see :class:`Attack`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        eps: Size = 8 / 255,
        alpha: Size = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, eps=eps, alpha=alpha, steps=steps, **options)
        self.random_start = random_start

    def start(self, problem: Problem, restart: int) -> Tensor:
        if not self.random_start:
            return problem.x
        start = FK.random_start(problem.x, eps=problem.eps, norm=self.norm, bounds=self.bounds, seed=self.draw())
        return within(problem.mask, start, problem.x)

    def step(self, problem: Problem) -> Step:
        return fused_step(problem, self.norm, self.bounds)


class PGDL2(PGD):
    """The same in the l2 ball of each sample: along the gradient of length ``alpha``; from uniform in the ball."""

    norm = "l2"

    def __init__(
        self,
        model: Callable[..., Any],
        eps: Size = 1.0,
        alpha: Size = 0.2,
        steps: int = 10,
        random_start: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start, **options)


class MaskedPGD(PGD):
    """PGD inside a mask; every pixel outside stays what it is, bit by bit.

    Args:
        mask: what broadcasts to the images: ``[H, W]``, ``[N, 1, H, W]``, ...; 1 where the attack may draw.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        mask: Tensor,
        eps: Size = 8 / 255,
        alpha: Size = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start, **options)
        check.mask(mask, "mask")
        self.mask = mask


class FGSM(PGD):
    """One step of length ``eps`` from the images (Goodfellow et al., arXiv 1412.6572)."""

    def __init__(self, model: Callable[..., Any], eps: Size = 8 / 255, **options: Unpack[Options]) -> None:
        super().__init__(model, eps, eps, 1, False, **options)


class FFGSM(PGD):
    """One step of length ``alpha`` from a uniform point of the ball (Wong et al., arXiv 2001.03994)."""

    def __init__(
        self, model: Callable[..., Any], eps: Size = 8 / 255, alpha: Size = 10 / 255, **options: Unpack[Options]
    ) -> None:
        super().__init__(model, eps, alpha, 1, True, **options)


class MIFGSM(PGD):
    """Along the momentum of normalised gradients, from the images (Dong et al., arXiv 1710.06081, Eq. 6 and 7).

    Args:
        decay: μ, what is left of the momentum after a step.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        eps: Size = 8 / 255,
        alpha: Size = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, eps, alpha, steps, False, **options)
        check.non_negative(decay, "decay")
        self.decay = decay

    def step(self, problem: Problem) -> Step:
        return along_momentum(super().step(problem), self.decay)


class TPGD(PGD):
    """PGD on KL(clean ‖ adversarial), from 0.001 of normal noise (TRADES, Zhang et al., arXiv 1901.08573).

    Called with images alone; labels only say what counts as reached, by default leaving the clean prediction.
    """

    needs_labels = False

    def __init__(
        self,
        model: Callable[..., Any],
        eps: Size = 8 / 255,
        alpha: Size = 2 / 255,
        steps: int = 10,
        **options: Unpack[CommonOptions],
    ) -> None:
        refused = [name for name in ("loss", "targeted") if name in options]
        if refused:
            raise ValueError(f"TPGD leaves the clean prediction: it takes no {' and no '.join(refused)}")
        super().__init__(model, eps, alpha, steps, True, **options)

    def problem(self, x: Tensor, labels: Tensor | None) -> Problem:
        natural = self.clean_logits(x)
        return super().problem(x, natural.argmax(-1) if labels is None else labels)._replace(natural=natural)

    def start(self, problem: Problem, restart: int) -> Tensor:
        x = problem.x
        generator = torch.Generator(x.device).manual_seed(self.draw())
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)  # the same for any strides
        return within(problem.mask, (x + 0.001 * noise).clamp_(*self.bounds), x)

    def raised(self, problem: Problem) -> losses.Loss:
        assert problem.natural is not None
        return losses.divergence_from(problem.natural)


def within(mask: Tensor | None, moved: Tensor, x: Tensor) -> Tensor:
    return moved if mask is None else torch.where(mask != 0, moved, x)
