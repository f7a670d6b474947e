"""Time of the symmetry loss: our kernel, plain PyTorch, and the double loop of the official code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fairkernels import functional as FK
from fairkernels.app.bench_measure import interleaved, seconds_of
from fairkernels.app.bench_rivals import double_loop_loss
from fairkernels.ops import dispatch

Loss = Callable[[Tensor, Tensor], Tensor]

SHAPES = ((128, 10), (128, 100))
"""Batch and classes."""


def eager_loss(logits: Tensor, labels: Tensor, eps: float = 0.1) -> Tensor:
    """The loss as one would write it in plain PyTorch; classes that do not occur are charged as asymmetry."""
    classes = logits.shape[-1]
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    rates = logits.new_zeros(classes, classes).index_add(0, labels, logits.softmax(-1)) / counts[:, None]
    gap, mass = (rates - rates.mT).abs(), rates + rates.mT
    return (gap * mass / (mass + eps)).triu(1).sum()


@dataclass(frozen=True)
class Time:
    name: str
    batch: int
    classes: int
    microseconds: float
    threads: int = 1

    def __str__(self) -> str:
        for unit, size in (("s", 1e6), ("ms", 1e3)):
            if self.microseconds >= size:
                return f"{self.microseconds / size:.2f} {unit}"
        return f"{self.microseconds:.0f} µs"


def implementations() -> dict[str, Loss]:
    backend = dispatch.choose("symmetry_loss", "cpu", torch.float32, dispatch.forced_backend(None))
    return {
        f"fairkernels ({backend})": FK.symmetry_loss,
        "eager PyTorch": eager_loss,
        "official loop, rewritten": double_loop_loss,
        "cross-entropy, for scale": F.cross_entropy,
    }


def inputs(batch: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits that lean towards the truth, and labels among which every class occurs."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(batch) % classes)[torch.randperm(batch, generator=generator)]
    logits = torch.randn(batch, classes, generator=generator) + 2 * F.one_hot(labels, classes)
    return logits.requires_grad_(), labels


def with_gradient(loss: Loss, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(logits, labels)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def measure(batch: int, classes: int, seconds: float = 1.0) -> list[Time]:
    """Median time of forward and backward on one thread, after a check that the implementations agree.

    They take turns, so that a busy moment of the machine falls on all of them.

    Raises:
        AssertionError: if two implementations of the symmetry loss differ in value or gradient.
    """
    logits, labels = inputs(batch, classes)
    exact = with_gradient(eager_loss, logits.detach().double().requires_grad_(), labels)
    calls = {}
    for name, loss in implementations().items():
        if loss is not F.cross_entropy:
            for actual, expected in zip(with_gradient(loss, logits, labels), exact, strict=True):
                torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-6)
        calls[name] = partial(with_gradient, loss, logits, labels)

    once = {name: seconds_of(call) for name, call in calls.items()}
    times = interleaved(calls, once, seconds)
    return [Time(name, batch, classes, timing.seconds * 1e6) for name, timing in times.items()]
