"""Models small enough to train while somebody waits."""

from __future__ import annotations

from torch import nn


def digits_cnn(width: int = 16) -> nn.Sequential:
    """Two convolutions for 8×8 grey images, ``[B, 1, 8, 8]`` to logits ``[B, 10]``; 9,930 weights."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 4 * 4, 10),
    )
