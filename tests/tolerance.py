"""How good is good enough: no worse than plain PyTorch in the same dtype, both measured against float64."""

import torch
from torch import Tensor


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute error; infinite where one of the two is NaN or infinite and the other is not."""
    actual, exact = actual.double(), exact.double()
    assert actual.shape == exact.shape, f"shape {list(actual.shape)}, expected {list(exact.shape)}"
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference = torch.where(same, 0, (actual - exact).abs())
    difference = torch.where(difference.isnan(), torch.inf, difference)
    return difference.max().item() if difference.numel() else 0.0


def assert_no_worse(actual: Tensor, plain: Tensor, exact: Tensor, size: float = 1.0, accuracy: float = 0.0) -> None:
    """``actual`` is as near to ``exact`` as ``plain``, give or take the rounding of the result itself.

    Rates and pixels are of ``size`` 1 whatever small difference of theirs is the result. In float64, where nothing
    better is there to measure with, both have the few roundings of a sum. What iterates may besides be wrong by
    ``accuracy``, relative to the result.
    """
    ulps = 30.0 if actual.dtype == torch.float64 else 2.0
    finite = exact[exact.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    scale = max(largest, size)
    plain = plain.to(actual.dtype)
    overflow = torch.finfo(actual.dtype).max if actual.is_floating_point() else 0
    exact = torch.where(exact.abs() > overflow, exact.sign() * torch.inf, exact) if overflow else exact
    rounding = ulps * torch.finfo(actual.dtype).eps * scale if actual.is_floating_point() else 0.0
    allowed = rounding + accuracy * largest
    ours, theirs = error(actual, exact), error(plain, exact)
    assert ours <= theirs + allowed, f"error {ours:.3g}, plain PyTorch {theirs:.3g}, allowed beside it {allowed:.3g}"
