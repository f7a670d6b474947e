"""What an attack must leave as it found it: the modes of the model and the global generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: Callable[..., Any]) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule is back in its own, a frozen BatchNorm stays frozen."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if any(training for _, training in modes):
            model.eval()  # type: ignore[attr-defined]
        yield
    finally:
        for module, training in modes:
            module.training = training  # not .train(), which a parent passes on to all its children


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """What the model draws inside comes from ``seed``; the global generators do not notice.

    Without a seed of its own the attack would see the very numbers that the model draws when it is judged.
    """
    indices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(indices):
        torch.default_generator.manual_seed(seed)
        for index in indices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def differentiating() -> Iterator[None]:
    """Gradients are recorded, also where the caller has switched that off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def without_parameters(model: Callable[..., Any], wanted: bool) -> Iterator[None]:
    """No parameter asks for a gradient: a compiled backward would compute them all along."""
    parameters = [p for p in model.parameters() if p.requires_grad] if wanted and isinstance(model, nn.Module) else []
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor without its history; a copy where it comes from inference mode, which autograd can not take."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
