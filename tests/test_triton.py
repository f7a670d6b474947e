"""The Triton backend: launches, copies, waiting, memory; values and gradients are tested with those of all backends.

What the host does is tested without running a kernel (``triton_calls``); the rest needs ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
from cases import (
    COMPILED,
    LARGER_IN_CI,
    call,
    reference_gradient,
    replace_tensors,
    runs,
    sample,
    samples,
    values_and_gradients,
)
from conftest import EVERY_SAMPLE, is_quick
from larger import larger
from tolerance import assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode

import fairkernels
from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops import dispatch, triton_kernels
from fairkernels.ops.schema import OPERATORS

pytest.importorskip("triton")

import triton
from triton_calls import (
    SIZES,
    WITH_KERNELS,
    backward,
    calls,
    empty_like,
    forward,
    launches_of,
    of_size,
    operator_arguments,
    with_problems,
    without_data,
)
from triton_limits import beyond_the_table, limited

from fairkernels.ops.triton_kernels import class_order, class_terms, launch

INTERPRETED = triton_kernels.interpreted()
on_the_host = pytest.mark.skipif(INTERPRETED, reason="nothing is run here; tested where kernels are not interpreted")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

every_operator = pytest.mark.parametrize("name", WITH_KERNELS)
DIFFERENTIABLE = tuple(name for name in WITH_KERNELS if OPERATORS[name].differentiable)
INTERPRETED_SAMPLES = [
    pytest.param(name, s.name, id=f"{name}-{s.name}")
    for name in WITH_KERNELS
    if runs("triton", name)
    for s in samples(name)
]


# --- what PyTorch is asked to do ----------------------------------------------------------------------------------

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
COPIES = {"clone", "copy_", "_to_copy", "contiguous", "_reshape_copy", "repeat", "cat", "stack", "index", "gather"}


class Watch(TorchDispatchMode):
    """Lists the kernels of PyTorch: all that is neither a view nor an allocation."""

    def __init__(self, inputs=()):
        super().__init__()
        self.kernels, self.copied, self.elsewhere = [], [], []
        self.inputs = {t.untyped_storage()._cdata for t in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor) and result.device.type != "meta":
                self.elsewhere.append(name)
        if name in ALLOCATIONS or is_view(func):
            return results
        self.kernels.append(name)
        tensors = [t for arg in args for t in (arg if isinstance(arg, (tuple, list)) else [arg])]
        read = tensors[1:] if name == "copy_" else tensors
        for t in read:
            if name in COPIES and isinstance(t, torch.Tensor) and t.untyped_storage()._cdata in self.inputs:
                self.copied.append(f"{name} of {list(t.shape)}")
        return results


def is_view(func):
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def watched(name, args):
    """``(forward, its Watch)`` and, where there is one, ``(backward, its Watch)``."""
    inputs = [arg for arg in args if isinstance(arg, torch.Tensor)]
    with without_data(), Watch(inputs) as watch:
        there = forward(name, args)
    yield there, watch
    if OPERATORS[name].differentiable:
        grad = there.results[0].new_empty(()).expand(there.results[0].shape)  # as of a sum
        with without_data(), Watch([*inputs, *there.saved, grad]) as watch:
            back = backward(name, args, there.saved, grad)
        yield back, watch


# --- launches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regime:
    """A kind of call, and how many kernels it is: ours, and besides them PyTorch's."""

    operator: str
    sample: str
    size: tuple[int, ...]
    forward: tuple[int, int]
    backward: tuple[int, int] | None = None

    def __str__(self):
        return f"{self.operator}, {self.sample}, {'x'.join(map(str, self.size))}"


ONE = (1, 0)

