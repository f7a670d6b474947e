"""How a call is measured: the calls take turns, the median counts, short ones are repeated and the first one of a turn
stands by itself; peak memory; what a plain copy reaches; on a GPU its time with a cold cache, and its launches."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

Call = Callable[[], object]

BLOCK = 5e-4
"""Seconds that are timed in one go: short calls are repeated for as long."""

ALONE = 5e-3
"""Seconds from which a call is a block by itself: what it touches does not stay in the caches until the next one."""

WARM = 3
"""Calls of which the fastest says how often a block repeats it: what it needs is in the caches, then."""

LEAST, MOST = 3, 21
"""Rounds of one call."""

PATIENCE = 0.6
"""Where ``LEAST`` rounds take more seconds than this or than four budgets, there are none."""


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call over the rounds."""

    seconds: float
    """One of many calls in a row, which find in the caches what the one before left there."""
    first: float
    """The first of the round, which comes right behind another implementation and finds what that left there. Calls of
    ``ALONE`` seconds or more are not repeated: both times are the same."""
    rounds: int


def seconds_of(call: Call, times: int = 1) -> float:
    """Mean seconds of a call that is made so many times in a row."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def interleaved(calls: Mapping[str, Call], once: Mapping[str, float], budget: float) -> dict[str, Timing]:
    """Median time of every call, in blocks of repeated calls and of the first one of each.

    They take turns, so that a busy moment of the machine falls on all of them.

    Args:
        calls: what is timed; each has run before, what it does only once is done.
        once: seconds that one of them took. A call too long for ``LEAST`` rounds is not made again, this is its time;
            of a short one it may be far too much, as after giving back free memory.
        budget: seconds for all rounds of one call, within ``LEAST`` and ``MOST`` rounds.
    """
    warm = {name: warm_seconds(call, once[name]) for name, call in calls.items()}
    times = {name: repetitions(seconds) for name, seconds in warm.items()}
    rounds = {name: rounds_within(budget, (1 + times[name]) * warm[name]) for name in calls}
    most = max(rounds.values(), default=0)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    with no_garbage_collection():
        for turn in range(most):
            for name, call in calls.items():
                if turn * rounds[name] % most < rounds[name]:  # the few rounds of a long call are spread over all
                    taken[name].append(first_and_mean(call, times[name]))
    return {name: timing(found or [(once[name], once[name])]) for name, found in taken.items()}


def warm_seconds(call: Call, once: float) -> float:
    return once if once >= ALONE else min(seconds_of(call) for _ in range(WARM))


def repetitions(seconds: float) -> int:
    """How often a call is repeated after the first one of a block."""
    return 0 if seconds >= ALONE else math.ceil(BLOCK / max(seconds, BLOCK / 5000))


def first_and_mean(call: Call, times: int) -> tuple[float, float]:
    """Seconds of one call and, if there are more, of one of the block behind it."""
    first = seconds_of(call)
    return first, seconds_of(call, times) if times else first


def timing(taken: list[tuple[float, float]]) -> Timing:
    first, repeated = (median(column) for column in zip(*taken, strict=True))
    return Timing(repeated, first, len(taken))


def rounds_within(budget: float, block: float) -> int:
    return 0 if LEAST * block > max(PATIENCE, 4 * budget) else max(LEAST, min(MOST, int(budget / block)))


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


# --- memory -------------------------------------------------------------------------------------------------------


def peak_beyond(call: Call) -> int | None:
    """Bytes by which a call made the process larger at its peak, results included; None where Linux does not count.

    Whole pages of the process: some dozens of kilobytes are noise.
    """
    release_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        call()
        return None
    before = resident("VmRSS")
    call()
    return max(resident("VmHWM") - before, 0)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def release_free_memory() -> None:
    """What was freed and is still held would be taken again without being seen."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def available_memory(device: str = "cpu") -> int:
    """Bytes that this machine, or its GPU, can still give; where Linux does not say, little."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 4 << 30
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


# --- threads and bandwidth ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def copy_bandwidth(count: int, size: int = 256 << 20) -> float:
    """Bytes a second, read and written, of ``copy_`` between two tensors of so many bytes on so many threads."""
    source = torch.ones(size // 4)
    target = torch.ones_like(source)
    with threads(count):
        return 2 * size / median(seconds_of(lambda: target.copy_(source)) for _ in range(9))


def product_speed(count: int, size: int = 1024) -> float:
    """Operations a second of a float32 matrix product on so many threads: what the arithmetic can reach."""
    matrix = torch.ones(size, size)
    with threads(count):
        return 2 * size**3 / median(seconds_of(lambda: torch.mm(matrix, matrix)) for _ in range(9))


# --- on a GPU -----------------------------------------------------------------------------------------------------

GPU_LEAST, GPU_MOST = 5, 40
"""Rounds of one call on a GPU."""

CLOCK = 2e9
"""Cycles a second, rather too many than too few: for so long a GPU is kept waiting."""

LONGEST_WAIT = 0.05
"""Seconds for which a GPU waits at most until a call is queued."""

CACHES = 4
"""The memory that is read between two calls is as many times as large as the L2 cache."""

BLOCKS = 7
"""Of calls in a row; their median counts."""


@dataclass(frozen=True)
class GpuTiming:
    """Median seconds of a call on a GPU."""

    cold: float
    """Of the GPU alone, by its own events, where its L2 cache holds nothing of the call."""
    wall: float
    """Of one of many calls in a row, host and GPU together."""
    rounds: int


def on_gpu(calls: Mapping[str, Call], budget: float) -> dict[str, GpuTiming]:
    """Times of every call; they take turns, as on the CPU.

    Args:
        calls: what is timed; each has run before, what it does only once is done.
        budget: seconds for all rounds of one call, within ``GPU_LEAST`` and ``GPU_MOST`` rounds; a call that takes
            longer is made twice.
    """
    once = {name: gpu_seconds(call) for name, call in calls.items()}
    long = {name for name, seconds in once.items() if seconds > budget}
    host = {name: 0.0 if name in long else host_seconds(call) for name, call in calls.items()}
    wall = {name: once[name] if name in long else wall_seconds(call, budget / 4) for name, call in calls.items()}
    rounds = {name: 1 if name in long else gpu_rounds(budget, wall[name] + host[name]) for name in calls}
    cold = cold_seconds(calls, host, rounds)
    return {name: GpuTiming(median(cold[name]), wall[name], rounds[name]) for name in calls}


def gpu_rounds(budget: float, seconds: float) -> int:
    return max(GPU_LEAST, min(GPU_MOST, int(budget / max(seconds, 1e-4))))


def host_seconds(call: Call) -> float:
    """What the host takes until a call is queued."""
    found = []
    for _ in range(WARM):
        torch.cuda.synchronize()
        found.append(seconds_of(call))
    torch.cuda.synchronize()
    return min(found)


def gpu_seconds(call: Call, times: int = 1) -> float:
    """As ``seconds_of``, until the GPU has done it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def wall_seconds(call: Call, budget: float) -> float:
    once = gpu_seconds(call)
    return median(gpu_seconds(call, max(1, int(budget / BLOCKS / once))) for _ in range(BLOCKS))


