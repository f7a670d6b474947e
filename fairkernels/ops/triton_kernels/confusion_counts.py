"""confusion_counts: how often each class was predicted for each other one.

Two launches, the result's clearing and the count, 16 bytes a sample and 8 bytes a cell. Up to ``MOST_CLASSES`` classes
a program counts its samples on the chip and adds each cell once; beyond, cells are many and samples seldom meet in one:
each is added by itself, 16 bytes more, in the cache.
What is added are whole numbers: their order changes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import offset_of
from .launch import cdiv, launch, power_of_2, problems

MOST_CLASSES = 64
MOST_PARTS = 1024


@triton.jit(do_not_specialize=["B", "parts", "stride", "other_stride", "sizes", "strides", "other_sizes",
"other_strides",
                               "ignore_index"])  # fmt: skip
def count_cells(
    predictions, labels, counts, B, K, parts, stride, other_stride, sizes, strides, other_sizes, other_strides,
    ignore_index, ON_CHIP: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Bound by one read of both classes; on the chip by the atomics of shared memory, one a sample.
    problem = (tl.program_id(0) // parts).to(tl.int64)
    predictions += offset_of(problem, sizes, strides)
    labels += offset_of(problem, other_sizes, other_strides)
    counts += problem * K * K
    cells = tl.arange(0, CELLS)
    found = tl.zeros((CELLS,), tl.int32)
    for block in range(tl.program_id(0) % parts, (B - 1) // BLOCK + 1, parts):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        predicted = tl.load(predictions + at * stride, mask=at < B, other=-1)
        label = tl.load(labels + at * other_stride, mask=at < B, other=-1)
        kept = (predicted >= 0) & (predicted < K) & (label >= 0) & (label < K) & (label != ignore_index)
        cell = tl.where(kept, label * K + predicted, 0)
        if ON_CHIP:
            found += tl.histogram(cell.to(tl.int32), CELLS, mask=kept)
        else:
            tl.atomic_add(counts + cell, tl.full((BLOCK,), 1, tl.int64), mask=kept, sem="relaxed")
    if ON_CHIP:
        tl.atomic_add(counts + cells, found.to(tl.int64), mask=(cells < K * K) & (found > 0), sem="relaxed")


def confusion_counts(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Two launches; none for an empty batch but the clearing."""
    *leading, batch = predictions.shape
    counts = predictions.new_zeros((*leading, num_classes, num_classes))
    sizes, strides = problems(predictions, 1)
    other_sizes, other_strides = problems(labels, 1)
    on_chip = num_classes <= MOST_CLASSES
    block, cells = 1024, power_of_2(num_classes**2, 32) if on_chip else 1
    parts = min(cdiv(batch, block), MOST_PARTS)
    launch(
        count_cells,
        (predictions.shape[:-1].numel() * parts,),
        predictions, labels, counts, batch, num_classes, parts, predictions.stride(-1), labels.stride(-1),
        sizes, strides, other_sizes, other_strides, ignore_index,
        in_place=True, num_warps=min(max(cells // 256, 4), 16), ON_CHIP=on_chip, CELLS=cells, BLOCK=block,
    )  # fmt: skip
    return counts
