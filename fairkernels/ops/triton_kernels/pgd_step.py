"""The step of projected gradient descent."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import sign
from .elementwise import clip, element_offset, first_of, index_type, memory_order, parameter, per_sample, walk, walk_all
from .launch import cdiv, launch, power_of_2

PARTIALS = 256
"""Into how many sums a sample that is too large for one program is split at most."""


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alphas: Tensor | None,
    epsilons: Tensor | None,
    lows: Tensor | None,
    highs: Tensor | None,
    mask: Tensor | None,
    alpha: float,
    eps: float,
    low: float,
    high: float,
    norm: str,
    targeted: bool,
    out: Tensor,
) -> None:
    """Into ``out``, which may be one of the images.

    ``linf``: one launch, 3 reads and 1 write an element, 16 bytes in float32. ``l2``: one launch and as many bytes up
    to 16384 elements a sample (8192 in float64), beyond it two, 6 reads and 1 write, 28 bytes in float32. Tensors among
    the parameters are read besides.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    step = linf_step if norm == "linf" else l2_step
    step((x_adv, grad, x, out), (alphas, epsilons, lows, highs, mask), (alpha, eps, low, high), targeted)


Images = tuple[Tensor, Tensor, Tensor, Tensor]
Tensors = tuple[Tensor | None, ...]


def linf_step(images: Images, tensors: Tensors, numbers: tuple[float, ...], targeted: bool) -> None:
    out = images[3]
    n = out.numel()
    through, straight = walk_all(memory_order(out, range(out.dim())), images, tensors)
    args = (*images, *tensors, *numbers, n, *through.numbers)
    options = {"TARGETED": targeted, "STRAIGHT": straight, "INDEX": index_type(n), "BLOCK": 1024}
    launch(linf_kernel, (cdiv(n, 1024),), *args, **options, num_warps=4, in_place=in_place(images, tensors))


