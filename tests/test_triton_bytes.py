"""What the Triton kernels read and write, counted on the interpreter: it sees every address.

Kernels of PyTorch are not seen. What is read again out of the cache counts again: a GPU's memory moves less.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cases import replace_tensors, sample
from torch import Tensor

from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops import dispatch, triton_kernels
from fairkernels.ops.samples import Maker
from fairkernels.ops.schema import OPERATORS

pytest.importorskip("triton")

from triton_calls import WITH_KERNELS, of_size

from fairkernels.ops.triton_kernels import class_order, class_rates, launch, trades_kl

pytestmark = pytest.mark.skipif(not triton_kernels.interpreted(), reason="needs TRITON_INTERPRET=1")

# --- the watcher --------------------------------------------------------------------------------------------------


@dataclass
class Accesses:
    """Addresses, and how many bytes there are at each."""

    entries: list[tuple[np.ndarray, int]] = field(default_factory=list)

    def note(self, pointers: Any, mask: Any) -> None:
        there = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
        self.entries.append((pointers.data[there], pointers.get_element_ty().primitive_bitwidth // 8))

    def bytes(self) -> int:
        return sum(addresses.size * size for addresses, size in self.entries)

    def each(self, tensor: Tensor) -> float:
        """How often an element of the tensor is met on average."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return sum(int(((at >= begin) & (at < end)).sum()) for at, _ in self.entries) / tensor.numel()


@contextlib.contextmanager
def watched() -> Iterator[tuple[Accesses, Accesses]]:
    """What interpreted kernels read and what they write while inside. An atomic operation does both."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    reads, writes = Accesses(), Accesses()
    load, store, atomic = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw

    def watched_load(self, pointers, mask, *rest):
        reads.note(pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        writes.note(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def watched_atomic(self, operation, pointers, value, mask, *rest):
        reads.note(pointers, mask)
        writes.note(pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    with (
        patch.object(Builder, "create_masked_load", watched_load),
        patch.object(Builder, "create_masked_store", watched_store),
        patch.object(Builder, "create_atomic_rmw", watched_atomic),
        launch.recorded(),  # keeps all tensors, so that none lies where another one lay
    ):
        yield reads, writes


# --- the table ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """Forward or backward, for each element of the main input: how often it is read, and all bytes, rounded up."""

    reads: float
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """A kind of call in float32; ``limit`` says what in ``LIMITS`` makes a small problem one."""

    operator: str
    sample: str
    size: tuple[int, ...]
    forward: Way
    backward: Way | None = None
    limit: str = ""

    def __str__(self) -> str:
        return f"{self.operator}, {self.sample}, {'x'.join(map(str, self.size))} {self.limit}".strip()


SHORT = dict.fromkeys(class_rates.LONGEST_ROW, 64)
LIMITS = {
    "": (),
    "long rows": ((class_rates, "LONGEST_ROW", SHORT), (trades_kl, "LONGEST_ROW", SHORT)),
    "sorted": ((class_order, "MOST_COUNTED", -1),),
}

OWN_40, OWN_70, OWN_80, OWN_100 = (1 + 1 / classes for classes in (40, 70, 80, 100))
"""Where a class is a program, or rows are long, the logit of a sample's class is read once more."""

DIAGONAL = (2 * 64**2 + 22**2) / 150**2
"""Of tiles of 64 x 64 those that meet their own mirror image are read twice."""

