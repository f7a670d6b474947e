"""What the Triton kernels do in memory, seen on the interpreter, which knows every address: how many bytes they move,
and two things that it does not enforce. No address lies beside the tensors of a launch; no two programs race.

Kernels of PyTorch are not seen. What is read again out of the cache counts again: a GPU's memory moves less.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cases import replace_tensors, sample
from torch import Tensor

from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops import dispatch, triton_kernels
from fairkernels.ops.samples import IGNORE, Maker, Sample
from fairkernels.ops.schema import OPERATORS

pytest.importorskip("triton")

import triton
import triton.language as tl
from test_forward import strided
from triton_calls import WITH_KERNELS, of_size
from triton_limits import limited

from fairkernels.ops.triton_kernels.launch import Launch, launch, recorded

pytestmark = pytest.mark.skipif(not triton_kernels.interpreted(), reason="needs TRITON_INTERPRET=1")

# --- the watcher --------------------------------------------------------------------------------------------------

READ, WRITTEN, UPDATED = range(3)  # the last one atomically: a read and a write

LANE = np.dtype(
    [
        ("launch", np.int64),
        ("program", np.int64),
        ("deed", np.int64),
        ("address", np.uint64),
        ("size", np.uint64),
        ("value", np.uint64),  # that is written, bit by bit; else 0
    ]
)
"""What one active lane of an instruction does."""


@dataclass
class Accesses:
    """What the programs of some launches do in memory."""

    launches: list[Launch]
    noted: list[np.ndarray] = field(default_factory=list)

    def note(self, builder: Any, deed: int, pointers: Any, mask: Any, value: Any = None) -> None:
        active = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
        lanes = np.zeros(np.count_nonzero(active), LANE)
        lanes["launch"] = len(self.launches) - 1
        lanes["program"] = np.ravel_multi_index(builder.grid_idx, builder.grid_dim)
        lanes["deed"] = deed
        lanes["address"] = pointers.data[active]
        lanes["size"] = pointers.get_element_ty().primitive_bitwidth // 8
        if value is not None:
            values = np.broadcast_to(value.data, active.shape)[active]
            lanes["value"] = values.view(f"u{values.itemsize}")
        self.noted.append(lanes)

    def lanes(self) -> np.ndarray:
        return np.concatenate(self.noted)

    def of_launches(self) -> Iterator[tuple[Launch, np.ndarray]]:
        lanes = self.lanes()
        for number, launched in enumerate(self.launches):
            yield launched, lanes[lanes["launch"] == number]


@contextlib.contextmanager
def watched() -> Iterator[Accesses]:
    """What interpreted kernels do in memory while inside."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    load, store, atomic = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw

    def watched_load(self, pointers, mask, *rest):
        accesses.note(self, READ, pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        accesses.note(self, WRITTEN, pointers, mask, value)
        return store(self, pointers, value, mask, *rest)

    def watched_atomic(self, operation, pointers, value, mask, *rest):
        accesses.note(self, UPDATED, pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    with (
        patch.object(Builder, "create_masked_load", watched_load),
        patch.object(Builder, "create_masked_store", watched_store),
        patch.object(Builder, "create_atomic_rmw", watched_atomic),
        recorded() as launches,  # keeps all tensors, so that none lies where another one lay
    ):
        accesses = Accesses(launches)
        yield accesses


def in_tensor(lanes: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Which lanes meet a whole element between the first and the last one of the tensor."""
    if not tensor.numel():
        return np.zeros(len(lanes), bool)
    begin, size, address = tensor.data_ptr(), tensor.itemsize, lanes["address"]
    steps = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    inside = (begin <= address) & (address <= begin + steps * size)
    return inside & (lanes["size"] == size) & (address % size == begin % size)


def astray(launched: Launch, lanes: np.ndarray) -> np.ndarray:
    """Addresses beside all tensors that the launch was given."""
    tensors = [arg for arg in launched.args if isinstance(arg, Tensor)]
    known = np.logical_or.reduce([in_tensor(lanes, tensor) for tensor in tensors])
    return lanes["address"][~known]


def raced_for(lanes: np.ndarray) -> np.ndarray:
    """Addresses in which what a launch does depends on which of its programs comes first.

    Where several programs meet they may all read, all update, or all write one and the same value.
    """
    lanes = lanes[np.argsort(lanes["address"])]
    addresses, starts = np.unique(lanes["address"], return_index=True)

    def several(name: str) -> np.ndarray:
        return np.minimum.reduceat(lanes[name], starts) != np.maximum.reduceat(lanes[name], starts)

    return addresses[several("program") & (several("deed") | several("value"))]


# --- the table ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """Forward or backward, for each element of the main input: how often it is read, and all bytes, rounded up."""

    reads: float
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """A kind of call in float32; ``limit`` says what in ``triton_limits.LIMITS`` makes a small problem one, ``slow``
    that it takes three to ten seconds and others have most of its kernels."""

    operator: str
    sample: str
    size: tuple[int, ...]
    forward: Way
    backward: Way | None = None
    limit: str = ""
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.operator}, {self.sample}, {'x'.join(map(str, self.size))} {self.limit}".strip()

    def arguments(self) -> tuple:
        """The call with tensors of that size; without ignored samples."""
        make = Maker(torch.float32)
        s = of_size(self.operator, sample(self.operator, self.sample), self.size)
        classes = self.size[1] if len(self.size) == 2 else 10

        def filled(t: Tensor) -> Tensor:
            return make.uniform(*t.shape) if t.is_floating_point() else make.classes(*t.shape, count=classes)

        return handed_on(self.operator, replace_tensors(s, filled))


OWN_40, OWN_70, OWN_80, OWN_100 = (1 + 1 / classes for classes in (40, 70, 80, 100))
"""Where a class is a program, or rows are long, the logit of a sample's class is read once more."""

DIAGONAL = (2 * 64**2 + 22**2) / 150**2
"""Of tiles of 64 x 64 those that meet their own mirror image are read twice."""

TRAFFIC = (
    Traffic("soft_confusion", "plain", (128, 10), Way(1, 6), Way(1, 14)),
    Traffic("soft_confusion", "plain", (1100, 10), Way(1, 7), Way(1, 14)),
    Traffic("soft_confusion", "plain", (256, 80), Way(OWN_80, 8), Way(OWN_80, 13), slow=True),
    Traffic("soft_confusion", "plain", (256, 80), Way(OWN_80, 6), Way(OWN_80, 13), "sorted"),
    Traffic("soft_confusion", "plain", (80, 100), Way(OWN_100, 11), Way(OWN_100, 13)),
    Traffic("soft_confusion", "plain", (12, 80), Way(2 + 6 / 80, 42), Way(2 + OWN_80, 29), "long rows", slow=True),
    Traffic("symmetry_loss", "plain", (128, 10), Way(1, 6), Way(1, 14)),
    Traffic("symmetry_loss", "plain", (1100, 10), Way(1, 7), Way(1, 14)),
    Traffic("symmetry_loss", "plain", (256, 80), Way(OWN_80, 12), Way(OWN_80, 13), slow=True),
    Traffic("symmetry_loss", "plain", (80, 100), Way(OWN_100, 18), Way(OWN_100, 13), slow=True),
    Traffic("symmetry_loss", "plain", (12, 80), Way(2 + 6 / 80, 21), Way(2 + OWN_80, 44), "long rows"),
    Traffic("spectral_loss", "soft: plain", (128, 10), Way(1, 6), Way(1, 12)),
    Traffic("spectral_loss", "soft: plain", (128, 40), Way(OWN_40, 10), Way(OWN_40, 10)),
    Traffic("spectral_loss", "kl: plain", (128, 10), Way(1, 6), Way(1, 12)),
    Traffic("spectral_loss", "kl: plain", (128, 40), Way(OWN_40, 10), Way(OWN_40, 10)),
    Traffic("spectral_loss", "kl: plain", (12, 80), Way(2 + 11 / 80, 27), Way(2 + OWN_80, 18), "long rows", slow=True),
    Traffic("fair_cross_entropy", "plain", (128, 10), Way(1, 6), Way(1, 16)),
    Traffic("fair_cross_entropy", "plain", (1100, 10), Way(1, 7), Way(1, 15)),
    Traffic("fair_cross_entropy", "plain", (256, 40), Way(OWN_40, 13), Way(OWN_40, 14)),
    Traffic("fair_cross_entropy", "plain", (256, 40), Way(OWN_40, 9), Way(OWN_40, 14), "sorted"),
    Traffic("fair_cross_entropy", "plain", (12, 80), Way(2 + 6 / 80, 28), Way(2 + OWN_80, 56), "long rows", slow=True),
    Traffic("fair_cross_entropy", "without cross-entropy", (128, 70), Way(OWN_70, 15), Way(OWN_70, 13)),
    Traffic("fair_cross_entropy", "cross-entropy alone", (128, 70), Way(OWN_70, 9), Way(OWN_70, 11), slow=True),
    Traffic("symmetry_gap", "counts", (64, 64), Way(1, 5), Way(1, 9)),
    Traffic("symmetry_gap", "counts", (150, 150), Way(1 + DIAGONAL, 6), Way(1 + DIAGONAL, 10)),
    Traffic("symmetry_gap", "plain", (150, 150), Way(2 + DIAGONAL, 10), Way(2 + DIAGONAL, 14)),
    Traffic("spectral_norm", "plain", (64, 64), Way(1, 5), Way(0, 5)),
    # four reads and two steps; the interpreter also reads the block whose height alone is asked for, twice
    Traffic("spectral_norm", "plain", (100, 100), Way(6 + 2 * 16 / 100, 26), Way(0, 5)),
    # three tiles: four reads for the Gram matrix
    Traffic("spectral_norm", "plain", (150, 150), Way(5, 89), Way(0, 5), slow=True),
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


@dataclass(frozen=True)
class Edge:
    """A call whose tensors have gaps between their elements; its bytes are not counted."""

    operator: str
    sample: Sample
    limit: str
    slow = False

    def __str__(self) -> str:
        return f"{self.operator}, {self.sample.name}, {self.limit}".strip(", ")

    def arguments(self) -> tuple:
        return handed_on(self.operator, replace_tensors(self.sample, strided))


def wrong_labels(samples: int, classes: int) -> Sample:
    """Two problems in which some labels are no class."""
    labels = Maker().classes(2, samples, count=classes)
    labels[:, 1:5] = torch.tensor([classes, -5, 2**40, IGNORE])
    return Sample(f"wrong labels, {samples}x{classes}", (Maker().normal(2, samples, classes), labels))


MATRICES = Sample(
    "power, start", (Maker().uniform(2, 20, 24),), {"method": "power", "iters": 10, "start": Maker().uniform(2, 24)}
)
WEIGHTS = Sample("weights", wrong_labels(6, 20).args, {"weight": Maker().uniform(2, 20)})
BATCHES = ((6, 20, ""), (6, 20, "many classes"), (5, 9, "longest row 8"), (19, 5, "many samples"))
OPTIONS = {"soft_confusion": {}, "fair_cross_entropy": {"spec_weight": 0.3, "surrogate": "kl-all"}}
EDGES = (
    Edge("spectral_norm", MATRICES, "large"),
    Edge("spectral_norm", Sample("locg", (Maker().uniform(2, 20, 24),)), "large"),
    Edge("fair_cross_entropy", WEIGHTS, "many classes"),
    *(
        Edge(name, replace(wrong_labels(samples, classes), kwargs=options), limit)
        for name, options in OPTIONS.items()
        for samples, classes, limit in BATCHES
    ),
)
"""What the calls above do not reach: kernels of other options, and addresses that a label of no class would lead to."""


# --- what is seen -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Half:
    """Forward or backward of a call, and what was seen of it."""

    args: tuple
    results: tuple[Tensor, ...]
    accesses: Accesses


@pytest.fixture(scope="module")
def seen(request) -> tuple[Traffic | Edge, list[Half]]:
    """A call, which is made once for all that is to be known about it."""
    operator, args = OPERATORS[request.param.operator], request.param.arguments()
    without_check = patch.object(dispatch, "check_classes")  # nobody looks at labels on a GPU
    with without_check, limited(request.param.limit):
        with watched() as accesses:
            results = dispatch.forward(operator, args, "triton")
        halves = [Half(args, results, accesses)]
        if operator.differentiable:
            saved = tuple(results[place] for place in operator.saved_places)
            with watched() as accesses:
                grads = dispatch.backward(operator, torch.ones_like(results[0]), args, saved, "triton")
            halves.append(Half(args, grads, accesses))
    return request.param, halves


def each_of(calls):
    cases = [pytest.param(call, id=str(call), marks=[pytest.mark.slow] if call.slow else []) for call in calls]
    return pytest.mark.parametrize("seen", cases, indirect=True)


every_call = each_of([*TRAFFIC, *EDGES])


@each_of(TRAFFIC)
def test_bytes(seen):
    """Main inputs and the main result have the shape of the first argument. Such a result is written once."""
    traffic, halves = seen
    for stated, half in zip((traffic.forward, traffic.backward), halves, strict=False):
        lanes, first = half.accesses.lanes(), half.args[0]
        reads, writes = lanes[lanes["deed"] != WRITTEN], lanes[lanes["deed"] != READ]
        main = [t for t in half.args if isinstance(t, Tensor) and t.shape == first.shape]
        assert [often(reads, t) for t in main] == pytest.approx([stated.reads] * len(main))
        like_main = [t for t in half.results if t.shape == first.shape and t.is_floating_point()]
        assert [often(writes, t) for t in like_main] == [1] * len(like_main)
        moved = reads["size"].sum() + writes["size"].sum()
        assert math.ceil(moved / first.numel()) == stated.bytes


def often(lanes: np.ndarray, tensor: Tensor) -> float:
    """How often an element of the tensor is met on average."""
    return np.count_nonzero(in_tensor(lanes, tensor)) / tensor.numel()


def launches_of(seen: tuple[Traffic | Edge, list[Half]]) -> Iterator[tuple[Launch, np.ndarray]]:
    for half in seen[1]:
        yield from half.accesses.of_launches()


@every_call
def test_no_address_is_astray(seen):
    for launched, lanes in launches_of(seen):
        assert not astray(launched, lanes).size, launched.name


@every_call
def test_no_programs_race(seen):
    for launched, lanes in launches_of(seen):
        assert not raced_for(lanes).size, launched.name


def test_every_operator_has_its_bytes_counted():
    assert {traffic.operator for traffic in TRAFFIC} == set(WITH_KERNELS)


# --- the watcher is not blind -------------------------------------------------------------------------------------


@triton.jit
def copy_without_a_mask(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))


@pytest.mark.parametrize(("readable", "writable", "count"), [(8, 8, 0), (5, 8, 3), (8, 7, 1), (5, 7, 4)])
def test_an_address_beside_its_tensor_is_astray(readable, writable, count):
    """Of memory that is there: of a tensor of eight numbers a kernel is given fewer."""
    source, target = torch.zeros(8), torch.zeros(8)
    with watched() as accesses:
        launch(copy_without_a_mask, (1,), source[:readable], target[:writable], num_warps=4, BLOCK=8)
    (there,) = accesses.of_launches()
    assert astray(*there).size == count


@triton.jit
def do(place, DEED: tl.constexpr):
    if DEED == "read":
        tl.load(place)
    elif DEED == "add":
        tl.atomic_add(place, 1)
    else:
        tl.store(place, DEED)


@triton.jit
def one_each(place, FIRST: tl.constexpr, SECOND: tl.constexpr):
    if tl.program_id(0) == 0:
        do(place, FIRST)
    else:
        do(place, SECOND)


@pytest.mark.parametrize(
    ("first", "second", "race"),
    [
        ("read", "read", False),
        ("add", "add", False),
        (1, 1, False),
        (1, 2, True),
        (1, "read", True),
        ("read", 1, True),
        ("add", "read", True),
        ("add", 1, True),
    ],
)
def test_programs_race_where_their_order_matters(first, second, race):
    with watched() as accesses:
        launch(one_each, (2,), torch.zeros(1, dtype=torch.int32), num_warps=4, FIRST=first, SECOND=second)
    assert raced_for(accesses.lanes()).size == race
