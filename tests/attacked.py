"""Models and images that the tests of the attacks share."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn")

from fairkernels.app.data import Images
from fairkernels.app.experiment import Method as Training
from fairkernels.app.experiment import Settings, load_data, restore, train

EPS = 0.1


def small_cnn(channels: int = 3, classes: int = 7, seed: int = 0) -> nn.Sequential:
    """Smooth, so that rounding can not turn the sign of a gradient; any image size; float64; in eval mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(12 * 9, classes),
    )
    return model.double().eval()


def batch(
    size: int = 9, channels: int = 3, height: int = 11, width: int = 10, classes: int = 7
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, channels, height, width, generator=generator, dtype=torch.float64)
    return images, torch.randint(classes, (size,), generator=generator)


@cache
def robust_digits() -> nn.Module:
    """An adversarially trained classifier of digits, at l∞ radius ``EPS``."""
    weights = train(Settings(radius=EPS, epochs=25), Training("adversarial training"), 0)
    return restore(weights).eval().requires_grad_(False)


def held_out(count: int | None = None) -> Images:
    images, labels = load_data().test.images[:count], load_data().test.labels[:count]
    return Images(images, labels)


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(-1) == labels).double().mean().item()