TRAFFIC = (
    Traffic("soft_confusion", "plain", (128, 10), Way(1, 6), Way(1, 14)),
    Traffic("soft_confusion", "plain", (1100, 10), Way(1, 7), Way(1, 14)),
    Traffic("soft_confusion", "plain", (256, 80), Way(OWN_80, 8), Way(OWN_80, 13)),
    Traffic("soft_confusion", "plain", (256, 80), Way(OWN_80, 6), Way(OWN_80, 13), "sorted"),
    Traffic("soft_confusion", "plain", (80, 100), Way(OWN_100, 11), Way(OWN_100, 13)),
    Traffic("soft_confusion", "plain", (12, 80), Way(2 + 6 / 80, 42), Way(2 + OWN_80, 29), "long rows"),
    Traffic("symmetry_loss", "plain", (128, 10), Way(1, 6), Way(1, 14)),
    Traffic("symmetry_loss", "plain", (1100, 10), Way(1, 7), Way(1, 14)),
    Traffic("symmetry_loss", "plain", (256, 80), Way(OWN_80, 12), Way(OWN_80, 13)),
    Traffic("symmetry_loss", "plain", (80, 100), Way(OWN_100, 18), Way(OWN_100, 13)),
    Traffic("symmetry_loss", "plain", (12, 80), Way(2 + 6 / 80, 21), Way(2 + OWN_80, 44), "long rows"),
    Traffic("spectral_loss", "soft: plain", (128, 10), Way(1, 6), Way(1, 12)),
    Traffic("spectral_loss", "soft: plain", (128, 40), Way(OWN_40, 10), Way(OWN_40, 10)),
    Traffic("spectral_loss", "kl: plain", (128, 10), Way(1, 6), Way(1, 12)),
    Traffic("spectral_loss", "kl: plain", (128, 40), Way(OWN_40, 10), Way(OWN_40, 10)),
    Traffic("spectral_loss", "kl: plain", (12, 80), Way(2 + 11 / 80, 27), Way(2 + OWN_80, 18), "long rows"),
    Traffic("fair_cross_entropy", "plain", (128, 10), Way(1, 6), Way(1, 16)),
    Traffic("fair_cross_entropy", "plain", (1100, 10), Way(1, 7), Way(1, 15)),
    Traffic("fair_cross_entropy", "plain", (256, 40), Way(OWN_40, 13), Way(OWN_40, 14)),
    Traffic("fair_cross_entropy", "plain", (256, 40), Way(OWN_40, 9), Way(OWN_40, 14), "sorted"),
    Traffic("fair_cross_entropy", "plain", (12, 80), Way(2 + 6 / 80, 28), Way(2 + OWN_80, 56), "long rows"),
    Traffic("fair_cross_entropy", "without cross-entropy", (128, 70), Way(OWN_70, 15), Way(OWN_70, 13)),
    Traffic("fair_cross_entropy", "cross-entropy alone", (128, 70), Way(OWN_70, 9), Way(OWN_70, 11)),
    Traffic("symmetry_gap", "counts", (64, 64), Way(1, 5), Way(1, 9)),
    Traffic("symmetry_gap", "counts", (150, 150), Way(1 + DIAGONAL, 6), Way(1 + DIAGONAL, 10)),
    Traffic("symmetry_gap", "plain", (150, 150), Way(2 + DIAGONAL, 10), Way(2 + DIAGONAL, 14)),
    Traffic("spectral_norm", "plain", (64, 64), Way(1, 5), Way(0, 5)),
    # four reads and two steps; the interpreter also reads the block whose height alone is asked for, twice
    Traffic("spectral_norm", "plain", (100, 100), Way(6 + 2 * 16 / 100, 26), Way(0, 5)),
    Traffic("spectral_norm", "plain", (150, 150), Way(5, 89), Way(0, 5)),  # three tiles: 4 for the Gram matrix
    Traffic("pgd_step", "linf", (4, 3, 32, 32), Way(1, 16)),
    Traffic("pgd_step", "l2", (4, 3, 32, 32), Way(1, 16)),
    Traffic("pgd_step", "l2", (2, 3, 80, 70), Way(2, 29)),
    Traffic("random_start", "linf", (4, 3, 32, 32), Way(1, 8)),
    Traffic("random_start", "l2", (4, 3, 32, 32), Way(1, 8)),
    Traffic("random_start", "l2", (2, 3, 80, 70), Way(1, 9)),
    Traffic("confusion_counts", "plain", (1000, 10), Way(1, 17)),
    Traffic("confusion_counts", "plain", (1000, 80), Way(1, 32)),
    Traffic("trades_kl", "batchmean", (64, 50), Way(1, 9), Way(1, 17)),
    Traffic("trades_kl", "none", (64, 50), Way(1, 9), Way(1, 17)),
    Traffic("trades_kl", "batchmean", (3, 80), Way(2, 17), Way(3, 33), "long rows"),
    Traffic("same_class_mixup", "plain", (64, 3, 8, 8), Way(2, 13)),
    Traffic("same_class_mixup", "plain", (1100, 3, 4, 4), Way(2, 16)),
)
"""Besides the logits many classes cost their sums, a gradient by them and the labels, which every program that orders
samples reads: 8 bytes a sample for each 16 samples and classes, out of the cache. "sorted" leaves them to PyTorch."""


@pytest.mark.parametrize("traffic", TRAFFIC, ids=str)
def test_bytes(traffic):
    """Main inputs and the main result have the shape of the first argument. Such a result is written once."""
    name = traffic.operator
    operator, args = OPERATORS[name], arguments(traffic)
    with contextlib.ExitStack() as limits:
        for place, attribute, value in LIMITS[traffic.limit]:
            limits.enter_context(patch.object(place, attribute, value))
        with watched() as accesses:
            results = dispatch.forward(operator, args, "triton")
        check(traffic.forward, args, results, *accesses)
        if operator.differentiable:
            saved = tuple(results[place] for place in operator.saved_places)
            with watched() as accesses:
                grads = dispatch.backward(operator, torch.ones_like(results[0]), args, saved, "triton")
            check(traffic.backward, args, grads, *accesses)


def arguments(traffic: Traffic) -> tuple:
    """The call with tensors of that size; without ignored samples."""
    make = Maker(torch.float32)
    s = of_size(traffic.operator, sample(traffic.operator, traffic.sample), traffic.size)
    classes = traffic.size[1] if len(traffic.size) == 2 else 10

    def filled(tensor: Tensor) -> Tensor:
        return make.uniform(*tensor.shape) if tensor.is_floating_point() else make.classes(*tensor.shape, count=classes)

    return handed_on(traffic.operator, replace_tensors(s, filled))


def check(stated: Way, args: tuple, results: tuple[Tensor, ...], reads: Accesses, writes: Accesses) -> None:
    main = [t for t in args if isinstance(t, Tensor) and t.shape == args[0].shape]
    assert [reads.each(t) for t in main] == pytest.approx([stated.reads] * len(main))
    like_main = [t for t in results if t.shape == args[0].shape and t.is_floating_point()]
    assert [writes.each(t) for t in like_main] == [1] * len(like_main)
    assert math.ceil((reads.bytes() + writes.bytes()) / args[0].numel()) == stated.bytes


def test_every_operator_has_its_bytes_counted():
    assert {traffic.operator for traffic in TRAFFIC} == set(WITH_KERNELS)
