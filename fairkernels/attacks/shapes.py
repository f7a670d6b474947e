"""Shapes of what attackers wear: eyeglasses and face masks, drawn for any image size or loaded from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fairkernels.ops import check


def eyeglasses(height: int, width: int, *, thickness: float = 0.03) -> Tensor:
    """Frames of eyeglasses on a face that fills the image, its eyes 45 % down: bool ``[height, width]``.

    Args:
        height, width: of the image, in pixels.
        thickness: of the rims, as a share of the height; at least one pixel is drawn.

    Returns:
        At the default thickness about as much of the image as Sharif et al. (CCS 2016) paint, 6.5 %.

    Raises:
        TypeError, ValueError: for a size that is none.
    """
    x, y = face_coordinates(height, width)
    half = max(thickness, 1 / height)

    beside = (x.abs() - 0.21).abs()  # from the centre of either lens
    lens = (beside / 0.15) ** 4 + ((y - 0.45) / 0.08) ** 4
    outer = (beside / (0.15 + half)) ** 4 + ((y - 0.45) / (0.08 + half)) ** 4
    rims = (outer <= 1) & (lens > 1)
    bridge = (x.abs() < 0.08) & ((y - 0.42).abs() <= half / 2)
    temples = (x.abs() > 0.35) & (x.abs() < 0.48) & ((y - 0.41).abs() <= half / 2)
    return rims | bridge | temples


def face_mask(height: int, width: int) -> Tensor:
    """A mask over nose, mouth and chin, with the straps to the ears: bool ``[height, width]``.

    Raises:
        TypeError, ValueError: for a size that is none.
    """
    x, y = face_coordinates(height, width)
    cloth = (y > 0.57) & (y < 0.99) & (x.abs() < 0.36 - 0.9 * (y - 0.67).clamp(min=0) ** 1.2)
    upper = ((y - (0.61 - 0.3 * (x.abs() - 0.34))).abs() <= max(0.012, 0.6 / height)) & (x.abs() > 0.34)
    lower = ((y - (0.77 - 0.5 * (x.abs() - 0.30))).abs() <= max(0.012, 0.6 / height)) & (x.abs() > 0.30)
    return cloth | ((upper | lower) & (x.abs() < 0.48))


def load_shape(path: str | Path, height: int, width: int) -> Tensor:
    """A shape from a picture (bright is inside) or a ``.npy`` array (not 0 is inside), brought to the image's size.

    Args:
        path: ``.npy`` of ``[h, w]`` or ``[h, w, channels]``, or any picture that matplotlib reads.
        height, width: of the image, in pixels.

    Returns:
        bool ``[height, width]``.

    Raises:
        ValueError: if nothing is inside, or the file holds no picture.
        OSError: if there is no such file.
    """
    from matplotlib.image import imread  # takes a while

    drawn = np.load(path) != 0 if Path(path).suffix == ".npy" else bright(imread(path))
    drawn = drawn.any(-1) if drawn.ndim == 3 else drawn
    if drawn.ndim != 2 or not drawn.any():
        raise ValueError(f"{path} must hold a shape [h, w] that is not empty, got {list(drawn.shape)}")
    image = torch.from_numpy(drawn).float()[None, None]
    return F.interpolate(image, (height, width), mode="nearest-exact")[0, 0] > 0.5


def bright(picture: np.ndarray) -> np.ndarray:
    """Pixels brighter than half; alpha hides."""
    values = picture.astype(np.float64) / (255 if picture.dtype == np.uint8 else 1)
    if values.ndim == 3 and values.shape[-1] in (2, 4):
        values = values[..., :-1] * values[..., -1:]
    return values.mean(-1) > 0.5 if values.ndim == 3 else values > 0.5


def face_coordinates(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Centres of the pixels: across from -0.5 to 0.5, down from 0 to 1."""
    for name, size in (("height", height), ("width", width)):
        check.integer(size, name)
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
    down = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    across = (2 * torch.arange(width, dtype=torch.float64) + 1 - width) / (2 * width)  # symmetric to the bit
    return across.expand(height, width), down[:, None].expand(height, width)
