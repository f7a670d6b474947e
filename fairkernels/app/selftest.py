"""The self-test: every operator, backend and sample on this very machine against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairkernels import functional as FK
from fairkernels.ops import dispatch
from fairkernels.ops.samples import Maker, Sample
from fairkernels.ops.schema import OPERATORS, Operator

LIMITS = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest error of a sound kernel relative to the float64 reference, with room for another summation order."""


@dataclass(frozen=True)
class Run:
    """An operator on a device by a backend."""

    operator: Operator
    device: str
    backend: str


@dataclass(frozen=True)
class Verdict:
    """What came of a run: how many samples, their largest error, and whether all are within their limits."""

    samples: int
    error: float
    sound: bool


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def runs(places: Iterable[str]) -> Iterator[Run]:
    """All that can run on these devices."""
    for operator in OPERATORS.values():
        for device in places:
            for backend in dispatch.BACKENDS:
                if dispatch.can_run(backend, operator, device, operator.dtypes[0]) is None:
                    yield Run(operator, device, backend)


def verdict(run: Run) -> Verdict:
    """Values and gradients of every sample."""
    errors = [
        (error_of(run.operator, sample, run.backend), max(rounding, 30 * run.operator.allowed_error(dtype)))
        for dtype, rounding in LIMITS.items()
        for sample in run.operator.samples(Maker(dtype, run.device))
    ]
    return Verdict(len(errors), max(error for error, _ in errors), all(error <= limit for error, limit in errors))


def error_of(operator: Operator, sample: Sample, backend: str) -> float:
    """Largest error of a call and of its gradient, relative to the largest exact value where that exceeds 1."""
    exact_sample = Sample(
        sample.name, tuple(map(exactly, sample.args)), {k: exactly(v) for k, v in sample.kwargs.items()}
    )
    ours, grad = results_and_gradient(operator, sample, backend)
    exact, exact_grad = results_and_gradient(operator, exact_sample, "reference")
    pairs = list(zip(ours, exact, strict=True))
    if sample.smooth and grad is not None and exact_grad is not None:
        pairs.append((grad, exact_grad))
    return max(relative_error(a, b) for a, b in pairs)


def exactly(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(map(exactly, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def results_and_gradient(operator: Operator, sample: Sample, backend: str) -> tuple[tuple[Tensor, ...], Tensor | None]:
    first = sample.args[0]
    if operator.differentiable:
        first = first.clone().requires_grad_()
    outputs = getattr(FK, operator.name)(first, *sample.args[1:], **sample.kwargs, backend=backend)
    results = flat(outputs)
    if not operator.differentiable:
        return results, None
    (grad,) = torch.autograd.grad(results[0].sum(), first)
    return tuple(result.detach() for result in results), grad


def flat(results: Any) -> tuple[Tensor, ...]:
    """All tensors of a public function's result, also those in named tuples."""
    if isinstance(results, Tensor):
        return (results,)
    return tuple(tensor for result in results for tensor in flat(result))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    actual, exact = actual.double().flatten(), exact.double().flatten()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    scale = exact[exact.isfinite()].abs().max().clamp(min=1) if exact.isfinite().any() else 1.0
    error = torch.where(same, 0.0, (actual - exact).abs() / scale).nan_to_num(nan=float("inf"))
    return float(error.max()) if error.numel() else 0.0
