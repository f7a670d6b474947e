"""The one place where a kernel is launched, and what every launch needs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schema import accumulation_dtype

REGISTERS = 65_536
"""Of a multiprocessor."""

AS_WRITTEN = {"enable_fp_fusion": False}
"""No product and sum become one instruction, for kernels whose numbers must be those of every other backend, and for
those whose course (a loop, a branch) depends on sums: of two lanes that exchange their products each would round only
that of the other, their sums could differ, and the threads of a warp take different ways."""


@dataclass(frozen=True)
class Launch:
    """One launch: what was called with which arguments."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    in_place: bool = False
    """The kernel writes what it reads or adds to what is there: run twice it gives something else than run once."""

    def __call__(self) -> Any:
        """The kernel as it was compiled, if it was."""
        return self.kernel[self.grid](*self.args, **self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """The options, and all registers that a program of so many warps may have: left to itself the compiler rather
        spills a little than take more than 64 or 128."""
        return {"maxnreg": min(255, REGISTERS // (32 * self.options["num_warps"])), **self.options}

    @property
    def name(self) -> str:
        return str(getattr(self.kernel, "fn", self.kernel).__name__)


_recorders: list[tuple[list[Launch], bool]] = []


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, in_place: bool = False, **options: Any) -> None:
    """Run a kernel; where a dimension of the grid is 0 there is nothing to do.

    ``in_place`` says of a kernel that it writes what it reads, or adds to what is there, so that it must not be run for
    a measurement.
    """
    if 0 in grid:
        return
    if isinstance(kernel, triton.JITFunction) and not (_recorders or _timers or watched(kernel)):
        launch_again(kernel, grid, args, options)
        return
    this = Launch(kernel, grid, args, options, in_place)
    for launches, _ in _recorders:
        launches.append(this)
    if all(runs for _, runs in _recorders):
        for (timer,) in _timers[-1:]:
            this = best(this, timer)
        this()


def watched(kernel: Any) -> bool:
    """Whether somebody (a profiler) takes part in how kernels are launched or compiled."""
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    staged = getattr(runtime, "add_stages_inspection_hook", None)
    return bool(kernel.pre_run_hooks or compilation.instrumentation_mode or staged)


class Compiled:
    """What a kernel was compiled to, by what it was compiled for."""

    MOST = 1024  # where other numbers come every time none of them is of use

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel  # which stays alive: it is found by its id
        self.any_number = [p.num for p in kernel.params if p.do_not_specialize]
        """Where arguments are for whose values it is not compiled again."""
        self.found: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


_compiled: dict[int, Compiled] = {}


def launch_again(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """A launch that, from the second time on, passes over Triton's search for the kernel that it has compiled, which
    looks at every argument and takes longer than the launch.

    A kernel is kept for the very numbers that it was launched with, for tensors by dtype and by whether they lie on 16
    bytes. It takes all arguments in order, constants as well.
    """
    compiled = _compiled.get(id(kernel)) or _compiled.setdefault(id(kernel), Compiled(kernel))
    known = [(arg.dtype, arg.data_ptr() % 16 == 0) if isinstance(arg, Tensor) else arg for arg in args]
    for place in compiled.any_number:
        if type(known[place]) is int:
            known[place] = -(2**31) <= known[place] < 2**31  # how many bits it has there
    key = (triton.runtime.driver.active.get_current_device(), *options.values(), *options, *known)
    found = compiled.found.get(key)
    if found is not None:
        run, constants = found
        blocks = (*grid, 1, 1)
        run[blocks](*args, *constants)
        return
    run = Launch(kernel, grid, args, options)()
    if isinstance(run, triton.compiler.CompiledKernel):
        if len(compiled.found) >= compiled.MOST:
            compiled.found.clear()
        compiled.found[key] = run, tuple(options[p.name] for p in kernel.params[len(args) :])


@contextlib.contextmanager
def recorded(*, run: bool = True) -> Iterator[list[Launch]]:
    """The launches of this process while inside; with ``run=False`` they are only listed."""
    entry: tuple[list[Launch], bool] = ([], run)
    _recorders.append(entry)
    try:
        yield entry[0]
    finally:
        _recorders[:] = [other for other in _recorders if other is not entry]


# --- tuning, for who asks for it ----------------------------------------------------------------------------------

Timer = Callable[[Callable[[], None]], float]

WARPS = (1, 2, 4, 8, 16)
STAGES = (2, 4)  # beside what Triton takes by itself

_timers: list[list[Timer]] = []  # those of open scopes, of all threads; each is one list of its own
_found: dict[Hashable, dict[str, int]] = {}


@contextlib.contextmanager
def tuned(timer: Timer | None = None) -> Iterator[None]:
    """Inside, the first launch of every specialisation of a kernel is timed with other numbers of warps and of pipeline
    stages; that launch and all later ones inside such a scope take the fastest. Outside nothing is tuned: there a call
    is launched the same way every time. Sums of floating numbers may be taken in another order than outside.

    Never tuned are kernels that write what they read, launches while a CUDA graph is captured and, unless a timer is
    given, what does not run on a GPU. ``timer`` takes a function and gives back how long it takes.
    """
    scope = [timer or on_gpu]
    _timers.append(scope)
    try:
        yield
    finally:
        _timers[:] = [other for other in _timers if other is not scope]


def on_gpu(run: Callable[[], None]) -> float:
    """Median time of a kernel in milliseconds."""
    return float(triton.testing.do_bench(run, return_mode="median"))


def best(given: Launch, timer: Timer) -> Launch:
    """The launch as it was fastest; as it was given where nothing may be tried."""
    key = specialisation(given)
    if key not in _found:
        if not may_be_tried(given, timer):
            return given
        _found[key] = fastest(given, timer)
    return replace(given, options=given.options | _found[key])


def may_be_tried(given: Launch, timer: Timer) -> bool:
    if given.in_place:
        return False
    if timer is not on_gpu:
        return True
    first = next(arg for arg in given.args if isinstance(arg, Tensor))
    return first.is_cuda and not torch.cuda.is_current_stream_capturing()


def fastest(given: Launch, timer: Timer) -> dict[str, int]:
    """The best number of warps among that given and its neighbours, and with it the best number of stages."""
    warps = given.options.get("num_warps", 4)
    choice: dict[str, int] = {}
    time = timed(given, timer)
    steps: tuple[list[dict[str, int]], ...] = (
        [{"num_warps": n} for n in WARPS if n in (warps // 2, warps * 2)],
        [{"num_stages": n} for n in STAGES],
    )
    for options in steps:
        for tried in [choice | option for option in options]:
            took = timed(replace(given, options=given.options | tried), timer)
            if took < time:
                choice, time = tried, took
    return choice


def timed(tried: Launch, timer: Timer) -> float:
    try:
        return timer(tried)
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def specialisation(given: Launch) -> Hashable:
    """What a kernel is compiled for: types, places and options; not the sizes, which follow from the batch."""
    return given.kernel, tuple(map(kind, given.args)), tuple(sorted(given.options.items(), key=repr))


def kind(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.dtype, arg.device
    return arg if arg is None or isinstance(arg, bool | str) else type(arg)  # these are constants


# --- shapes -------------------------------------------------------------------------------------------------------


def cdiv(n: int, block: int) -> int:
    return -(-n // block)


def power_of_2(n: int, least: int = 1) -> int:
    """The least power of 2 that is at least n: blocks have such sizes."""
    return max(1 << (n - 1).bit_length() if n > 1 else 1, least)  # Triton's own takes as long as a launch


Numbers = tuple[int, ...]


def problems(tensor: Tensor | None, inner: int) -> tuple[Numbers, Numbers]:
    """Sizes and strides of the leading dimensions, all but the last ``inner``; neighbours that lie like one are joined.

    Kernels find a problem's first element with them (``offset_of``), so no layout has to be copied.
    """
    return ((1,), (0,)) if tensor is None else joined(tensor.shape, tensor.stride(), inner)


@functools.lru_cache(maxsize=1024)
def joined(shape: Numbers, strides: Numbers, inner: int) -> tuple[Numbers, Numbers]:
    sizes, steps = [1], [0]
    for size, stride in list(zip(shape, strides, strict=True))[: len(shape) - inner]:
        if size == 1:
            continue
        if steps[-1] == size * stride or sizes[-1] == 1:
            sizes[-1], steps[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            steps.append(stride)
    return ((1,), (0,)) if sizes == [1] else (disguised(sizes), disguised(steps))


DISGUISE = 2**62


def disguised(numbers: Iterable[int]) -> Numbers:
    """Sizes or strides of several problems as large odd numbers, which kernels see through (``undisguised``).

    Triton compiles a kernel again when a number of a tuple becomes 1, a multiple of 16, or leaves 32 bits; what
    ``do_not_specialize`` says holds for single numbers only. For numbers that look alike there is one kernel.
    """
    return tuple(DISGUISE + 2 * number + 1 for number in numbers)


def last_stride(tensor: Tensor | None) -> int:
    return 1 if tensor is None else tensor.stride(-1)


def real_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of the accumulation dtype."""
    return tl.float64 if accumulation_dtype(dtype) == torch.float64 else tl.float32
