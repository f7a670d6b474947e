"""How a call is measured: the calls take turns, the median counts, short ones are repeated and the first one of a turn
stands by itself; peak memory; what a plain copy reaches."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
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


def available_memory() -> int:
    """Bytes that this machine can still give; where Linux does not say, little."""
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
