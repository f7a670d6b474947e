"""What every test gets: memory that is NaN until it is written, the backends of this build, calls from the table."""

import contextlib
import ctypes
import os
import re
import zlib
from collections import Counter

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # it would serve graphs of an operator's old schema

import pytest
import torch
from cases import BACKENDS, DEVICE, DIFFERENTIABLE, NAMES, ON_GPU

with contextlib.suppress(ImportError):  # not on every machine with a GPU
    from hypothesis import settings

    settings.register_profile("fairkernels", max_examples=40, deadline=None, derandomize=True)
    settings.load_profile("fairkernels")

NAN_BYTES = 0x100  # glibc fills fresh memory with (value ^ 0xff): bytes that are NaN in every floating dtype
M_PERTURB = -6


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """``torch.empty``, called from Python or from C++, holds NaN: what a kernel forgets to write is seen.

    Memory of a GPU is filled by PyTorch where its own operators are to be deterministic.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_PERTURB, NAN_BYTES)
    torch.use_deterministic_algorithms(ON_GPU, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_PERTURB, 0)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Of devices that are not there ``torch.manual_seed`` keeps each call for later, with its stack, slowly."""
    (torch if ON_GPU else torch.default_generator).manual_seed(0)


@pytest.fixture
def on_the_device():
    """What a test makes without naming a device lies on the one that is tested."""
    with torch.device(DEVICE) if ON_GPU else contextlib.nullcontext():
        yield


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def threads():
    """Set the number of threads; it is put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    """Of interpreted kernels, how many tests of each operator have passed: those whose parameters name it."""
    if "triton" not in BACKENDS or ON_GPU:
        return
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", ()) if "triton" in report.nodeid]
    parameters = [set(re.split(r"[\[\]-]", node.partition("::")[2])) for node in passed]
    counts = Counter(name for found in parameters for name in NAMES if name in found)
    terminalreporter.write_line("passed on Triton's interpreter: " + (", ".join(f"{n} {c}" for n, c in counts.items())))


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """GPU kernels take long on the CPU. ``make test`` runs some of their tests, always the same ones; ``make test-all``
    runs all."""
    if ON_GPU:
        return
    emulated = "triton" if "triton" in BACKENDS else "native" if "FAIRKERNELS_FIBERS" in os.environ else None
    if emulated is None:
        return
    seen = set()
    for item in items:
        name = f"{item.path.name}::{item.nodeid.partition('::')[2]}"
        if emulated in name and not is_quick(name, emulated == "triton", seen):
            item.add_marker(pytest.mark.slow)


def is_quick(name, interpreted, seen):
    """Whether ``make test`` runs this one: of every sample in float32 its values and its gradient (interpreted one of
    the two, in turn) and what else reaches every form of Triton's kernels, what these read and write, the first case of
    each of their tests, and others by lot.

    ``seen``: the tests of which there was a case before, which grows.
    """
    test, _, case = name.partition("[")
    number = zlib.crc32(case.encode())
    if test in EVERY_SAMPLE and "float32" in case:
        in_turn = EVERY_SAMPLE[number % 2] if case.partition("-")[0] in DIFFERENTIABLE else test
        return test == in_turn or not interpreted
    if test == LARGER and interpreted:
        return True  # but what it marks itself
    first = test not in seen and test.startswith("test_triton")
    seen.add(test)
    return first or test.startswith(WHOLE) or zlib.crc32(name.encode()) % 120 == 0


WHOLE = ("test_triton_bytes", "test_triton_limits")
LARGER = "test_larger.py::test_larger_problems_are_no_less_accurate"
EVERY_SAMPLE = (
    "test_forward.py::test_no_less_accurate_than_plain_pytorch",
    "test_gradients.py::test_gradient_no_less_accurate_than_plain_pytorch",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """On a GPU not every backend has every operator: what asks for one all the same is skipped, with the reason."""
    try:
        return (yield)
    except RuntimeError as error:
        if ON_GPU and re.match("backend '.*' was asked for", str(error)):
            pytest.skip(str(error))
        raise
