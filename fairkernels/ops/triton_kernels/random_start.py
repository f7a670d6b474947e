"""Random starts of attacks: a uniform point of the ball around each sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import clip, element_offset, first_of, index_type, parameter, per_sample, walk, walk_all
from .launch import AS_WRITTEN, cdiv, launch, power_of_2
from .philox import in_order, uniform, words

PARTIALS = 256
"""Into how many sums a sample that is too large for one program is split at most."""

Images = tuple[Tensor, Tensor]
Tensors = tuple[Tensor | None, Tensor | None, Tensor | None]
Numbers = tuple[float, float, float]


def random_start(
    x: Tensor,
    epsilons: Tensor | None,
    lows: Tensor | None,
    highs: Tensor | None,
    eps: float,
    low: float,
    high: float,
    norm: str,
    seed: int,
) -> Tensor:
    """``[N, ...]``, in the layout of x.

    ``linf``: one launch, 1 read and 1 write an element, 8 bytes in float32. ``l2``: one launch and as many bytes up to
    8189 elements a sample (2045 in float64); beyond it two, which draw the same numbers twice rather than keep them.
    Elements are worked on in the order of their numbers, four from one counter, so in channels_last accesses are not 16
    bytes wide. Tensors among the parameters are read besides.
    """
    out = torch.empty_like(x)
    start = linf_start if norm == "linf" else l2_start
    start((x, out), (epsilons, lows, highs), (eps, low, high), seed)
    return out


def linf_start(images: Images, tensors: Tensors, numbers: Numbers, seed: int) -> None:
    x = images[0]
    n = x.numel()
    through, straight = walk_all(range(x.dim()), images, tensors)
    args = (*images, *tensors, *numbers, seed, n, *through.numbers)
    options = {"STRAIGHT": straight, "INDEX": index_type(n), "BLOCK": 1024}
    launch(linf_kernel, (cdiv(n, 1024),), *args, **options, **AS_WRITTEN, num_warps=4)


def l2_start(images: Images, tensors: Tensors, numbers: Numbers, seed: int) -> None:
    x = images[0]
    samples, n, order = x.shape[0], x[:1].numel(), range(1, x.dim())
    operands = (*images, *tensors)
    through = walk(order, x.shape, operands)
    layout = (first_of(images, tensors), *through.numbers)
    options = {"STRAIGHT": walk(order, x.shape, images).straight, "INDEX": index_type(n)}
    reach = n + 3  # from the start of the counter that a sample begins in

    if reach <= (8192 if x.element_size() < 8 else 2048):
        counters = power_of_2(cdiv(reach, 4), least=4)
        rows = max(256 // counters, 1)
        warps = min(max(rows * counters // 128, 4), 16)
        args = (*operands, *numbers, seed, samples, n, *layout)
        options |= AS_WRITTEN | {"ROWS": rows, "COUNTERS": counters, "num_warps": warps}
        launch(l2_kernel, (cdiv(samples, rows),), *args, **options)
        return

    block = 1024
    chunk = cdiv(cdiv(reach, block), PARTIALS) * block
    chunks = cdiv(reach, chunk)
    sums = x.new_empty((samples, chunks), dtype=torch.float64)
    launch(l2_sums_kernel, (samples * chunks,), sums, seed, n, chunk, chunks, **AS_WRITTEN, BLOCK=block, num_warps=4)
    blocks = cdiv(reach, block)
    chunked = (sums, n, blocks, chunks)
    launch(
        l2_place_kernel,
        (samples * blocks,),
        *operands,
        *numbers,
        seed,
        *chunked,
        *layout,
        **options,
        **AS_WRITTEN,
        BLOCK=block,
        CHUNKS=PARTIALS,
        num_warps=4,
    )


# --- linf ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "n"])
def linf_kernel(
    x,
    out,
    epsilons,
    lows,
    highs,
    eps: tl.float64,
    low: tl.float64,
    high: tl.float64,
    seed: tl.int64,
    n: tl.int64,
    sizes,
    strides,
    STRAIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Bound by memory: 1 read and 1 write an element, 8 bytes in fp32; about 30 operations, most of them the ten rounds
    # of the generator for four elements. Whole blocks do without a mask, which would split 16-byte accesses.
    images, tensors, numbers = (x, out), (epsilons, lows, highs), (eps, low, high)
    first = tl.program_id(0).to(INDEX) * BLOCK
    index = first + tl.arange(0, BLOCK)
    a, b, c, d = words(first // 4 + tl.arange(0, BLOCK // 4), 0, seed)
    noise = in_order(uniform(a, tl.float32), uniform(b, tl.float32), uniform(c, tl.float32), uniform(d, tl.float32))
    if first + BLOCK <= n:
        linf_block(images, tensors, numbers, noise, index, None, sizes, strides, STRAIGHT)
    else:
        linf_block(images, tensors, numbers, noise, index, index < n, sizes, strides, STRAIGHT)


@triton.jit
def linf_block(images, tensors, numbers, noise, index, inside, sizes, strides, STRAIGHT: tl.constexpr):
    x, out = images
    epsilons, lows, highs = tensors
    eps, low, high = numbers
    REAL: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    centre = tl.load(x + element_offset(index, sizes, strides[0], STRAIGHT), mask=inside).to(REAL)
    radius = parameter(epsilons, eps, 0, 0, index, inside, sizes, strides[2], REAL)
    lowest = parameter(lows, low, 0, 0, index, inside, sizes, strides[3], REAL)
    highest = parameter(highs, high, 0, 0, index, inside, sizes, strides[4], REAL)
    moved = clip(centre + radius * (2 * noise - 1).to(REAL), lowest, highest)
    tl.store(out + element_offset(index, sizes, strides[1], STRAIGHT), moved.to(out.dtype.element_ty), mask=inside)


# --- l2 -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "samples"])
def l2_kernel(
    x,
    out,
    epsilons,
    lows,
    highs,
    eps: tl.float64,
    low: tl.float64,
    high: tl.float64,
    seed: tl.int64,
    samples: tl.int64,
    n,
    firsts,
    sizes,
    strides,
    STRAIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    # Bound by arithmetic: some 50 operations an element in fp64, for 1 read and 1 write, 8 bytes in fp32. A sample
    # stays in registers between the sum over it and the move.
    images, tensors, numbers = (x, out), (epsilons, lows, highs), (eps, low, high)
    sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    counter = (sample * n) // 4 + tl.arange(0, COUNTERS)[None, :]
    index = (sample * n) // 4 * 4 - sample * n + tl.arange(0, 4 * COUNTERS)[None, :]
    here = sample < samples
    inside = here & (index >= 0) & (index < n)
    direction = tl.where(inside, normals(counter, seed), 0)
    squared = tl.sum(direction * direction, axis=1, keep_dims=True)
    direction *= scale_of(squared, epsilons, eps, seed, sample, n, here, firsts)
    l2_place(images, tensors, numbers, direction, sample, index, inside, firsts, sizes, strides, STRAIGHT, INDEX)


@triton.jit
def normals(counter, seed):
    """Four normal numbers of each counter, by the method of Box and Muller: two words give two of them."""
    a, b, c, d = words(counter, 0, seed)
    first, second = box_muller(uniform(a, tl.float64), uniform(b, tl.float64))
    third, fourth = box_muller(uniform(c, tl.float64), uniform(d, tl.float64))
    return in_order(first, second, third, fourth)


@triton.jit
def box_muller(first, second):
    length = tl.sqrt(-2 * tl.log(1 - first))
    cosine, sine = turn(second)
    return length * cosine, length * sine


@triton.jit
def turn(share):
    """Cosine and sine of 2 pi times a number in [0, 1).

    The nearest quarter turn is taken off exactly, the rest is at most pi / 4: Taylor's polynomials leave out 5e-17. The
    library's functions would keep a stack for large arguments.
    """
    quarter = tl.floor(4 * share + 0.5)
    x = (4 * share - quarter) * 1.57079632679489661923
    z = x * x
    sine = z * (-1 / 1307674368000) + 1 / 6227020800
    sine = sine * z - 1 / 39916800
    sine = sine * z + 1 / 362880
    sine = sine * z - 1 / 5040
    sine = sine * z + 1 / 120
    sine = sine * z - 1 / 6
    sine = sine * z * x + x
    cosine = z * (1 / 20922789888000) - 1 / 87178291200
    cosine = cosine * z + 1 / 479001600
    cosine = cosine * z - 1 / 3628800
    cosine = cosine * z + 1 / 40320
    cosine = cosine * z - 1 / 720
    cosine = cosine * z + 1 / 24
    cosine = cosine * z - 0.5
    cosine = cosine * z + 1
    turns = quarter.to(tl.int32)
    odd = (turns & 1) != 0
    back = ((turns + 1) & 2) != 0
    down = (turns & 2) != 0
    turned_cosine, turned_sine = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(back, -turned_cosine, turned_cosine), tl.where(down, -turned_sine, turned_sine)


@triton.jit
def scale_of(squared, epsilons, eps, seed, sample, n, here, firsts):
    """What makes a direction of this squared length a point uniform in the ball: radius u^(1/n) / length."""
    radius = per_sample(epsilons, eps, sample, firsts[1][0], here, tl.float64)
    first, _, _, _ = words(sample, 1, seed)
    share = uniform(first, tl.float64)
    share = tl.where(share > 0, tl.exp(tl.log(tl.where(share > 0, share, 1)) / n), 0)
    return tl.where(squared > 0, radius * share / tl.sqrt(tl.where(squared > 0, squared, 1)), 0)


@triton.jit
def l2_place(
    images,
    tensors,
    numbers,
    direction,
    sample,
    index,
    inside,
    firsts,
    sizes,
    strides,
    STRAIGHT: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Some elements of some samples, moved by ``direction``, into the result."""
    x, out = images
    _, lows, highs = tensors
    _, low, high = numbers
    REAL: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    index = index.to(INDEX)
    centre_at = sample * firsts[0][0] + element_offset(index, sizes, strides[0], STRAIGHT)
    out_at = sample * firsts[0][1] + element_offset(index, sizes, strides[1], STRAIGHT)
    centre = tl.load(x + centre_at, mask=inside).to(REAL)
    lowest = parameter(lows, low, sample, firsts[1][1], index, inside, sizes, strides[3], REAL)
    highest = parameter(highs, high, sample, firsts[1][2], index, inside, sizes, strides[4], REAL)
    moved = clip(centre + direction.to(REAL), lowest, highest)
    tl.store(out + out_at, moved.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def l2_sums_kernel(sums, seed: tl.int64, n, chunk, chunks, BLOCK: tl.constexpr):
    # Bound by arithmetic: some 50 operations an element in fp64; reads nothing. Chunks begin at the start of a counter.
    program = tl.program_id(0).to(tl.int64)
    first = program // chunks * n
    begin = first // 4 * 4 + program % chunks * chunk
    squared = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, chunk, BLOCK):
        element = begin + start + tl.arange(0, BLOCK)
        numbers = normals((begin + start) // 4 + tl.arange(0, BLOCK // 4), seed)
        squared += tl.where((element >= first) & (element < first + n), numbers * numbers, 0)
    tl.store(sums + program, tl.sum(squared))


@triton.jit(do_not_specialize=["seed"])
def l2_place_kernel(
    x,
    out,
    epsilons,
    lows,
    highs,
    eps: tl.float64,
    low: tl.float64,
    high: tl.float64,
    seed: tl.int64,
    sums,
    n,
    blocks,
    chunks,
    firsts,
    sizes,
    strides,
    STRAIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # Bound by arithmetic: some 50 operations an element in fp64, for 1 read and 1 write, 8 bytes in fp32. Every program
    # adds the sums of its sample, in one order: at most 256.
    images, tensors, numbers = (x, out), (epsilons, lows, highs), (eps, low, high)
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    begin = (sample * n) // 4 * 4 + program % blocks * BLOCK
    index = begin - sample * n + tl.arange(0, BLOCK)
    inside = (index >= 0) & (index < n)
    chunk = tl.arange(0, CHUNKS)
    squared = tl.sum(tl.load(sums + sample * chunks + chunk, mask=chunk < chunks, other=0))
    scale = scale_of(squared, epsilons, eps, seed, sample, n, True, firsts)
    direction = normals(begin // 4 + tl.arange(0, BLOCK // 4), seed) * scale
    l2_place(images, tensors, numbers, direction, sample, index, inside, firsts, sizes, strides, STRAIGHT, INDEX)