REGIMES = (
    Regime("soft_confusion", "plain", (128, 10), ONE, ONE),
    Regime("soft_confusion", "plain", (4096, 50), (2, 1), ONE),
    Regime("soft_confusion", "plain", (4096, 100), (2, 0), ONE),
    Regime("soft_confusion", "plain", (256, 1000), (2, 0), ONE),
    Regime("soft_confusion", "plain", (1024, 10_000), (3, 0), ONE),
    Regime("soft_confusion", "plain", (60_000, 1000), (2, 3), ONE),
    Regime("soft_confusion", "normalize all", (128, 10), ONE, ONE),
    Regime("soft_confusion", "normalize all", (4096, 100), (2, 4), (1, 2)),
    Regime("symmetry_gap", "counts", (64, 64), ONE, ONE),
    Regime("symmetry_gap", "counts", (128, 128), (2, 0), ONE),
    Regime("symmetry_gap", "plain", (128, 128), (3, 0), (2, 0)),
    Regime("symmetry_gap", "counts", (1000, 1000), (2, 0), ONE),
    Regime("symmetry_gap", "plain", (1000, 1000), (3, 0), (2, 0)),
    Regime("symmetry_loss", "plain", (128, 10), ONE, ONE),
    Regime("symmetry_loss", "plain", (4096, 50), (2, 1), ONE),
    Regime("symmetry_loss", "plain", (4096, 100), (4, 0), ONE),
    Regime("symmetry_loss", "plain", (256, 1000), (4, 0), (2, 0)),
    Regime("symmetry_loss", "plain", (1024, 10_000), (5, 0), (2, 0)),
    Regime("symmetry_loss", "plain", (60_000, 1000), (4, 3), ONE),
    Regime("spectral_norm", "plain", (64, 64), ONE, ONE),
    Regime("spectral_norm", "plain", (128, 128), ONE, ONE),
    Regime("spectral_norm", "plain", (1000, 1000), (67, 1), ONE),
    Regime("spectral_norm", "tolerance", (1000, 1000), (43, 1), ONE),
    Regime("spectral_loss", "soft: plain", (128, 32), ONE, ONE),
    Regime("spectral_loss", "soft: plain", (128, 100), (4, 0), (2, 0)),
    Regime("spectral_loss", "kl: plain", (128, 10), ONE, ONE),
    Regime("spectral_loss", "kl: plain", (128, 100), (4, 0), (2, 0)),
    Regime("spectral_loss", "kl: plain", (256, 1000), (70, 1), (2, 0)),
    Regime("spectral_loss", "kl: plain", (1024, 10_000), (71, 2), (2, 0)),
    Regime("fair_cross_entropy", "plain", (128, 10), ONE, ONE),
    Regime("fair_cross_entropy", "plain", (4096, 32), (2, 1), (2, 0)),
    Regime("fair_cross_entropy", "plain", (4096, 100), (5, 0), (2, 0)),
    Regime("fair_cross_entropy", "plain", (65_536, 100), (6, 3), (2, 2)),
    Regime("fair_cross_entropy", "plain", (256, 1000), (71, 1), (2, 0)),
    Regime("fair_cross_entropy", "plain", (8192, 1000), (71, 1), (2, 0)),
    Regime("fair_cross_entropy", "without cross-entropy", (256, 1000), (4, 0), (2, 0)),
    Regime("fair_cross_entropy", "cross-entropy alone", (256, 1000), (3, 0), (3, 0)),
    Regime("pgd_step", "linf", (64, 3, 224, 224), ONE),
    Regime("pgd_step", "l2", (128, 3, 32, 32), ONE),
    Regime("pgd_step", "l2", (64, 3, 224, 224), (2, 0)),
    Regime("random_start", "linf", (64, 3, 224, 224), ONE),
    Regime("random_start", "l2", (128, 3, 32, 32), ONE),
    Regime("random_start", "l2", (64, 3, 224, 224), (2, 0)),
    Regime("confusion_counts", "plain", (128, 10), (1, 1)),
    Regime("confusion_counts", "plain", (60_000, 1000), (1, 1)),
    Regime("trades_kl", "batchmean", (128, 10), (2, 0), ONE),
    Regime("trades_kl", "batchmean", (4096, 1000), (2, 0), ONE),
    Regime("trades_kl", "none", (4096, 1000), ONE, ONE),
    Regime("same_class_mixup", "plain", (128, 3, 32, 32), ONE),
)
"""Of iterations beyond one program the launches are those until ``iters``: nobody waits to see when they may stop."""


