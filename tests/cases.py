"""Calls made from the operator table: every operator, every sample, every backend that runs here.

``FAIRKERNELS_TEST_DEVICE=cuda`` runs the same tests on tensors of a GPU.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fairkernels.functional as FK
from fairkernels.app.selftest import flat
from fairkernels.ops import dispatch
from fairkernels.ops.samples import Maker, Sample
from fairkernels.ops.schema import OPERATORS, Operator

DEVICE = os.environ.get("FAIRKERNELS_TEST_DEVICE") or "cpu"
ON_GPU = DEVICE == "cuda"
if ON_GPU and not torch.cuda.is_available():
    pytest.exit("FAIRKERNELS_TEST_DEVICE=cuda, but torch sees no GPU", returncode=pytest.ExitCode.USAGE_ERROR)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = tuple(OPERATORS)
DIFFERENTIABLE = tuple(name for name, operator in OPERATORS.items() if operator.differentiable)


def runs(backend: str, name: str) -> bool:
    return dispatch.can_run(backend, OPERATORS[name], DEVICE, OPERATORS[name].dtypes[0]) is None


BACKENDS = [backend for backend in dispatch.BACKENDS if any(runs(backend, name) for name in NAMES)]
COMPILED = [backend for backend in BACKENDS if backend != "reference"]
KERNELS = [(name, backend) for name in NAMES for backend in BACKENDS if runs(backend, name)]

LARGER_IN_CI = {
    ("spectral_norm", "in the cache"),
    ("symmetry_gap", "many classes"),
    ("pgd_step", "l2, [3, 3, 77, 79]"),
    ("random_start", "l2, [3, 3, 77, 79]"),
    ("trades_kl", "long rows"),
    ("same_class_mixup", "many samples"),
    ("confusion_counts", "many classes"),
}
"""Calls of ``larger`` that ``make test`` runs interpreted: those in seconds that reach what the table does not."""


def samples(name: str, dtype: torch.dtype = torch.float32) -> list[Sample]:
    return list(OPERATORS[name].samples(Maker(dtype, DEVICE)))


@functools.cache
def known_samples(name: str, dtype: torch.dtype) -> list[Sample]:
    """Shared by all tests, to choose among: no test may write into them, but into what ``sample`` copies."""
    return samples(name, dtype)


def sized(name: str, size: int, dtype: torch.dtype = torch.float32) -> Sample:
    """An ordinary call of a given size."""
    return OPERATORS[name].sized(Maker(dtype, DEVICE), size)


def plain(name: str, dtype: torch.dtype = torch.float32) -> Sample:
    """The first sample: nothing special about it."""
    return samples(name, dtype)[0]


def sample(name: str, label: str, dtype: torch.dtype = torch.float32) -> Sample:
    return copy.deepcopy(next(s for s in known_samples(name, dtype) if s.name == label))


def every_call(
    names: tuple[str, ...] = NAMES,
    keep: Callable[[Sample], bool] = lambda _: True,
    backends: Sequence[str] = dispatch.BACKENDS,
) -> list[Any]:
    """``(operator, backend, sample name)`` to parametrize with; most of the reference is left to test-all."""
    return [
        pytest.param(name, backend, s.name, marks=[pytest.mark.slow] if backend == "reference" and number > 2 else [])
        for name, backend in KERNELS
        if name in names and backend in backends
        for number, s in enumerate(filter(keep, known_samples(name, torch.float32)))
    ]


def call(name: str, s: Sample, **kwargs: Any) -> tuple[Tensor, ...]:
    """The public function on a sample, all results in one flat tuple."""
    return flat(getattr(FK, name)(*s.args, **{**s.kwargs, **kwargs}))


def upstream_of(result: Tensor) -> Tensor:
    """Made on the GPU itself, for graphs."""
    return (
        torch.arange(result.numel(), device=result.device, dtype=torch.float32).cos().to(result.dtype).view_as(result)
    )


def values_and_gradients(
    name: str, backend: str, s: Sample, upstream: Callable[[Tensor], Tensor] = upstream_of
) -> list[Tensor]:
    """All results of a call, and the gradients of what has one; copies, as a CUDA graph would write them again."""
    count = OPERATORS[name].differentiable
    leaves = [arg.detach().requires_grad_() for arg in s.args[:count]]
    results = call(name, Sample(s.name, (*leaves, *s.args[count:]), s.kwargs), backend=backend)
    gradients = torch.autograd.grad(results[0], leaves, upstream(results[0])) if leaves else ()
    return [result.detach().clone() for result in (*results, *gradients)]


def replace_tensors(s: Sample, change: Callable[[Tensor], Any]) -> Sample:
    """The sample with every tensor changed, also those among the options."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return tuple(map(changed, value)) if isinstance(value, tuple) else value

    kwargs = {key: changed(value) for key, value in s.kwargs.items()}
    return Sample(s.name, tuple(map(changed, s.args)), kwargs, s.smooth)


def tensors(s: Sample) -> Iterator[Tensor]:
    found: list[Tensor] = []
    replace_tensors(s, found.append)
    return iter(found)


def widened(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def reference(operator: Operator, args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The operator's equation in plain PyTorch, in one dtype throughout; where PyTorch has no kernel, wider."""
    try:
        return flat(operator.reference(*widened(args, dtype)))
    except RuntimeError as error:
        if "not implemented for" not in str(error) and "Low precision" not in str(error):
            raise
        return tuple(result.to(dtype) for result in flat(operator.reference(*widened(args, torch.float32))))


def reference_gradient(operator: Operator, args: tuple[Any, ...], upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Autograd's gradient through that equation, in one dtype."""
    args = widened(args, dtype)
    first = args[0].detach().requires_grad_()
    result = reference(operator, (first, *args[1:]), dtype)[0]
    if not result.requires_grad:
        return torch.zeros_like(first)  # no term counts
    return torch.autograd.grad(result, first, upstream.to(result.dtype))[0]
