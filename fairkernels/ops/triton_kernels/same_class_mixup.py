"""Mixing each sample with another one of its class (Domain Mixup, arXiv 2411.14424)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import element_offset, index_type, memory_order, per_sample, step_of, walk
from .launch import cdiv, launch, power_of_2
from .philox import words

LABELS = 1024
"""Up to so many samples every program looks for the partner of its own."""


def same_class_mixup(x: Tensor, labels: Tensor, lams: Tensor | None, lam: float, seed: int) -> tuple[Tensor, Tensor]:
    """``[B, ...]`` in the layout of x, and the partners, ``[B]``.

    2 reads and 1 write an element. Up to 1024 samples one launch, whose programs read all labels each; beyond, torch
    sorts the labels, and one launch finds the partners before another one mixes.
    """
    out = torch.empty_like(x)
    partners = torch.empty_like(labels, memory_format=torch.contiguous_format)
    small = labels.numel() <= LABELS
    if not small:
        find_partners(labels, partners, seed)
    mix((x, out), labels, partners, lams, lam, seed, search=small)
    return out, partners


def find_partners(labels: Tensor, partners: Tensor, seed: int) -> None:
    ordered, order = labels.sort(stable=True)
    samples = labels.numel()
    args = (ordered, order, partners, seed, samples, samples.bit_length())
    launch(partners_kernel, (cdiv(samples, 128),), *args, BLOCK=128, num_warps=4)


def mix(
    images: tuple[Tensor, Tensor],
    labels: Tensor,
    partners: Tensor,
    lams: Tensor | None,
    lam: float,
    seed: int,
    *,
    search: bool,
) -> None:
    x, out = images
    samples, n = labels.numel(), x[:1].numel()
    order = memory_order(out, range(1, x.dim()))
    through = walk(order, x.shape, images)
    columns = min(power_of_2(n, least=16), 4096)
    rows = min(max(1024 // columns, 1), 4 if search else 64)
    blocks = max(cdiv(n, columns), 1)  # partners are wanted of samples without elements too
    launch(
        mix_kernel,
        (cdiv(samples, rows) * blocks,),
        x,
        out,
        labels,
        partners,
        lams,
        lam,
        seed,
        samples,
        n,
        blocks,
        labels.stride(0),
        0 if lams is None else lams.stride(0),
        step_of(images, 0),
        through.sizes,
        through.strides,
        SEARCH=LABELS if search else 0,
        STRAIGHT=through.straight,
        INDEX=index_type(n),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=8 if search else max(columns // 256, 4),
    )


@triton.jit(do_not_specialize=["seed", "samples"])
def mix_kernel(
    x,
    out,
    labels,
    partners,
    shares,
    share: tl.float64,
    seed: tl.int64,
    samples: tl.int64,
    n,
    blocks,
    label_stride,
    share_stride,
    firsts,
    sizes,
    strides,
    SEARCH: tl.constexpr,
    STRAIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Bound by memory: 2 reads and 1 write an element, 12 bytes in fp32; 3 operations. Where it looks for the partner
    # itself, it reads 8 bytes of each label besides, mostly from the cache.
    REAL: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks * ROWS + tl.arange(0, ROWS)[:, None]
    index = (program % blocks).to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    here = sample < samples
    inside = here & (index < n)
    offset = element_offset(index, sizes, strides[0], STRAIGHT)
    own = tl.load(x + sample * firsts[0] + offset, mask=inside).to(REAL)

    if SEARCH:
        partner = partner_among(labels, label_stride, sample, here, samples, seed, SEARCH)
        tl.store(partners + sample, partner, mask=here & (program % blocks == 0))
    else:
        partner = tl.load(partners + sample, mask=here, other=0)
    other = tl.load(x + partner * firsts[0] + offset, mask=inside).to(REAL)

    weight = per_sample(shares, share, sample * share_stride, here, REAL)
    mixed = weight * own + (1 - weight) * other
    out_at = sample * firsts[1] + element_offset(index, sizes, strides[1], STRAIGHT)
    tl.store(out + out_at, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def partner_among(labels, label_stride, sample, here, samples, seed, LABELS: tl.constexpr):
    """The partners of the samples ``[ROWS, 1]`` among all, which are at most ``LABELS``."""
    candidate = tl.arange(0, LABELS)[None, :].to(tl.int64)
    there = candidate < samples
    mine = tl.load(labels + sample * label_stride, mask=here, other=0)
    theirs = tl.load(labels + candidate * label_stride, mask=there, other=0)
    member = (there & (theirs == mine)).to(tl.int32)
    members = tl.sum(member, axis=1, keep_dims=True)
    place = tl.sum(tl.where(candidate < sample, member, 0), axis=1, keep_dims=True)
    wanted = (place + steps(sample, members, seed)) % tl.maximum(members, 1)
    before = there & (tl.cumsum(member, axis=1) <= wanted)
    return tl.sum(before.to(tl.int64), axis=1, keep_dims=True)


@triton.jit
def steps(sample, members, seed):
    """How many members of its class onwards the partner is: uniform in 1 ... members - 1, 0 where there is one."""
    a, b, c, d = words(sample // 4, 2, seed)  # stream 2: random starts use 0 and 1
    number = sample % 4
    word = tl.where(number < 2, tl.where(number == 0, a, b), tl.where(number == 2, c, d))
    drawn = ((word >> 8).to(tl.int64) * (members - 1)) >> 24
    return tl.where(members > 1, 1 + drawn, 0)


@triton.jit(do_not_specialize=["seed", "samples", "halvings"])
def partners_kernel(
    ordered, order, partners, seed: tl.int64, samples: tl.int64, halvings: tl.int32, BLOCK: tl.constexpr
):
    # Bound by the latency of two binary searches for the members of the class, 2 log2(B) reads a sample.
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = place < samples
    label = tl.load(ordered + place, mask=here, other=0)
    sample = tl.load(order + place, mask=here, other=0)
    end = tl.zeros_like(place) + samples
    first = bound(ordered, label, tl.zeros_like(place), tl.where(here, place, 0), halvings, False)
    last = bound(ordered, label, tl.where(here, place, end), end, halvings, True)
    members = tl.where(here, last - first, 1)
    there = first + (place - first + steps(sample, members, seed)) % members
    tl.store(partners + sample, tl.load(order + there, mask=here, other=0), mask=here)


@triton.jit
def bound(ordered, label, low, high, halvings, PAST: tl.constexpr):
    """Where in [low, high] the labels that are not less (or, ``PAST`` them, greater) begin."""
    for _ in range(halvings):
        middle = (low + high) // 2
        searching = low < high
        found = tl.load(ordered + middle, mask=searching, other=0)
        onwards = searching & ((found <= label) if PAST else (found < label))
        low = tl.where(onwards, middle + 1, low)
        high = tl.where(searching & (onwards == 0), middle, high)
    return low
