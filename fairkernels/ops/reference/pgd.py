"""The step of projected gradient descent and its random start."""

import math

import torch
from torch import Tensor

from ._philox import uniforms


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alphas: Tensor | None,
    epsilons: Tensor | None,
    lows: Tensor | None,
    highs: Tensor | None,
    mask: Tensor | None,
    alpha: float,
    eps: float,
    low: float,
    high: float,
    norm: str,
    targeted: bool,
) -> Tensor:
    step, radius = given(alphas, alpha, x), given(epsilons, eps, x)
    allowed = 1.0 if mask is None else mask.to(x.dtype)
    direction = -1.0 if targeted else 1.0

    if norm == "linf":
        moved = x_adv + direction * step * allowed * torch.sign(grad)  # sign(NaN) = 0: only the projection moves it
        moved = torch.minimum(torch.maximum(moved, x - radius), x + radius)
    else:
        moved = l2_step(x_adv - x, grad * allowed, direction * step, radius) + x
    return clip(moved, given(lows, low, x), given(highs, high, x))


def l2_step(delta: Tensor, grad: Tensor, step: Tensor, radius: Tensor) -> Tensor:
    """The step along the normalised gradient and back into the ball, per sample."""
    scaled = step / (per_sample_sum(grad * grad).sqrt() + 1e-10)
    moved = delta + scaled * grad
    length2 = per_sample_sum(moved * moved)
    return moved * torch.where(length2 <= radius * radius, 1, radius / length2.sqrt())


def random_start(
    x: Tensor,
    epsilons: Tensor | None,
    lows: Tensor | None,
    highs: Tensor | None,
    eps: float,
    low: float,
    high: float,
    norm: str,
    seed: int,
) -> Tensor:
    radius = given(epsilons, eps, x)
    noise = uniforms(x.numel() + x.numel() % 2, seed, stream=0, device=x.device, dtype=torch.float64)

    if norm == "linf":
        noise = noise[: x.numel()].reshape(x.shape).to(x.dtype)
        return clip(x + radius * (2 * noise - 1), given(lows, low, x), given(highs, high, x))

    direction = box_muller(noise)[: x.numel()].reshape(x.shape)
    length = per_sample_sum(direction * direction).sqrt()
    share = sample_uniforms(x, seed) ** (1 / max(x[:1].numel(), 1))
    moved = x + (radius * share * torch.where(length > 0, direction / length, 0)).to(x.dtype)
    return clip(moved, given(lows, low, x), given(highs, high, x))


def box_muller(noise: Tensor) -> Tensor:
    """Normals: a pair of neighbouring uniforms gives a pair of them."""
    first, second = noise.reshape(-1, 2).unbind(-1)
    length, angle = (-2 * torch.log1p(-first)).sqrt(), 2 * math.pi * second
    return torch.stack((length * angle.cos(), length * angle.sin()), -1).flatten()


def sample_uniforms(x: Tensor, seed: int) -> Tensor:
    """One uniform a sample, ``[N, 1, ...]``: the first value of each counter of stream 1."""
    samples = x.shape[0]
    draws = uniforms(4 * samples, seed, stream=1, device=x.device, dtype=torch.float64)[::4]
    return draws.reshape(samples, *[1] * (x.dim() - 1))


def given(values: Tensor | None, scalar: float, like: Tensor) -> Tensor:
    return torch.tensor(scalar, dtype=like.dtype, device=like.device) if values is None else values


def per_sample_sum(values: Tensor) -> Tensor:
    return values.sum(tuple(range(1, values.dim())), keepdim=True) if values.dim() > 1 else values


def clip(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(values, low), high)
