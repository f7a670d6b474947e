"""What comes in: images, labels, normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairkernels.ops import check


def checked_images(images: Any) -> None:
    check.floating(images, "images")
    if images.dim() != 4:
        raise ValueError(f"images must be [N, C, H, W], got {check.shape(images)}")


def checked_labels(labels: Any, images: Tensor, name: str = "labels") -> Tensor:
    """Labels as int64 ``[N]``."""
    check.integers(labels, name)
    check.same_device(labels, name, images, "images")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name} must be [{len(images)}] like images {check.shape(images)}, got {check.shape(labels)}")
    return labels.detach().to(torch.int64)


def broadcasting(value: Tensor, name: str, x: Tensor) -> Tensor:
    """``value`` where ``x`` is, without its history."""
    sizes = zip(value.shape[::-1], x.shape[::-1], strict=False)
    if value.dim() > x.dim() or any(size not in (1, wanted) for size, wanted in sizes):
        raise ValueError(f"{name} must broadcast to {check.shape(x)}, got {check.shape(value)}")
    return value.detach().to(x.device)


class Normalization:
    """``(pixels - mean) / std``, per channel, and back."""

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = (torch.as_tensor(values, dtype=torch.float64).flatten() for values in (mean, std))
        if self.mean.shape != self.std.shape or not (self.std > 0).all():
            raise ValueError(
                "normalization must be (mean, std) of one positive std per mean, got "
                f"{self.mean.tolist()} and {self.std.tolist()}"
            )
        self.there: dict[Any, tuple[Tensor, Tensor]] = {}  # by device and dtype: a captured graph reads where they are

    def of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.mean) not in (1, images.shape[1]):
            raise ValueError(f"normalization is for {len(self.mean)} channels, images are {check.shape(images)}")
        kind = images.device, images.dtype
        if kind not in self.there:
            self.there[kind] = (self.mean.to(*kind).reshape(-1, 1, 1), self.std.to(*kind).reshape(-1, 1, 1))
        return self.there[kind]

    def normalized(self, pixels: Tensor) -> Tensor:
        mean, std = self.of(pixels)
        return (pixels - mean) / std

    def pixels(self, images: Tensor, bounds: tuple[float, float]) -> Tensor:
        """Back to pixels; what has left the bounds by rounding alone is put back."""
        mean, std = self.of(images)
        pixels = images * std + mean
        rounding = max(
            torch.finfo(dtype).eps for dtype in (images.dtype, torch.float32)
        )  # may have been float32 before
        slack = 4 * rounding * max(1.0, *(abs(bound) for bound in bounds))
        low, high = bounds
        inside = pixels.clamp(low, high)
        return torch.where((pixels - inside).abs() <= slack, inside, pixels)