def cold_seconds(
    calls: Mapping[str, Call], host: Mapping[str, float], rounds: Mapping[str, int]
) -> dict[str, list[float]]:
    """Seconds between two events around each call. Before the first one the GPU waits until all is queued, so that the
    host is not in them, unless the call itself waits for the GPU."""
    flush = Flush()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with no_garbage_collection():
        for turn in range(max(rounds.values(), default=0)):
            for name, call in calls.items():
                if turn >= rounds[name]:
                    continue
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush()
                torch.cuda._sleep(int(CLOCK * min(2 * host[name] + 5e-5, LONGEST_WAIT)))
                begin.record()
                call()
                end.record()
                end.synchronize()
                taken[name].append(begin.elapsed_time(end) / 1e3)
    return taken


class Flush:
    """Empties the L2 cache: writes more than it holds and reads it again, so that nothing is left there to be written
    back on somebody else's time."""

    def __init__(self) -> None:
        cache = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0)
        self.memory = torch.empty(CACHES * max(cache, 32 << 20) // 4, dtype=torch.float32, device="cuda")

    def __call__(self) -> None:
        self.memory.zero_()
        self.memory.sum()


def gpu_copy_bandwidth(size: int = 1 << 30, rounds: int = 20) -> float:
    """Bytes a second, read and written, of ``copy_`` between two tensors of so many bytes on a GPU."""
    source = torch.ones(size // 4, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    taken = cold_seconds({"copy": lambda: target.copy_(source)}, {"copy": 0.0}, {"copy": rounds})
    return 2 * size / median(taken["copy"])


def launches_of(call: Call) -> dict[str, int]:
    """What a call has a GPU do, kernels, copies and fills, and how often each, as the profiler sees it."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    done = (event for event in found.events() or () if event.device_type == DeviceType.CUDA)
    return dict(Counter(event.name for event in done if not getattr(event, "is_user_annotation", False)))
