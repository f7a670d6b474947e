"""The one place where a kernel is launched, and what every launch needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch: what was called with which arguments."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, **self.options)

    @property
    def name(self) -> str:
        return str(getattr(self.kernel, "fn", self.kernel).__name__)


_recorders: list[tuple[list[Launch], bool]] = []


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel; where a dimension of the grid is 0 there is nothing to do."""
    if 0 in grid:
        return
    this = Launch(kernel, grid, args, options)
    for launches, _ in _recorders:
        launches.append(this)
    if all(runs for _, runs in _recorders):
        this()


@contextlib.contextmanager
def recorded(*, run: bool = True) -> Iterator[list[Launch]]:
    """The launches of this process while inside; with ``run=False`` they are only listed."""
    entry: tuple[list[Launch], bool] = ([], run)
    _recorders.append(entry)
    try:
        yield entry[0]
    finally:
        _recorders[:] = [other for other in _recorders if other is not entry]


# --- shapes -------------------------------------------------------------------------------------------------------


def cdiv(n: int, block: int) -> int:
    return -(-n // block)


def power_of_2(n: int, least: int = 1) -> int:
    """The least power of 2 that is at least n: blocks have such sizes."""
    return max(triton.next_power_of_2(max(n, 1)), least)


def problems(tensor: Tensor | None, inner: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of the leading dimensions, all but the last ``inner``; neighbours that lie like one are joined.

    Kernels find a problem's first element with them (``offset_of``), so no layout has to be copied.
    """
    sizes: list[int] = [1]
    strides: list[int] = [0]
    if tensor is None:
        return (1,), (0,)
    for size, stride in zip(tensor.shape[: tensor.dim() - inner], tensor.stride(), strict=False):
        if size == 1:
            continue
        if strides[-1] == size * stride or sizes[-1] == 1:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    return tuple(sizes), tuple(strides)


def count(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
