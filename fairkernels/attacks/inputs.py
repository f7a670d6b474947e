"""What comes in: images, labels, normalisation."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fairkernels.ops import check


def checked_images(images: Any) -> None:
    check.floating(images, "images")
    if images.dim() != 4:
        raise ValueError(f"images must be [N, C, H, W], got {check.shape(images)}")


def checked_labels(labels: Any, images: Tensor, needed: bool, name: str = "labels") -> Tensor | None:
    """Labels as int64 ``[N]``."""
    if labels is None:
        if needed:
            raise TypeError(f"{name} are missing: pass int64 [N], got None")
        return None
    check.integers(labels, name)
    check.same_device(labels, name, images, "images")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name} must be [{len(images)}] like images {check.shape(images)}, got {check.shape(labels)}")
    return labels.detach().to(torch.int64)


class Normalization:
    """``(pixels - mean) / std``, per channel, and back."""

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = (torch.as_tensor(values, dtype=torch.float64).flatten() for values in (mean, std))
        if self.mean.shape != self.std.shape or not (self.std > 0).all():
            raise ValueError(
                "normalization must be (mean, std) of one positive std per mean, got "
                f"{self.mean.tolist()} and {self.std.tolist()}"
            )
        self.moved = lru_cache(maxsize=8)(self._moved)  # a captured graph reads them where they are

    def _moved(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mean, std = (values.to(device, dtype).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.mean) not in (1, images.shape[1]):
            raise ValueError(f"normalization is for {len(self.mean)} channels, images are {check.shape(images)}")
        return self.moved(images.device, images.dtype)

    def normalized(self, pixels: Tensor) -> Tensor:
        mean, std = self.of(pixels)
        return (pixels - mean) / std

    def pixels(self, images: Tensor, bounds: tuple[float, float]) -> Tensor:
        """Back to pixels; what has left the bounds by rounding alone is put back."""
        mean, std = self.of(images)
        pixels = images * std + mean
        slack = 4 * torch.finfo(images.dtype).eps * max(1.0, *(abs(bound) for bound in bounds))
        low, high = bounds
        inside = pixels.clamp(low, high)
        return torch.where((pixels - inside).abs() <= slack, inside, pixels)
