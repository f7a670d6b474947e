"""Data sets that come with a dependency: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """``images`` float32 ``[N, C, H, W]`` in [0, 1] and ``labels`` int64 ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[rows], self.labels[rows]


@dataclass(frozen=True)
class Split:
    train: Images
    validation: Images
    test: Images


def digits() -> Split:
    """scikit-learn's 1797 handwritten digits, 8×8, cut once and for all into 808 / 360 / 629, stratified by class."""
    pixels, labels = load_digits(return_X_y=True)
    train, held_out = train_test_split(np.arange(len(labels)), train_size=808, stratify=labels, random_state=0)
    validation, test = train_test_split(held_out, train_size=360, stratify=labels[held_out], random_state=0)

    def part(rows: np.ndarray) -> Images:
        images = torch.from_numpy(pixels[rows]).float().div(16).reshape(-1, 1, 8, 8)
        return Images(images, torch.from_numpy(labels[rows]).long())

    return Split(part(train), part(validation), part(test))