@on_the_host
@pytest.mark.parametrize("regime", [regime for regime in REGIMES if regime.operator in WITH_KERNELS], ids=str)
def test_number_of_launches(regime):
    name = regime.operator
    s = of_size(name, sample(name, regime.sample), regime.size)
    found = [(len(call.launches), len(watch.kernels)) for call, watch in watched(name, operator_arguments(name, s))]
    expected = [regime.forward] + [regime.backward] * bool(OPERATORS[name].differentiable)
    assert found == expected


@on_the_host
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 1), (torch.bfloat16, 4), (torch.float16, 4)], ids=str)
def test_fifty_classes_fit_one_program_but_in_16_bits(dtype, count):
    """For which Triton would multiply in TF32."""
    s = of_size("symmetry_loss", sample("symmetry_loss", "plain", dtype), (128, 50))
    with without_data():
        assert len(forward("symmetry_loss", operator_arguments("symmetry_loss", s)).launches) == count


@on_the_host
@every_operator
def test_launches_are_stated(name):
    """The docstring of each operator or of its module speaks of launches and bytes, a regime stands in the table above.

    How many there are is held by that table and by ``test_triton_bytes``, not read from the docstring.
    """
    assert any(regime.operator == name for regime in REGIMES)
    function = triton_kernels.kernel_of(name, name)
    text = f"{function.__doc__} {sys.modules[function.__module__].__doc__}"
    assert "launch" in text, f"the docstring of {name} does not say how often it launches"
    assert re.search("byte|read", text), f"the docstring of {name} does not say how much it moves"


# --- copies, waiting, devices -------------------------------------------------------------------------------------


def every_second(tensor):
    return tensor.new_empty([2 * size for size in tensor.shape])[tuple(slice(None, None, 2) for _ in tensor.shape)]


def window(tensor):
    return tensor.new_empty([size + 3 for size in tensor.shape])[tuple(slice(1, 1 + size) for size in tensor.shape)]


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else every_second(t),
    "every second element": every_second,
    "window": window,
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() and t.shape[0] else t,
    "expanded rows": lambda t: t[..., :1].expand(t.shape) if t.dim() and t.shape[-1] else t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "dimensions in reverse": lambda t: (
        t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    ),
}


@on_the_host
@pytest.mark.parametrize("layout", LAYOUTS)
@every_operator
def test_no_input_is_copied(name, layout):
    """Nor does the host look at data: tensors here have none. Nor is there a tensor on another device than theirs."""
    for s in calls(name, torch.float32, SIZES[name][::3]):
        args = operator_arguments(name, replace_tensors(replace_tensors(s, empty_like), LAYOUTS[layout]))
        for _, watch in watched(name, args):
            assert not watch.copied, f"{s.name}: {watch.copied}"
            assert not watch.elsewhere, f"{s.name}: {watch.elsewhere} on another device"


@on_the_host
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float64, torch.float16))],
    ids=str,
)
@every_operator
def test_no_input_is_copied_in_any_dtype(name, dtype):
    for s in calls(name, dtype, SIZES[name][::3]):
        for _, watch in watched(name, operator_arguments(name, s)):
            assert not watch.copied, f"{s.name}: {watch.copied}"


@on_the_host
@every_operator
def test_results_are_those_of_the_fake(name):
    for s in calls(name, torch.bfloat16, SIZES[name][::2]):
        args = operator_arguments(name, s)
        promised = OPERATORS[name].fake(*args)
        promised = promised if isinstance(promised, tuple) else (promised,)
        there, *back = [call for call, _ in watched(name, args)]
        assert [described(t) for t in there.results] == [described(t) for t in promised], s.name
        for gradients in back:
            inputs = args[: OPERATORS[name].differentiable]
            assert [(t.shape, t.dtype) for t in gradients.results] == [(t.shape, t.dtype) for t in inputs], s.name
            assert all(t.is_contiguous() for t in gradients.results), s.name


def described(tensor):
    return tensor.shape, tensor.dtype, tensor.stride() if tensor.numel() else None


