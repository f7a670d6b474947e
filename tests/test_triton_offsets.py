"""Elements further apart than 32 bits count, seen on the interpreter: memory that nobody touches costs none."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import replace_tensors, sample, samples, upstream_of
from torch import Tensor

from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops import dispatch, triton_kernels
from fairkernels.ops.schema import OPERATORS

pytest.importorskip("triton")

from test_triton_spectral import matrix_that_loses_its_start
from triton_calls import WITH_KERNELS
from triton_limits import limited

from fairkernels.ops.triton_kernels import spectral_norm as spectral

pytestmark = pytest.mark.skipif(not triton_kernels.interpreted(), reason="needs TRITON_INTERPRET=1")

FAR = 2**31
"""How many elements there are at least between the first and the last one; a stride alone fits 32 bits if it can."""

SPAN = 2**42
"""How many there are at most."""

UNRESERVED = 0x4000
"""``MAP_NORESERVE`` of Linux, which Python knows from 3.13 on."""


def apart(dimension: int) -> Callable[[Tensor], Tensor]:
    """A copy with gaps between the elements along that dimension, counted from the last.

    As much memory lies before it, so that an address that has lost its upper bits leads to zeros, not to a crash.
    """

    def change(tensor: Tensor) -> Tensor:
        if tensor.dim() < -dimension or tensor.shape[dimension] < 2:
            return tensor
        length, strides = tensor.shape[dimension], list(tensor.contiguous().stride())
        strides[dimension] = FAR if length == 2 else min(FAR - 1, SPAN // length)
        elements = 2 * FAR + sum(stride * size for stride, size in zip(strides, tensor.shape, strict=True))
        try:
            memory = mmap.mmap(-1, elements * tensor.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | UNRESERVED)
        except OSError as error:
            pytest.skip(f"{elements * tensor.itemsize / 2**30:.0f} GB of addresses: {error}")
        return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides, 2 * FAR).copy_(tensor)

    return change


def both_ways(name: str, args: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Results and gradients of the operator; upstream gradients are changed."""
    operator = OPERATORS[name]
    results = dispatch.forward(operator, args, "triton")
    if not operator.differentiable:
        return results
    saved = tuple(results[place] for place in operator.saved_places)
    return *results, *dispatch.backward(operator, change(upstream_of(results[0])), args, saved, "triton")


CALLS = [
    *(("soft_confusion", "sample weights", limit) for limit in ("many classes", "")),
    *((name, samples(name)[0].name, "") for name in WITH_KERNELS if name != "spectral_loss"),
    *(("soft_confusion", label, "") for label in ("normalize all", "more classes than rows", "absent classes")),
    *(("symmetry_loss", label, "") for label in ("problems, ignore, mean", "many more classes than rows")),
    ("symmetry_loss", "sample weights", "many classes"),
    *((name, "absent classes", "longest row 8") for name in ("soft_confusion", "fair_cross_entropy")),
    *(
        ("spectral_loss", f"{surrogate}: margin, class weights", limit)
        for surrogate in ("kl", "kl-all", "gated")
        for limit in ("", "many classes")
    ),
    *(("spectral_loss", "soft: wide margin, start, power", limit) for limit in ("", "many classes")),
    *(
        ("fair_cross_entropy", f"{terms}, weights, smoothing{reduction}", limit)
        for terms, reduction in (("ignore, mean", ""), ("soft, ignore", ", sum"), ("kl, ignore", ", sum"))
        for limit in ("", "many classes", "many samples")
    ),
    *(("symmetry_gap", label, "") for label in ("problems", "tiles", "counts")),
    *(
        ("spectral_norm", label, limit)
        for label in ("problems", "start of each problem", "power, signed")
        for limit in ("", "in the cache", "large")
    ),
    *((name, label, "") for name in ("pgd_step", "random_start") for label in ("l2", "l2, large", "l2, per sample")),
    *(("pgd_step", label, "") for label in ("linf, mask", "l2, bounds per channel", "l2, start")),
    *(("trades_kl", "problems, none", limit) for limit in ("", "long rows")),
    ("confusion_counts", "problems", ""),
    ("same_class_mixup", "per sample", ""),
]
CASES = [(*call, dimension) for call in CALLS for dimension in range(-sample(*call[:2]).args[0].dim(), 0)]


@pytest.mark.parametrize(("name", "label", "limit", "dimension"), CASES)
def test_far_apart(name, label, limit, dimension):
    s = sample(name, label)
    with limited(limit):
        expected = both_ways(name, handed_on(name, s), lambda t: t)
        found = both_ways(name, handed_on(name, replace_tensors(s, apart(dimension))), apart(dimension))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def without_a_step(matrix: Tensor, start: Tensor | None, limit: str) -> tuple[Tensor, ...]:
    """A step would mend a wrong first direction."""
    with limited(limit):
        return spectral.spectral_norm(matrix, start, "locg", 0, None)


@pytest.mark.parametrize("limit", ["", "in the cache", "large"])
@pytest.mark.parametrize("dimension", [-2, -1])
def test_far_apart_where_the_first_direction_is_lost(limit, dimension):
    matrix = matrix_that_loses_its_start(39, torch.float32)
    expected, found = (without_a_step(m, None, limit) for m in (matrix, apart(dimension)(matrix)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit", ["", "in the cache", "large"])
@pytest.mark.parametrize("shape", [(5, 40), (40, 5)])
def test_a_start_far_apart(limit, shape):
    matrix = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    start = 1 + torch.arange(float(shape[1])) ** 2
    expected, found = (without_a_step(matrix, s, limit) for s in (start, apart(-1)(start)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
