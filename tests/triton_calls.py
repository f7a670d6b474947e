"""Calls of the Triton backend of which nothing runs: tensors without data, launches that are only listed.

Needs neither a GPU nor the interpreter; calls may be of any size. Host code that looks at data can not be called so,
and must not be written: it would wait for the GPU and could not be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from cases import NAMES, replace_tensors, samples
from torch import Tensor

from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops import dispatch, triton_kernels
from fairkernels.ops import samples as samples_module
from fairkernels.ops.samples import Sample
from fairkernels.ops.schema import OPERATORS

WITH_KERNELS = tuple(name for name in NAMES if "triton" in OPERATORS[name].kernels)

FEW_AND_MANY = (
    (128, 10),
    (128, 30),
    (3000, 50),
    (128, 100),
    (512, 300),
    (256, 1000),
    (4096, 1000),
    (1024, 10_000),
    (4_300_000, 10),
    (65_536, 100),
    (20_000, 1000),
    (20_000, 5000),
)
SQUARES = ((10, 10), (32, 32), (64, 64), (100, 100), (128, 128), (300, 300), (1000, 1000), (5000, 5000))
OBLONGS = (
    (100, 10),
    (10, 100),
    (60, 50),
    (50, 60),
    (100, 20),
    (20, 100),
    (200, 10),
    (10, 200),
    (100, 50),
    (1000, 20),
    (20, 1000),
    (4000, 1000),
)
IMAGES = ((128, 3, 32, 32), (128, 3, 33, 35), (64, 3, 224, 224), (2000, 3, 32, 32))

SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "soft_confusion": FEW_AND_MANY,
    "symmetry_gap": SQUARES,
    "symmetry_loss": FEW_AND_MANY,
    "spectral_norm": SQUARES + OBLONGS,
    "spectral_loss": FEW_AND_MANY,
    "fair_cross_entropy": FEW_AND_MANY,
    "pgd_step": IMAGES,
    "random_start": IMAGES,
    "confusion_counts": FEW_AND_MANY,
    "trades_kl": FEW_AND_MANY,
    "same_class_mixup": IMAGES,
    "kl_dro_weights": ((10,), (1000,)),
}
"""To what size the calls of the table are stretched: of the first argument without its leading dimensions; of hard
predictions samples and classes."""


@dataclass(frozen=True)
class Call:
    """What one call did on the host."""

    launches: tuple[Any, ...]
    results: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Triton takes tensors without data; launches inside are not run."""
    from fairkernels.ops.triton_kernels import launch

    dispatch.choose.cache_clear()
    with mock.patch.object(triton_kernels, "missing", return_value=None), launch.recorded(run=False):
        yield
    dispatch.choose.cache_clear()


def operator_arguments(name: str, s: Sample) -> tuple:
    """What the public function hands to its operator; it has validated the call and expanded what is shared."""
    return handed_on(name, replace_tensors(s, empty_like))


def forward(name: str, args: tuple) -> Call:
    from fairkernels.ops.triton_kernels import launch

    operator = OPERATORS[name]
    with launch.recorded(run=False) as launches:
        results = dispatch.compute(operator, args, "triton")
    return Call(tuple(launches), results, tuple(results[place] for place in operator.saved_places))


def backward(name: str, args: tuple, saved: tuple[Tensor, ...], first: Tensor) -> Call:
    from fairkernels.ops.triton_kernels import launch

    with launch.recorded(run=False) as launches:
        grads = dispatch.compute_backward(OPERATORS[name], torch.empty_like(first), args, saved, "triton")
    return Call(tuple(launches), grads, ())


def launches_of(name: str, args: tuple) -> Iterator:
    """Those of the forward and of the backward."""
    there = forward(name, args)
    yield from there.launches
    if OPERATORS[name].differentiable:
        yield from backward(name, args, there.saved, there.results[0]).launches


# --- tensors without data -----------------------------------------------------------------------------------------


def empty_like(tensor: Tensor) -> Tensor:
    """One of the same layout that has no data."""
    if not tensor.numel():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = torch.empty(tensor.storage_offset() + last + 1, dtype=tensor.dtype, device="meta")
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def stretched(s: Sample, sizes: dict[int, int]) -> Sample:
    """The call with every dimension of such a size made longer, contiguous and without data."""

    def change(tensor: Tensor) -> Tensor:
        return torch.empty([sizes.get(size, size) for size in tensor.shape], dtype=tensor.dtype, device="meta")

    longer = replace_tensors(s, change)
    if "num_classes" in s.kwargs:
        longer.kwargs["num_classes"] = sizes["num_classes"]
    return longer


def of_size(name: str, s: Sample, size: tuple[int, ...]) -> Sample | None:
    """A call of the table at another size of its innermost problem; None where the two have nothing in common."""
    if "num_classes" in s.kwargs:
        return stretched(s, {s.args[0].shape[-1]: size[0], "num_classes": size[1]})
    inner = tuple(s.args[0].shape[-len(size) :])
    changes = dict(zip(inner, size, strict=False))
    fits = len(inner) == len(size) and min(inner) > 1 and all(changes[a] == b for a, b in zip(inner, size, strict=True))
    if not fits:
        return None
    return stretched(s, changes)


def described(s: Sample, describe: Callable[[Tensor], Any]) -> str:
    """The call with every tensor described, without what no kernel can depend on."""
    plain = replace_tensors(s, describe)
    return repr((plain.args, {k: v for k, v in plain.kwargs.items() if k not in ("seed", "num_classes")}))


def kinds(name: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The calls of the table that differ by more than by what the tensors hold."""
    found = {described(s, lambda t: (t.shape, t.stride(), t.dtype)): s for s in samples(name, dtype)}
    yield from found.values()


def option_kinds(name: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The calls of the table that differ by their options."""
    found: dict[str, Sample] = {}
    for s in samples(name, dtype):
        if s.args[0].numel():
            found.setdefault(described(s, lambda t: (t.dim(), t.dtype)), s)
    yield from found.values()


def calls(name: str, dtype: torch.dtype, sizes: Iterable[tuple[int, ...]] | None = None) -> Iterator[Sample]:
    """All calls of the table as they stand, and every choice of options at every size."""
    yield from kinds(name, dtype)
    for size in SIZES[name] if sizes is None else sizes:
        for s in option_kinds(name, dtype):
            if (longer := of_size(name, s, size)) is not None:
                yield longer


def with_problems(args: tuple, count: int) -> tuple:
    """The arguments of an operator with one more leading dimension."""
    return tuple(arg.new_empty((count, *arg.shape)) if isinstance(arg, Tensor) else arg for arg in args)


def of_every_batch(name: str, size: tuple[int, ...], batches: Iterable[int]) -> Iterator[tuple[str, list[tuple]]]:
    """For every choice of options the calls that differ by the number of samples alone, then by that of problems."""
    is_batch = len(size) > 1 and OPERATORS[name].sized is not samples_module.sized_square
    for s in option_kinds(name, torch.float32):
        if (longer := of_size(name, s, size)) is None:
            continue
        args = operator_arguments(name, longer)
        if is_batch:
            several = [of_size(name, s, (batch, *size[1:])) for batch in batches]
            yield s.name, within_32_bits(operator_arguments(name, other) for other in several if other)
        if OPERATORS[name].batched:
            yield s.name, within_32_bits(with_problems(args, count) for count in batches if count > 1)


def within_32_bits(calls: Iterable[tuple]) -> list[tuple]:
    return [args for args in calls if args[0].numel() < 2**31]