@on_the_host
@every_operator
def test_grids_fit_a_gpu(name):
    """Beyond the first dimension a grid has 65,535 programs at most; what fills 16 GB must still be possible."""
    with without_data():
        for s in calls(name, torch.float32, SIZES[name][::3]):
            args = operator_arguments(name, s)
            if OPERATORS[name].batched:
                args = with_problems(args, min(70_000, 2**32 // max(args[0].numel(), 1)))
            for this in launches_of(name, args):
                assert all(size < 2**31 for size in this.grid), f"{s.name}: {this.name} {this.grid}"
                assert all(size < 2**16 for size in this.grid[1:]), f"{s.name}: {this.name} {this.grid}"


REGIMES_OF_KERNELS = {
    "WIDE", "SPLIT", "DIRECT", "COMPACT", "COUNTS", "ON_CHIP", "SEARCH", "STRAIGHT", "TURNED", "SHORT_IS_V", "IMAGE",
    "PRESENT_BY_ROW",
}  # fmt: skip
"""Constants that follow from sizes, not from what the caller wants."""

TAILS = {
    "BLOCK": ("n", "samples", "B", "K", "classes", "long", "parts", "slots", "tiles"),
    "BLOCK_B": ("B",),
    "BLOCK_K": ("K",),
    "BLOCK_M": ("rows",),
    "BLOCK_N": ("columns", "rows"),
    "ROWS": ("B", "samples", "n", "short", "classes"),
    "COLUMNS": ("n",),
    "COUNTERS": ("n",),
    "KEYS": ("B",),
    "TILE": ("slots",),
    "BINS": ("K",),
    "CHUNK": ("long",),
    "LONG": ("long",),
}
"""Blocks, and of what they are blocks."""


@on_the_host
def test_every_form_of_every_kernel_is_compared_by_make_test():
    """Its forward by a test of values, its backward by one of gradients, of those that ``conftest`` chooses.

    With one program, or blocks that are full, half the bugs are not seen. Of every form one launch has both.
    """
    compared = []
    with without_data():
        for name in WITH_KERNELS:
            for s in samples(name):
                tests = [is_quick(f"{test}[{name}-triton-{s.name}-float32]", True, set()) for test in EVERY_SAMPLE]
                compared += compared_launches(name, s, *tests)
            for s in larger(name):
                if (name, s.name) in LARGER_IN_CI:
                    compared += compared_launches(name, s)
        for name, s, limit in beyond_the_table():
            with limited(limit):
                compared += compared_launches(name, s)
        every = {
            form_of(this)
            for name in WITH_KERNELS
            for s in calls(name, torch.float32)
            for this in compared_launches(name, s)
        }
    assert every - {form_of(this) for this in compared if prod(this.grid) >= 3 and is_ragged(this)} == set()


def compared_launches(name, s, values=True, gradients=True):
    args = operator_arguments(name, s)
    there = forward(name, args)
    launches = list(there.launches) if values else []
    if gradients and OPERATORS[name].differentiable:
        launches += backward(name, args, there.saved, there.results[0]).launches
    return launches


def named_arguments(this):
    return dict(zip(this.kernel.arg_names, this.args, strict=False)) | this.options


def form_of(this):
    """The kernel, with its module as names occur twice; its constants that are set; of two launches which it is."""
    found = named_arguments(this)
    given = {name for name in ("sums_in", "sums_out") if "sums_in" in found and found[name] is not None}
    constants = sorted(given | {name for name in REGIMES_OF_KERNELS if found.get(name)})
    module = this.kernel.fn.__module__.rpartition(".")[2]
    return ", ".join([f"{module}.{this.name}", *constants])


def is_ragged(this):
    """Whether one of its sizes is no multiple of its block."""
    found = {name: value for name, value in named_arguments(this).items() if type(value) is int}
    pairs = ((size, block) for block, sizes in TAILS.items() for size in sizes if {size, block} <= found.keys())
    return any(found[size] % found[block] for size, block in pairs)


# --- memory -------------------------------------------------------------------------------------------------------

M_PERTURB = -6


@pytest.fixture
def fresh_memory():
    """Choose what fresh memory is filled with; afterwards with NaN again, as for all tests."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("needs glibc")
    yield lambda byte: libc.mallopt(M_PERTURB, byte ^ 0xFF)
    libc.mallopt(M_PERTURB, 0x100)


@needs_interpreter
@pytest.mark.parametrize(("name", "label"), INTERPRETED_SAMPLES)
def test_every_bit_is_written_and_the_same_twice_and_no_input_is_touched(name, label, fresh_memory):
    operator = OPERATORS[name]
    args = handed_on(name, sample(name, label))
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    before = [t.clone() for t in tensors]
    found = []
    for byte in (0x11, 0x22):
        fresh_memory(byte)
        results = dispatch.forward(operator, args, "triton")
        grads = ()
        if operator.differentiable:
            saved = tuple(results[place] for place in operator.saved_places)
            kept = [t.clone() for t in saved]
            grads = dispatch.backward(operator, torch.ones_like(results[0]), args, saved, "triton")
            torch.testing.assert_close(list(saved), kept, rtol=0, atol=0, equal_nan=True)
        found.append([*results, *grads])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)


# --- devices ------------------------------------------------------------------------------------------------------


@on_the_host
@every_operator
def test_an_operator_runs_on_the_device_of_its_first_tensor(name, monkeypatch):
    current = []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(triton_kernels, "kernel_of", lambda *_: lambda *args: (current[0], args[0]))
    for suffix in ("", "_backward"):
        used, first = triton_kernels.call(name, operator_arguments(name, samples(name)[0]), suffix)
        assert used is first


@on_the_host
@every_operator
def test_tensors_of_another_device_are_refused(name):
    """Also below the checks of ``fairkernels.functional``: a kernel would read anywhere."""
    for s in samples(name):
        args = operator_arguments(name, s)
        for place, arg in enumerate(args):
            if isinstance(arg, torch.Tensor) and place > 0:
                mixed = (*args[:place], torch.zeros(arg.shape, dtype=arg.dtype), *args[place + 1 :])
                with without_data(), pytest.raises(RuntimeError, match="on the device of the first, meta, got cpu"):
                    triton_kernels.call(name, mixed)


# --- which backend ------------------------------------------------------------------------------------------------


@on_the_host
@every_operator
def test_a_gpu_runs_triton(name):
    for dtype in OPERATORS[name].dtypes:
        assert dispatch.choose(name, "cuda", dtype, None) == "triton"
    assert dispatch.choose(name, "cpu", OPERATORS[name].dtypes[0], None) != "triton"


@on_the_host
@every_operator
def test_cpu_tensors_have_a_reason(name):
    s = samples(name)[0]
    assert "can not run: triton kernels need a GPU tensor, or TRITON_INTERPRET=1" in fairkernels.explain(name, *s.args)
    with pytest.raises(RuntimeError, match=f"'triton' was asked for {name}, but triton kernels need a GPU tensor"):
        call(name, s, backend="triton")


@needs_interpreter
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize(
    "first", [backend for backend in ("native", "reference") if backend in [*COMPILED, "reference"]]
)
def test_backward_on_triton_after_a_forward_elsewhere(name, first, monkeypatch):
    monkeypatch.setitem(dispatch.PREFERRED, "cpu", dispatch.Preference((first,), "for this test"))
    dispatch.choose.cache_clear()
    s = samples(name)[0]
    leaf = s.args[0].clone().requires_grad_()
    result = getattr(fairkernels.functional, name)(leaf, *s.args[1:], **s.kwargs)
    upstream = torch.ones_like(result)
    with fairkernels.use_backend("triton"), launch.recorded() as launches:
        result.backward(upstream)
    dispatch.choose.cache_clear()
    args = handed_on(name, s)
    exact = reference_gradient(OPERATORS[name], args, upstream, torch.float64)
    plain = reference_gradient(OPERATORS[name], args, upstream, torch.float32)
    assert_no_worse(leaf.grad, plain, exact, accuracy=30 * OPERATORS[name].allowed_error(torch.float32))
    if not (first == "native" and OPERATORS[name].gives_gradient):  # that one has its gradient already
        assert launches


# --- launching ----------------------------------------------------------------------------------------------------


class FakeKernel:
    """Lists what it is launched with."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((grid, args, options))


def test_an_empty_grid_launches_nothing():
    kernel = FakeKernel()
    launch.launch(kernel, (3, 0), num_warps=4)
    assert not kernel.calls


def test_launches_are_recorded_and_run_only_if_they_shall():
    kernel = FakeKernel()
    with launch.recorded() as outer, launch.recorded(run=False) as inner:
        launch.launch(kernel, (2,), 5, num_warps=4)
    assert len(outer) == len(inner) == 1
    assert not kernel.calls
    with launch.recorded() as launches:
        launch.launch(kernel, (2,), 5, num_warps=4)
    assert len(launches) == len(kernel.calls) == 1


class Compiled(FakeKernel):
    """What a kernel was compiled to: takes grids of three numbers, and constants like other arguments."""


class Compiling(FakeKernel):
    """A kernel of the compiler: a launch gives the compiled one back."""

    pre_run_hooks = ()

    def __init__(self):
        super().__init__()
        names = enumerate(("x", "n", "turn", "BLOCK"))
        self.params = [SimpleNamespace(num=i, name=name, do_not_specialize=name == "turn") for i, name in names]
        self.compiled = Compiled()

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((grid, args, options)) or self.compiled


def test_a_launch_like_an_earlier_one_goes_straight_to_the_compiled_kernel(monkeypatch):
    device = Mock(return_value=0)
    monkeypatch.setattr(launch.triton, "JITFunction", Compiling)
    monkeypatch.setattr(launch.triton.compiler, "CompiledKernel", Compiled)
    monkeypatch.setattr(launch.triton.runtime.driver, "_active", Mock(get_current_device=device))
    monkeypatch.setattr(launch, "_compiled", {})
    kernel, (x, y) = Compiling(), (torch.ones(8), torch.ones(8))
    options = {"BLOCK": 16, "num_warps": 4}

    launch.launch(kernel, (2,), x, 5, 0, **options)
    launch.launch(kernel, (7, 3), y, 5, 1, **options)
    assert len(kernel.calls) == 1
    ((grid, args, named),) = kernel.compiled.calls
    assert (grid[:3], named) == ((7, 3, 1), {})
    assert args[0] is y
    assert args[1:] == (5, 1, 16)

    launch.launch(kernel, (2,), x[1:], 5, 0, **options)  # not on 16 bytes
    launch.launch(kernel, (2,), x.double(), 5, 0, **options)
    launch.launch(kernel, (2,), x, 6, 0, **options)
    launch.launch(kernel, (2,), x, 5, 2**31, **options)
    before = len(kernel.calls)
    for number in (-(2**31) - 1, 2**40, -(2**31), 2**31 - 1):  # of 64 bits like that one, of 32 like the first
        launch.launch(kernel, (2,), x, 5, number, **options)
    assert len(kernel.calls) == before
    launch.launch(kernel, (2,), x, 5, 0, **options | {"BLOCK": 32})
    launch.launch(kernel, (2,), x, 5, 0, **options | {"num_stages": 2})
    device.return_value = 1
    launch.launch(kernel, (2,), x, 5, 0, **options)
    with launch.recorded() as launches:
        launch.launch(kernel, (2,), x, 5, 0, **options)
    assert len(launches) == 1
    assert len(kernel.calls) == 9
    assert len(kernel.compiled.calls) == 5


@pytest.mark.parametrize("numbers", [(1,), (0,), (2,), (16, 1, 2**40), (17, 0, 3)])
def test_sizes_of_several_problems_all_look_alike(numbers):
    disguised = launch.disguised(numbers)
    assert [(number - launch.DISGUISE) >> 1 for number in disguised] == list(numbers)
    assert all(number % 2 == 1 and 2**62 < number < 2**63 for number in disguised)


def test_leading_dimensions_that_lie_like_one_are_joined():
    assert launch.problems(torch.ones(4, 5), 2) == launch.problems(None, 2) == ((1,), (0,))
    for tensor, sizes, strides in (
        (torch.ones(2, 3, 4, 5), (6,), (20,)),
        (torch.ones(2, 1, 3, 4, 5).transpose(0, 2), (3, 2), (20, 60)),
        (torch.ones(3, 4, 5)[None].expand(2, 3, 4, 5), (2, 3), (0, 20)),
    ):
        assert launch.problems(tensor, 2) == (launch.disguised(sizes), launch.disguised(strides))


def timer_that_prefers(kernel, **best):
    """Each option that is as preferred saves a second; lists what was tried."""
    tried = []

    def timer(run):
        run()
        options = kernel.calls.pop()[2]
        tried.append(options)
        return 10.0 - sum(options.get(name) == value for name, value in best.items())

    return timer, tried


def test_tuned_takes_the_fastest_and_tries_once():
    kernel = FakeKernel()
    timer, tried = timer_that_prefers(kernel, num_warps=8, num_stages=2)
    with launch.tuned(timer):
        for tensor in (torch.ones(3), torch.ones(500)):
            launch.launch(kernel, (4,), tensor, 5, BLOCK=16, num_warps=4)
    assert [options for _, _, options in kernel.calls] == [
        {"BLOCK": 16, "num_warps": 8, "num_stages": 2, "maxnreg": 255}
    ] * 2
    assert [options["num_warps"] for options in tried] == [4, 2, 8, 8, 8]


def test_each_specialisation_is_tuned():
    kernel = FakeKernel()
    timer, tried = timer_that_prefers(kernel, num_warps=2)
    with launch.tuned(timer):
        launch.launch(kernel, (4,), torch.ones(3), BLOCK=16, num_warps=4)
        before = len(tried)
        launch.launch(kernel, (4,), torch.ones(3).double(), BLOCK=16, num_warps=4)
        launch.launch(kernel, (4,), torch.ones(3), BLOCK=32, num_warps=4)
        launch.launch(kernel, (4,), None, BLOCK=16, num_warps=4)
        for constant in (True, False, "soft", "kl"):
            launch.launch(kernel, (4,), torch.ones(3), constant, BLOCK=16, num_warps=4)
    assert len(tried) == 8 * before


@needs_interpreter
@every_operator
def test_tuned_gives_the_same(name):
    """Kernels are run for nothing but to see how long they take, some that add to what is there among them."""
    tried = []

    def timer(run):
        run()
        tried.append(run.name)
        return 1.0

    many_classes = (
        patch.object(class_order, "MOST_COUNTED", -1),
        patch.object(class_terms, "fits_one_program", lambda *_: False),
    )
    for forced in ((), many_classes):
        with contextlib.ExitStack() as stack:
            for change in forced:
                stack.enter_context(change)
            expected = values_and_gradients(name, "triton", samples(name)[0])
            with launch.tuned(timer):
                found = values_and_gradients(name, "triton", samples(name)[0])
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert tried or name == "confusion_counts"


def test_scopes_of_tuning_may_end_in_any_order():
    """Threads have their own; a scope that ends takes none but itself away."""
    kernel = FakeKernel()
    first, second = (timer_that_prefers(kernel, num_warps=n) for n in (2, 8))
    scopes = [launch.tuned(timer) for timer, _ in (first, second)]
    for scope in scopes:
        scope.__enter__()
    scopes[0].__exit__(None, None, None)
    launch.launch(kernel, (4,), torch.ones(3), BLOCK=16, num_warps=4)
    scopes[1].__exit__(None, None, None)
    launch.launch(kernel, (4,), torch.ones(3), BLOCK=16, num_warps=4)
    assert [options["num_warps"] for _, _, options in kernel.calls] == [8, 4]
    assert second[1]
    assert not first[1]


def test_who_takes_part_in_launches_is_asked_every_time():
    kernel = SimpleNamespace(pre_run_hooks=[])
    assert not launch.watched(kernel)
    with patch.object(triton.knobs.compilation, "instrumentation_mode", "proton"):
        assert launch.watched(kernel)
    kernel.pre_run_hooks.append(print)
    assert launch.watched(kernel)


def test_nothing_is_tuned_outside_nor_what_writes_what_it_reads_nor_without_a_gpu():
    kernel = FakeKernel()
    timer, tried = timer_that_prefers(kernel, num_warps=8)
    with launch.tuned(timer):
        launch.launch(kernel, (4,), torch.ones(3), num_warps=4, in_place=True)
    with launch.tuned():
        launch.launch(kernel, (4,), torch.ones(3), num_warps=4)
    launch.launch(kernel, (4,), torch.ones(3), num_warps=4)
    assert not tried
    assert [options for _, _, options in kernel.calls] == [{"num_warps": 4, "maxnreg": 255}] * 3
