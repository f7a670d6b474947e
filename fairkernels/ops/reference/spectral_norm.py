"""Largest singular value with exact first and second derivatives, ties and zero matrices included.

Autograd of ``torch.linalg.matrix_norm(M, 2)`` is NaN where singular values tie and at M = 0. Here the gradient is
``u vᵀ`` and its derivative the resolvent formula, both finite everywhere.
"""

from typing import Any

import torch
from torch import Tensor


def leading_pair(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``sigma, u, v`` of the largest singular value; zeros for a zero matrix, NaN if an entry is not finite."""
    finite = matrix.isfinite().all(-1).all(-1)
    u, s, vh = torch.linalg.svd(torch.where(finite[..., None, None], matrix, 0), full_matrices=False)
    u, sigma, v = u[..., :, 0], s[..., 0], vh[..., 0, :]
    v = torch.where((v.sum(-1, keepdim=True) < 0), -v, v)  # one sign of the two, the same on every machine
    u = torch.where((sigma > 0).unsqueeze(-1), (matrix @ v.unsqueeze(-1)).squeeze(-1) / sigma.unsqueeze(-1), 0)
    v = torch.where((sigma > 0).unsqueeze(-1), v, 0)
    poison = torch.where(finite, 0, torch.nan)
    return sigma + poison, u + poison.unsqueeze(-1), v + poison.unsqueeze(-1)


def resolvent(matrix: Tensor, direction: Tensor) -> Tensor:
    """``D²σ(M)[H]``: how ``u vᵀ`` moves when M moves along H; singular values tied with the top do not turn it."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=True)
    v = vh.mT
    top = s[..., :1]
    rotated = u.mT @ direction @ v
    a, b = rotated[..., :, 0], rotated[..., 0, :]  # UᵀHv₁ and VᵀHᵀu₁

    def turn(own: Tensor, other: Tensor) -> Tensor:
        rows, columns = own.shape[-1], other.shape[-1]
        values = torch.nn.functional.pad(s, (0, rows - s.shape[-1]))
        gap = top.square() - values.square()
        tied = gap <= 16 * torch.finfo(s.dtype).eps * top.square()
        other = torch.nn.functional.pad(other, (0, max(rows - columns, 0)))[..., :rows]
        return torch.where(tied, 0, (top * own + values * other) / torch.where(tied, 1, gap))

    left = (u @ turn(a, b).unsqueeze(-1)) @ v[..., :, :1].mT
    right = u[..., :, :1] @ (v @ turn(b, a).unsqueeze(-1)).mT
    return left + right


class _Direction(torch.autograd.Function):
    """``M -> u vᵀ``, the gradient of σ; its own derivative is symmetric, so backward is the resolvent again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        _, u, v = leading_pair(matrix)
        return u.unsqueeze(-1) * v.unsqueeze(-2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        return resolvent(matrix, grad)


class _Sigma(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return leading_pair(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        return grad[..., None, None] * _Direction.apply(matrix)


def spectral_norm(
    matrix: Tensor, start: Tensor | None, method: str, iters: int | None, tol: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact, by a singular value decomposition; ``start``, ``method``, ``iters`` and ``tol`` steer the kernels only."""
    if 0 in matrix.shape:
        return (
            matrix.sum((-2, -1)),
            matrix.new_zeros(matrix.shape[:-1]),
            matrix.new_zeros((*matrix.shape[:-2], matrix.shape[-1])),
        )
    return _Sigma.apply(matrix)
