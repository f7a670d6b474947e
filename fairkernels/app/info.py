"""``fairkernels info``: versions, what was built and why not more, and the self-test on this very machine."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fairkernels import functional as FK
from fairkernels.app import machine
from fairkernels.ops import dispatch, library
from fairkernels.ops.samples import Maker, Sample
from fairkernels.ops.schema import OPERATORS, Operator

LIMITS = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest error of a sound kernel relative to the float64 reference, with room for another summation order."""


def run_info(selftest: bool) -> int:
    """Print all there is to know of this installation; returns the exit code, 1 if the self-test found an error."""
    console = Console()
    console.print(facts())
    console.print(backends())
    return run_selftest(console) if selftest else 0


def facts() -> Table:
    table = Table(title="fairkernels", show_header=False)
    for name, value in machine.describe().items():
        table.add_row(name, str(value) if value is not None else "not installed" if name != "gpu" else "none")
    build = library.build_info()
    table.add_row("native kernels", library.MISSING or f"built by {build.get('compiler')}")
    table.add_row("built for torch", f">= {build['torch_target']}" if build else "-")
    archs = build.get("cuda_archs")
    table.add_row(
        "CUDA kernels", f"{', '.join(archs)}, CUDA {build['cuda_version']}" if archs else "none in this build"
    )
    if library.REASON_FILE.exists():
        table.add_row("left out", library.REASON_FILE.read_text().strip())
    return table


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def backends() -> Table:
    """Which backend runs each operator on each device in float32, and why not the others."""
    table = Table("operator", "device", "runs", "why not the others", title="Backends")
    for name, operator in OPERATORS.items():
        for device in devices():
            chosen = dispatch.choose(name, device, torch.float32, None)
            reasons = {b: dispatch.can_run(b, operator, device, torch.float32) for b in dispatch.BACKENDS}
            others = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items() if reason)
            table.add_row(name, device, chosen, others)
    return table


def run_selftest(console: Console) -> int:
    """Every operator, backend and sample against the reference in float64, values and gradients."""
    table = Table("operator", "device", "backend", "samples", "largest error", "verdict", title="Self-test")
    runs = [
        (operator, device, backend)
        for operator in OPERATORS.values()
        for device in devices()
        for backend in dispatch.BACKENDS
        if dispatch.can_run(backend, operator, device, torch.float32) is None
    ]
    failures = 0
    for operator, device, backend in track(runs, "Self-test", console=console, transient=True):
        worst, share, count = 0.0, 0.0, 0
        for dtype, rounding in LIMITS.items():
            limit = max(rounding, 30 * operator.allowed_error(dtype))
            for sample in operator.samples(Maker(dtype, device)):
                found = error_of(operator, sample, backend)
                worst, share, count = max(worst, found), max(share, found / limit), count + 1
        failures += share > 1
        verdict = "[green]ok[/]" if share <= 1 else "[red]WRONG[/]"
        table.add_row(operator.name, device, backend, str(count), f"{worst:.1e}", verdict)
    console.print(table)
    return 1 if failures else 0


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
