"""Models small enough to train while somebody waits."""

from __future__ import annotations

from torch import nn


def digits_cnn(width: int = 8) -> nn.Sequential:
    """Three convolutions for 8×8 grey images, ``[B, 1, 8, 8]`` to logits ``[B, 10]``; 4,362 weights."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )
