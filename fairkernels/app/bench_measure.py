"""How a call is measured: the calls take turns and the median counts; peak memory; what a plain copy reaches."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

Call = Callable[[], object]

BLOCK = 5e-4
"""Seconds that are timed in one go: short calls are repeated for as long."""

LEAST, MOST = 3, 21
"""Rounds of one call."""

PATIENCE = 1.2
"""Where ``LEAST`` rounds take more seconds than this or than four budgets, there is only one."""


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call, and in how many rounds it was timed."""

    seconds: float
    rounds: int


def seconds_of(call: Call, times: int = 1) -> float:
    """Mean seconds of a call that is made so many times in a row."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def interleaved(calls: Mapping[str, Call], once: Mapping[str, float], budget: float) -> dict[str, Timing]:
    """Median time of every call.

    They take turns, so that a busy moment of the machine falls on all of them.

    Args:
        calls: what is timed; each has run before, nothing of it is warmed up here.
        once: seconds that one of them takes, roughly.
        budget: seconds for all rounds of one call, within ``LEAST`` and ``MOST`` rounds.
    """
    times = {name: max(1, int(BLOCK / once[name])) for name in calls}
    rounds = {name: rounds_within(budget, times[name] * once[name]) for name in calls}
    most = max(rounds.values(), default=0)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with no_garbage_collection():
        for turn in range(most):
            for name, call in calls.items():
                if turn * rounds[name] % most < rounds[name]:  # the few rounds of a long call are spread over all
                    taken[name].append(seconds_of(call, times[name]))
    return {name: Timing(median(found), len(found)) for name, found in taken.items()}


def rounds_within(budget: float, block: float) -> int:
    return 1 if LEAST * block > max(PATIENCE, 4 * budget) else max(LEAST, min(MOST, int(budget / block)))


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
