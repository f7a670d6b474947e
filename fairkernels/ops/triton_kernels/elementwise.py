"""Operands of elementwise kernels, walked in one common order whatever their strides and broadcasting.

A walk numbers the elements; sizes and strides go to a kernel as tuples, from the outermost dimension to the innermost.
Of the outermost dimension no kernel needs the size, which is mostly that of the batch: it is passed as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .common import number, undisguised
from .launch import Numbers, disguised

# --- on the host --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """Dimensions in the order of the walk, neighbours joined where they are one to all operands."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    """Of each operand."""

    @property
    def straight(self) -> bool:
        """Whether element number i is number i in memory, for every operand."""
        return all(strides == (1,) for strides in self.strides)

    @property
    def numbers(self) -> tuple[Numbers, tuple[Numbers, ...]]:
        """Sizes and strides as kernels take them, who are the same for all of them."""
        return disguised(self.sizes), tuple(map(disguised, self.strides))


def memory_order(tensor: Tensor, dims: Sequence[int]) -> list[int]:
    """Dimensions from the outermost to the innermost in memory."""
    strides = tensor.stride()
    return sorted(dims, key=lambda d: -strides[d])


def walk(order: Sequence[int], shape: Sequence[int], operands: Sequence[Tensor | None], apart: int = -1) -> Walk:
    """Through the dimensions in this order. Operands may be broadcast; one that is absent stands still.

    A dimension that is kept ``apart`` is joined with no other and is there even if it is 1: a batch of one is walked
    through like any other.
    """
    dims: list[int] = []
    sizes: list[int] = []
    strides: list[tuple[int, ...]] = []  # by dimension, of each operand
    for d in order:
        if shape[d] == 1 and d != apart:
            continue
        step = step_of(operands, d)
        joins = bool(dims) and apart not in (d, dims[-1])
        if joins and all(outer == shape[d] * inner for outer, inner in zip(strides[-1], step, strict=True)):
            dims[-1], sizes[-1], strides[-1] = d, sizes[-1] * shape[d], step
        else:
            dims.append(d)
            sizes.append(shape[d])
            strides.append(step)
    if not sizes:
        return Walk((0,), ((1,),) * len(operands))
    return Walk((0, *sizes[1:]), tuple(zip(*strides, strict=True)))


def walk_all(order: Sequence[int], images: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> tuple[Walk, bool]:
    """Through images and what is broadcast over them; whether the images lie straight in memory."""
    shape = images[0].shape
    straight = walk(order, shape, images).straight
    if straight and all(t is None for t in tensors):
        return Walk((0,), ((1,),) * (len(images) + len(tensors))), True
    return walk(order, shape, (*images, *tensors), apart=0), straight


def step_of(operands: Sequence[Tensor | None], d: int) -> tuple[int, ...]:
    """Strides of a dimension, 0 where an operand is broadcast along it."""
    return tuple(0 if t is None or t.shape[d] == 1 else t.stride(d) for t in operands)


def first_of(images: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> tuple[Numbers, Numbers]:
    """How far it is from one sample to the next; of images it is told what 16-byte accesses need to know."""
    return tuple(t.stride(0) for t in images), disguised(step_of(tensors, 0))


def index_type(elements: int) -> tl.dtype:
    """Of an element's number. It is divided by sizes, which in 64 bits would take longer than the memory does."""
    return tl.int32 if elements < 2**30 else tl.int64


# --- in a kernel --------------------------------------------------------------------------------------------------


@triton.jit
def element_offset(index, sizes, strides, STRAIGHT: tl.constexpr):
    """Where the elements with these numbers lie."""
    if STRAIGHT:
        return index.to(tl.int64)
    else:
        rest = index
        offset = tl.zeros_like(index).to(tl.int64)
        for outwards in tl.static_range(1, len(sizes)):
            size = undisguised(sizes[len(sizes) - outwards]).to(index.dtype)
            offset += (rest % size).to(tl.int64) * undisguised(strides[len(sizes) - outwards])
            rest = rest // size
        return offset + rest.to(tl.int64) * undisguised(strides[0])


@triton.jit
def parameter(values, value, sample, stride, index, inside, sizes, strides, REAL: tl.constexpr):
    """One number for all elements, or what a tensor holds for these elements of a sample."""
    if values is None:
        return number(value, REAL)
    else:
        at = sample * undisguised(stride) + element_offset(index, sizes, strides, False)
        return tl.load(values + at, mask=inside).to(REAL)


@triton.jit
def per_sample(values, value, sample, stride, here, REAL: tl.constexpr):
    """One number for all samples, or what a tensor holds for these."""
    if values is None:
        return number(value, REAL)
    else:
        return tl.load(values + sample * undisguised(stride), mask=here).to(REAL)


@triton.jit
def clip(values, low, high):
    """Into [low, high]; NaN in any of the three stays."""
    raised = tl.maximum(values, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)
