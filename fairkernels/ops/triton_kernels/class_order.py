"""The samples of each class, side by side: what programs that own a class read.

Two tables per problem say it: ``order``, the samples by class and within a class as they came, ignored ones last, and
``starts``, where each class begins in it, the ignored ones being class K. A label that is no class counts as class 0;
its weight, which is NaN, says what it was.

A class has a *slot*, its row in matrices of R = min(B, K) rows: itself where there are as many rows as classes, else
its first place in ``order``, so that a slot is found without a search and some rows stay empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import offset_of
from .launch import cdiv, launch, power_of_2, problems

MOST_COUNTED = 16384  # samples that are ordered by comparing each with all
MOST_BINS = 4096  # classes that one program counts on the chip


@dataclass(frozen=True)
class ClassOrder:
    order: Tensor | None  # [problems, B]
    starts: Tensor  # [problems, K + 1]


@triton.jit
def class_of(label, K, ignore_index):
    """K for a sample that is ignored, 0 for a label that is no class."""
    known = tl.where((label >= 0) & (label < K), label, 0)
    return tl.where(label == ignore_index, K, known)


@triton.jit(do_not_specialize=["B", "parts", "ignore_index"])
def class_of_each(labels, classes, B, K, parts, stride, sizes, strides, ignore_index, BLOCK: tl.constexpr):
    # Memory bound: 8 bytes of a label, 4 of its class.
    problem = (tl.program_id(0) // parts).to(tl.int64)
    labels += offset_of(problem, sizes, strides)
    at = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + at * stride, mask=at < B, other=0)
    tl.store(classes + problem * B + at, class_of(label, K, ignore_index), mask=at < B)


@triton.jit
def load_keys(labels, at, B, K, stride, ignore_index, KEY: tl.constexpr):
    """Numbers that sort as (class, place) do; beyond the batch greater than all."""
    label = tl.load(labels + at.to(tl.int64) * stride, mask=at < B, other=0)
    of_class = tl.where(at < B, class_of(label, K, ignore_index), K + 1)
    return of_class.to(KEY) * B + at


@triton.jit(do_not_specialize=["B", "samples", "sizes", "strides", "ignore_index"])
def order_by_counting(
    labels, order, starts, B, K, samples, stride, sizes, strides, ignore_index,
    KEY: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Bound by its comparisons, (samples + K + 1) B of them, two operations each: the place of a sample is the number of
    # those that sort before it, the start of a class the number of samples in classes before it.
    programs = tl.cdiv(samples + K + 1, QUERIES)
    problem = (tl.program_id(0) // programs).to(tl.int64)
    query = tl.program_id(0) % programs * QUERIES + tl.arange(0, QUERIES)
    labels += offset_of(problem, sizes, strides)

    own = load_keys(labels, query, B, K, stride, ignore_index, KEY)
    bound = tl.where(query < samples, own, (query - samples).to(KEY) * B)
    before = tl.zeros((QUERIES, KEYS), tl.int32)
    for first in range(0, B, KEYS):
        keys = load_keys(labels, first + tl.arange(0, KEYS), B, K, stride, ignore_index, KEY)
        before += (keys[None, :] < bound[:, None]).to(tl.int32)
    place = tl.sum(before, 1)

    tl.store(order + problem * B + place, query, mask=query < samples)
    of_class = query - samples
    tl.store(starts + problem * (K + 1) + of_class, place, mask=(of_class >= 0) & (of_class <= K))


@triton.jit(do_not_specialize=["B", "parts", "sizes", "strides", "ignore_index"])
def count_classes(
    labels, counts, B, K, parts, stride, sizes, strides, ignore_index,
    ON_CHIP: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Bound by the labels' 8 bytes each; programs count a part each and add whole numbers, whose order changes nothing.
    problem = (tl.program_id(0) // parts).to(tl.int64)
    labels += offset_of(problem, sizes, strides)
    counts += problem * (K + 1) + 1
    bins = tl.arange(0, BINS)
    found = tl.zeros((BINS,), tl.int32)
    for block in range(tl.program_id(0) % parts, (B - 1) // BLOCK + 1, parts):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        label = tl.load(labels + at * stride, mask=at < B, other=0)
        of_class = class_of(label, K, ignore_index).to(tl.int32)
        inside = (at < B) & (of_class < K)
        if ON_CHIP:
            found += tl.histogram(of_class, BINS, mask=inside)
        else:
            tl.atomic_add(counts + of_class, 1, mask=inside)
    if ON_CHIP:
        tl.atomic_add(counts + bins, found, mask=(bins < K) & (found > 0))


def class_order(labels: Tensor, num_classes: int, ignore_index: int) -> ClassOrder:
    """Both tables. Up to ``MOST_COUNTED`` samples: one launch; beyond: one, and a stable sort by PyTorch."""
    batch, leading = labels.shape[-1], labels.shape[:-1].numel()
    if batch <= MOST_COUNTED:
        return counted(labels, num_classes, ignore_index, ordered=True)
    of_class = torch.empty((leading, batch), dtype=torch.int32, device=labels.device)
    block = 1024
    parts = cdiv(batch, block)
    launch(
        class_of_each,
        (leading * parts,),
        labels, of_class, batch, num_classes, parts, labels.stride(-1), *problems(labels, 1), ignore_index,
        num_warps=4, BLOCK=block,
    )  # fmt: skip
    in_order, order = of_class.sort(dim=-1, stable=True)
    classes = torch.arange(num_classes + 1, dtype=torch.int32, device=labels.device)
    starts = torch.searchsorted(in_order, classes.expand(leading, -1).contiguous(), out_int32=True)
    return ClassOrder(order, starts)


def class_starts(labels: Tensor, num_classes: int, ignore_index: int) -> ClassOrder:
    """``starts`` alone. Up to ``MOST_COUNTED`` samples: one launch; beyond: three, one of them over the labels."""
    batch, leading = labels.shape[-1], labels.shape[:-1].numel()
    if batch <= MOST_COUNTED:
        return counted(labels, num_classes, ignore_index, ordered=False)
    counts = torch.zeros((leading, num_classes + 1), dtype=torch.int32, device=labels.device)
    sizes, strides = problems(labels, 1)
    on_chip = num_classes <= MOST_BINS
    bins = power_of_2(num_classes) if on_chip else 1
    block, parts = 1024, min(cdiv(batch, 1024), 1024)
    launch(
        count_classes,
        (leading * parts,),
        labels, counts, batch, num_classes, parts, labels.stride(-1), sizes, strides, ignore_index,
        in_place=True, num_warps=min(max(bins // 256, 4), 16), ON_CHIP=on_chip, BINS=bins, BLOCK=block,
    )  # fmt: skip
    return ClassOrder(None, counts.cumsum(-1, dtype=torch.int32))


def counted(labels: Tensor, num_classes: int, ignore_index: int, *, ordered: bool) -> ClassOrder:
    batch, leading = labels.shape[-1], labels.shape[:-1].numel()
    sizes, strides = problems(labels, 1)
    samples = batch if ordered else 0
    room = 4 * cdiv(leading * samples, 4)  # both tables begin at 16 bytes: else a kernel would be compiled again
    tables = torch.empty(room + leading * (num_classes + 1), dtype=torch.int32, device=labels.device)
    order, starts = tables[: leading * samples], tables[room:]
    queries, keys = 16, 256
    launch(
        order_by_counting,
        (leading * cdiv(samples + num_classes + 1, queries),),
        labels, order, starts, batch, num_classes, samples, labels.stride(-1), sizes, strides, ignore_index,
        num_warps=4, KEY=tl.int32 if (num_classes + 2) * (batch + 1) < 2**31 else tl.int64, QUERIES=queries, KEYS=keys,
    )  # fmt: skip
    return ClassOrder(order.view(leading, samples) if ordered else None, starts.view(leading, num_classes + 1))