def l2_step(images: Images, tensors: Tensors, numbers: tuple[float, ...], targeted: bool) -> None:
    out = images[3]
    samples, n = out.shape[0], out[:1].numel()
    order = memory_order(out, range(1, out.dim()))
    through = walk(order, out.shape, (*images, *tensors))
    layout = (first_of(images, tensors), *through.numbers)
    straight = walk(order, out.shape, images).straight
    options = {"STRAIGHT": straight, "INDEX": index_type(n), "in_place": in_place(images, tensors)}

    if n <= (16384 if out.element_size() < 8 else 8192):
        columns = power_of_2(n, least=16)
        rows = max(1024 // columns, 1)
        grid = (cdiv(samples, rows),)
        warps = min(max(rows * columns // 256, 4), 16)
        options |= {"TARGETED": targeted, "ROWS": rows, "COLUMNS": columns, "num_warps": warps}
        launch(l2_kernel, grid, *images, *tensors, *numbers, samples, n, *layout, **options)
        return

    block = 2048 if out.element_size() < 8 else 1024
    chunk = cdiv(cdiv(n, block), PARTIALS) * block
    chunks, blocks = cdiv(n, chunk), cdiv(n, block)
    sums = out.new_empty((3, samples, chunks), dtype=torch.float64 if out.dtype == torch.float64 else torch.float32)
    options |= {"BLOCK": block, "num_warps": 4}
    sources = (*images[:3], tensors[4])
    launch(l2_sums_kernel, (samples * chunks,), *sources, sums, samples, n, chunk, chunks, *layout, **options)
    args = (*images, *tensors, *numbers, sums, samples, n, blocks, chunks, *layout)
    launch(l2_apply_kernel, (samples * blocks,), *args, TARGETED=targeted, CHUNKS=PARTIALS, **options)


def in_place(images: Images, tensors: Tensors) -> bool:
    out = images[3]
    return any(t is not None and t.data_ptr() == out.data_ptr() for t in (*images[:3], *tensors))


# --- linf ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def linf_kernel(
    x_adv,
    grad,
    x,
    out,
    alphas,
    epsilons,
    lows,
    highs,
    mask,
    alpha: tl.float64,
    eps: tl.float64,
    low: tl.float64,
    high: tl.float64,
    n: tl.int64,
    sizes,
    strides,
    TARGETED: tl.constexpr,
    STRAIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Bound by memory: 3 reads and 1 write an element, 16 bytes in fp32; about 20 operations, with tensors among the
    # parameters a division a dimension besides. Whole blocks do without a mask, which would split 16-byte accesses.
    images = (x_adv, grad, x, out)
    tensors = (alphas, epsilons, lows, highs, mask)
    numbers = (alpha, eps, low, high)
    first = tl.program_id(0).to(INDEX) * BLOCK
    index = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:
        linf_block(images, tensors, numbers, index, None, sizes, strides, TARGETED, STRAIGHT)
    else:
        linf_block(images, tensors, numbers, index, index < n, sizes, strides, TARGETED, STRAIGHT)


@triton.jit
def linf_block(images, tensors, numbers, index, inside, sizes, strides, TARGETED: tl.constexpr, STRAIGHT: tl.constexpr):
    x_adv, grad, x, out = images
    alphas, epsilons, lows, highs, mask = tensors
    alpha, eps, low, high = numbers
    REAL: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    start = tl.load(x_adv + element_offset(index, sizes, strides[0], STRAIGHT), mask=inside).to(REAL)
    slope = tl.load(grad + element_offset(index, sizes, strides[1], STRAIGHT), mask=inside).to(REAL)
    centre = tl.load(x + element_offset(index, sizes, strides[2], STRAIGHT), mask=inside).to(REAL)

    step = parameter(alphas, alpha, 0, 0, index, inside, sizes, strides[4], REAL)
    radius = parameter(epsilons, eps, 0, 0, index, inside, sizes, strides[5], REAL)
    lowest = parameter(lows, low, 0, 0, index, inside, sizes, strides[6], REAL)
    highest = parameter(highs, high, 0, 0, index, inside, sizes, strides[7], REAL)
    if TARGETED:
        step = -step
    if mask is not None:
        step *= parameter(mask, 1.0, 0, 0, index, inside, sizes, strides[8], REAL)

    moved = clip(start + step * sign(slope), centre - radius, centre + radius)
    moved = clip(moved, lowest, highest)
    tl.store(out + element_offset(index, sizes, strides[3], STRAIGHT), moved.to(out.dtype.element_ty), mask=inside)


# --- l2 -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["samples"])
def l2_kernel(
    x_adv,
    grad,
    x,
    out,
    alphas,
    epsilons,
    lows,
    highs,
    mask,
    alpha: tl.float64,
    eps: tl.float64,
    low: tl.float64,
    high: tl.float64,
    samples: tl.int64,
    n,
    firsts,
    sizes,
    strides,
    TARGETED: tl.constexpr,
    STRAIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Bound by memory: 3 reads and 1 write an element, 16 bytes in fp32; a sample stays in registers between the sums
    # over it and the step. About 25 operations an element.
    sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    index = tl.arange(0, COLUMNS)[None, :].to(INDEX)
    here = sample < samples
    inside = here & (index < n)
    sources = (x_adv, grad, x, mask)
    centre, delta, slope = l2_tile(sources, sample, index, inside, firsts, sizes, strides, STRAIGHT)
    step, radius = l2_sizes(alphas, epsilons, alpha, eps, sample, here, firsts, TARGETED, centre.dtype)

    step = step / (tl.sqrt(tl.sum(slope * slope, axis=1, keep_dims=True)) + 1e-10)
    moved = delta + step * slope
    shrink = shrink_factor(tl.sum(moved * moved, axis=1, keep_dims=True), radius)
    limits = (lows, highs, low, high)
    l2_store(out, centre + moved * shrink, limits, sample, index, inside, firsts, sizes, strides, STRAIGHT)


@triton.jit
def l2_tile(sources, sample, index, inside, firsts, sizes, strides, STRAIGHT: tl.constexpr):
    """Of some elements of some samples: the centre, the perturbation and the slope, all 0 outside."""
    x_adv, grad, x, mask = sources
    REAL: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    start_at = sample * firsts[0][0] + element_offset(index, sizes, strides[0], STRAIGHT)
    slope_at = sample * firsts[0][1] + element_offset(index, sizes, strides[1], STRAIGHT)
    centre_at = sample * firsts[0][2] + element_offset(index, sizes, strides[2], STRAIGHT)
    start = tl.load(x_adv + start_at, mask=inside, other=0).to(REAL)
    slope = tl.load(grad + slope_at, mask=inside, other=0).to(REAL)
    centre = tl.load(x + centre_at, mask=inside, other=0).to(REAL)
    if mask is not None:
        allowed = parameter(mask, 1.0, sample, firsts[1][4], index, inside, sizes, strides[8], REAL)
        slope = tl.where(inside, slope * allowed, 0)
    return centre, start - centre, slope


@triton.jit
def l2_sizes(alphas, epsilons, alpha, eps, sample, here, firsts, TARGETED: tl.constexpr, REAL: tl.constexpr):
    """Step size, signed, and radius of the samples."""
    step = per_sample(alphas, alpha, sample, firsts[1][0], here, REAL)
    radius = per_sample(epsilons, eps, sample, firsts[1][1], here, REAL)
    if TARGETED:
        step = -step
    return step, radius


@triton.jit
def shrink_factor(squared, radius):
    """What brings a perturbation of this squared length back into the ball; NaN stays NaN, below 0 is rounding."""
    # The quick root of float32 takes what is denormal for 0, and a radius of 0 divided by it is NaN.
    length = tl.sqrt_rn(squared) if squared.dtype == tl.float32 else tl.sqrt(squared)
    return tl.where(squared <= radius * radius, 1.0, radius / length)


@triton.jit
def l2_store(out, moved, limits, sample, index, inside, firsts, sizes, strides, STRAIGHT: tl.constexpr):
    lows, highs, low, high = limits
    lowest = parameter(lows, low, sample, firsts[1][2], index, inside, sizes, strides[6], moved.dtype)
    highest = parameter(highs, high, sample, firsts[1][3], index, inside, sizes, strides[7], moved.dtype)
    at = sample * firsts[0][3] + element_offset(index, sizes, strides[3], STRAIGHT)
    tl.store(out + at, clip(moved, lowest, highest).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["samples"])
def l2_sums_kernel(
    x_adv,
    grad,
    x,
    mask,
    sums,
    samples: tl.int64,
    n,
    chunk,
    chunks,
    firsts,
    sizes,
    strides,
    STRAIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Bound by memory: 3 reads an element, 12 bytes in fp32, for three sums over a chunk of a sample.
    REAL: tl.constexpr = sums.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first = (program % chunks).to(INDEX) * chunk
    grad_grad = tl.zeros((BLOCK,), REAL)
    delta_delta = tl.zeros((BLOCK,), REAL)
    delta_grad = tl.zeros((BLOCK,), REAL)
    for start in range(0, chunk, BLOCK):
        index = first + start + tl.arange(0, BLOCK)
        sources = (x_adv, grad, x, mask)
        _, delta, slope = l2_tile(sources, sample, index, index < n, firsts, sizes, strides, STRAIGHT)
        grad_grad += slope * slope
        delta_delta += delta * delta
        delta_grad += delta * slope
    total = samples * chunks
    tl.store(sums + program, tl.sum(grad_grad))
    tl.store(sums + total + program, tl.sum(delta_delta))
    tl.store(sums + 2 * total + program, tl.sum(delta_grad))


@triton.jit(do_not_specialize=["samples"])
def l2_apply_kernel(
    x_adv,
    grad,
    x,
    out,
    alphas,
    epsilons,
    lows,
    highs,
    mask,
    alpha: tl.float64,
    eps: tl.float64,
    low: tl.float64,
    high: tl.float64,
    sums,
    samples: tl.int64,
    n,
    blocks,
    chunks,
    firsts,
    sizes,
    strides,
    TARGETED: tl.constexpr,
    STRAIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # Bound by memory: 3 reads and 1 write an element, 16 bytes in fp32. Every program adds the sums of its sample, in
    # one order: at most 256 of each kind.
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    index = (program % blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    sources = (x_adv, grad, x, mask)
    centre, delta, slope = l2_tile(sources, sample, index, inside, firsts, sizes, strides, STRAIGHT)
    step, radius = l2_sizes(alphas, epsilons, alpha, eps, sample, True, firsts, TARGETED, centre.dtype)

    chunk = tl.arange(0, CHUNKS)
    at = sums + sample * chunks + chunk
    total = samples * chunks
    grad_grad = tl.sum(tl.load(at, mask=chunk < chunks, other=0))
    delta_delta = tl.sum(tl.load(at + total, mask=chunk < chunks, other=0))
    delta_grad = tl.sum(tl.load(at + 2 * total, mask=chunk < chunks, other=0))

    step = step / (tl.sqrt(grad_grad) + 1e-10)
    shrink = shrink_factor(delta_delta + 2 * step * delta_grad + step * step * grad_grad, radius)
    moved = centre + (delta + step * slope) * shrink
    limits = (lows, highs, low, high)
    l2_store(out, moved, limits, sample, index, inside, firsts, sizes, strides, STRAIGHT)
